"""One file, one method: model, loss and published recipes, in the paper's order."""

from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.methods.mae import MAE
from lightly_mim.methods.simmim import SimMIM

__all__ = ["MAE", "MIMOutput", "MaskedImageModel", "SimMIM"]
