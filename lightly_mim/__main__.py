"""Runs the command line as `python -m lightly_mim`."""

from lightly_mim.cli import main

if __name__ == "__main__":
    main()
