"""Runs the command line as `python -m lightly_mim`."""

import sys
from pathlib import Path

import lightly_mim

# Python looks first where one stands: no file that lies there is taken for a package.
if not sys.flags.safe_path and sys.path[0] == str(Path.cwd()):
    here = sys.path.pop(0)
    if Path(lightly_mim.__file__).parents[1] == Path(here):  # a clone of the project
        sys.path.append(here)

from lightly_mim.cli import main

if __name__ == "__main__":
    main()
