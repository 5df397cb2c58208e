"""What the scripts are made of: their options, their data sets, the study they run.

Imported before PyTorch, as `lightly_mim` asks for.
"""

import sys
from pathlib import Path

from lightly_mim import interrupts

# Of a script, Ctrl-C needs no traceback while it imports PyTorch.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:
    interrupts.end_at_once()
