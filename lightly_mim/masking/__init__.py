"""Where to mask: `Mask`, the ways to draw one, and how far apart they leave pixels.

Shapes: B images, a mask of (h, w) cells, an encoder grid of (H, W) tokens, N = H * W,
K masked and V = N - K visible tokens.
"""

from lightly_mim.masking.base import Masking, UnitMasking
from lightly_mim.masking.distance import average_distance
from lightly_mim.masking.mask import Mask
from lightly_mim.masking.mixture import MixtureMasking
from lightly_mim.masking.strategies import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    RandomMasking,
    SquareMasking,
)

__all__ = [
    "BlockMasking",
    "CentralMasking",
    "GridMasking",
    "InverseBlockMasking",
    "Mask",
    "Masking",
    "MixtureMasking",
    "RandomMasking",
    "SquareMasking",
    "UnitMasking",
    "average_distance",
]
