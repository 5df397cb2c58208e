"""One file, one method: model, loss and published recipes, in the paper's order."""

from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.methods.crossmae import CrossMAE
from lightly_mim.methods.mae import MAE
from lightly_mim.methods.mask_token_mae import MaskTokenMAE
from lightly_mim.methods.simmim import SimMIM

__all__ = [
    "MAE",
    "CrossMAE",
    "MIMOutput",
    "MaskTokenMAE",
    "MaskedImageModel",
    "SimMIM",
]
