"""How the scripts measure: variants in turns, memory, the steps of a GPU."""
