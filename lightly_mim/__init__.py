"""Masked image modelling for lightly."""

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
