"""Every part that a user can name, small."""

from __future__ import annotations

from collections.abc import Callable

from lightly_mim.heads import (
    Head,
    InverseSwinHead,
    LinearHead,
    MLPHead,
    TransformerHead,
)
from lightly_mim.losses import L1, L2, CrossEntropy, Loss, SmoothL1
from lightly_mim.masking import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    Masking,
    MixtureMasking,
    RandomMasking,
    SquareMasking,
)
from lightly_mim.targets import (
    HOG,
    ColorBins,
    ColorClusters,
    LocallyNormalizedPixels,
    LowFrequencies,
    PatchNormalizedPixels,
    Pixels,
    Target,
)

# By the name of the class; masking in units of as many pixels.
MASKINGS: dict[str, Callable[[int], Masking]] = {
    "RandomMasking": lambda unit: RandomMasking(unit, 0.5),
    "BlockMasking": lambda unit: BlockMasking(unit, 0.5),
    "CentralMasking": lambda unit: CentralMasking(unit, 0.5),
    "SquareMasking": lambda unit: SquareMasking(unit, 0.5),
    "InverseBlockMasking": lambda unit: InverseBlockMasking(unit, 0.5),
    "GridMasking": lambda unit: GridMasking(unit),
    "MixtureMasking": lambda unit: MixtureMasking(
        [RandomMasking(unit, 0.75), SquareMasking(2 * unit, 0.5)], [1.0, 2.0]
    ),
}
HEADS: dict[str, Head] = {
    "LinearHead": LinearHead(),
    "MLPHead": MLPHead(),
    "TransformerHead": TransformerHead(embed_dim=24, num_heads=3),
    "InverseSwinHead": InverseSwinHead(embed_dim=16, depths=(1, 2), num_heads=(2, 1)),
}
LOSSES: dict[str, Loss] = {
    "L1": L1(),
    "L2": L2(),
    "SmoothL1": SmoothL1(0.5),
    "CrossEntropy": CrossEntropy(),
}
# Some of them learn, so that each test has its own.
TARGETS: dict[str, Callable[[], Target]] = {
    "Pixels": Pixels,
    "Pixels, coarse": lambda: Pixels(factor=8),
    "PatchNormalizedPixels": PatchNormalizedPixels,
    "LocallyNormalizedPixels": lambda: LocallyNormalizedPixels(15),
    "ColorBins": lambda: ColorBins(4),
    "ColorBins, coarse": lambda: ColorBins(16, factor=4),
    "ColorClusters": lambda: ColorClusters(6),
    "ColorClusters, coarse": lambda: ColorClusters(6, factor=4),
    "HOG": HOG,
    "LowFrequencies": lambda: LowFrequencies(3),
}
NOT_DRAWABLE = {"HOG"}
