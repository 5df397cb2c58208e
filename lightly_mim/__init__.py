"""Masked image modelling for lightly.

Imported before PyTorch, it lets threads that wait for each other sleep soon, unless
GOMP_SPINCOUNT or OMP_WAIT_POLICY say how they are to wait: beside a busy process, two
threads which spin instead do a fraction of the work. OpenMP reads both while PyTorch is
loaded; a program that imports PyTorch first sets GOMP_SPINCOUNT itself.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# GNU's OpenMP goes round 300,000 times by default, and 1,000 times where it knows that
# there are fewer CPUs than threads: of CPUs that others are busy on it does not know.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# `python -m lightly_mim` looks first where one stands, beginning with what is imported
# here: no file that lies there is taken for a package. It may be a clone of this one.
if getattr(sys, "argv", [])[:1] == ["-m"] and sys.path[0] == str(Path.cwd()):
    here = sys.path.pop(0)
    if Path(__file__).parents[1] == Path(here):
        sys.path.append(here)
    del here

if TYPE_CHECKING:
    from lightly_mim.conversion import convert
    from lightly_mim.encoders import MaskedEncoder, masked_encoder
    from lightly_mim.evaluation import evaluate
    from lightly_mim.methods import MAE, MaskedImageModel, MIMOutput, SimMIM
    from lightly_mim.optim import Recipe
    from lightly_mim.pretraining import Pretraining, pretrain
    from lightly_mim.transforms import EvalTransform, MAETransform, SimMIMTransform

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "EvalTransform",
    "MAETransform",
    "MIMOutput",
    "MaskedEncoder",
    "MaskedImageModel",
    "Pretraining",
    "Recipe",
    "SimMIM",
    "SimMIMTransform",
    "convert",
    "evaluate",
    "masked_encoder",
    "pretrain",
]

# Each is imported when it is first asked for: PyTorch and Lightning take seconds, which
# `lightly-mim --help` does not need.
_HOMES = {
    "MAE": "methods",
    "EvalTransform": "transforms",
    "MAETransform": "transforms",
    "MIMOutput": "methods",
    "MaskedEncoder": "encoders",
    "MaskedImageModel": "methods",
    "Pretraining": "pretraining",
    "Recipe": "optim",
    "SimMIM": "methods",
    "SimMIMTransform": "transforms",
    "convert": "conversion",
    "evaluate": "evaluation",
    "masked_encoder": "encoders",
    "pretrain": "pretraining",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightly_mim.{_HOMES[name]}"), name)
    if name.isidentifier() and importlib.util.find_spec(f"lightly_mim.{name}"):
        return importlib.import_module(f"lightly_mim.{name}")
    raise AttributeError(f"module 'lightly_mim' has no {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
