"""What to predict."""

from lightly_mim.targets.base import Target
from lightly_mim.targets.bins import ColorBins
from lightly_mim.targets.clusters import ColorClusters
from lightly_mim.targets.frequencies import LowFrequencies
from lightly_mim.targets.hog import HOG
from lightly_mim.targets.learned import LearnedTarget
from lightly_mim.targets.pixels import (
    LocallyNormalizedPixels,
    PatchNormalizedPixels,
    Pixels,
    PixelTarget,
)

__all__ = [
    "HOG",
    "ColorBins",
    "ColorClusters",
    "LearnedTarget",
    "LocallyNormalizedPixels",
    "LowFrequencies",
    "PatchNormalizedPixels",
    "PixelTarget",
    "Pixels",
    "Target",
]
