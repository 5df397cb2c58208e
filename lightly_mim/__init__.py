"""Masked image modelling for lightly."""

import sys
from pathlib import Path

# `python -m lightly_mim` looks first where one stands, beginning with what is imported
# here: no file that lies there is taken for a package. It may be a clone of this one.
if getattr(sys, "argv", [])[:1] == ["-m"] and sys.path[0] == str(Path.cwd()):
    here = sys.path.pop(0)
    if Path(__file__).parents[1] == Path(here):
        sys.path.append(here)
    del here

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
