"""The space of SimMIM's study: axes like the paper's tables, a row for each run.

- [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 4.1)
- [1]: MAE, 2021, https://arxiv.org/abs/2111.06377 (table 1, figure 6)

Beside some rows stands the number that their paper has for the same choice: ImageNet-1K
top-1 in %, "fine-tuned" in [0] (Swin-B, 192 pixels, 100 epochs), "fine-tuned / linear
probe" in [1] (ViT-L, 224 pixels, 800 epochs; with raw pixels as the target unless the
row says otherwise). Numbers that nobody here has looked up in a paper, its code or a
copy of it are left out.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from lightly_mim.encoders import masked_encoder
from lightly_mim.heads import MLPHead, TransformerHead
from lightly_mim.losses import L2, SmoothL1
from lightly_mim.masking import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    MixtureMasking,
    RandomMasking,
    SquareMasking,
)
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
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
from simmim_paper.forms import Form

RATIO = 0.6  # [0], section 4.1.1
UNITS = (4, 8, 16, 32, 64)  # of masking, in pixels; [0], table 1

# The two rows that every other one differs from in one thing.
DEFAULT, MAE_DEFAULT = "default", "mae"


class Row(NamedTuple):
    """A row of a table: a pretraining run.

    Attributes:
        name:
            Names the run, its directory and its task in a sweep.
        shown:
            What the table calls it.
        method:
            The method.
        arguments:
            What it is made with.
        paper:
            What the paper has for it, see above. Empty for nothing.
    """

    name: str
    shown: str
    method: type[MaskedImageModel]
    arguments: Mapping[str, Any]
    paper: str = ""

    @property
    def build(self) -> partial[MaskedImageModel]:
        """What makes the method."""
        return partial(self.method, **self.arguments)


@dataclass(frozen=True)
class Space:
    """The rows, for one encoder and one size of images.

    Attributes:
        form:
            What depends on the size of both.
        arguments:
            Arguments of every method: the encoder's.
        patch:
            Side of the encoder's patches in pixels.
        cell:
            Side of the cell that a token stands for.
        side:
            Side of the images.
        drops_tokens:
            Whether the encoder takes visible patches alone, as MAE asks of it.
    """

    form: Form
    arguments: Mapping[str, Any]
    patch: int
    cell: int
    side: int
    drops_tokens: bool

    @classmethod
    def of(cls, form: Form, arguments: Mapping[str, Any]) -> Space:
        """Measures the encoder.

        Args:
            form:
                The form.
            arguments:
                Arguments of a method: `encoder`, `img_size`, `in_chans` and options of
                the encoder.

        Raises:
            ValueError: If there is no such encoder, or if it is not made for squares.
        """
        patch, cell, side, drops_tokens = _measure(json.dumps(dict(arguments)))
        for name, (height, width) in (("images", side), ("patches", patch)):
            if height != width:
                raise ValueError(
                    f"The study is one of squares, and the encoder's {name} have "
                    f"{height} x {width} pixels: choose another --encoder."
                )
        return cls(form, arguments, patch[0], cell[0], side[0], drops_tokens)

    @property
    def unit(self) -> int:
        """Side in pixels of what is masked as a whole: 2 patches of a ViT, as in [0].

        The patches of a Swin have 4 pixels: it is the cell of 32 there, as in [0], too.
        """
        return max(2 * self.patch, self.cell)

    @property
    def fine(self) -> int:
        """Side in pixels of what rectangles are made of: a patch of a ViT."""
        return self.unit // 2

    def simmim(self, name: str, shown: str, paper: str = "", **parts: Any) -> Row:
        """Returns a row of SimMIM which has some parts of its own."""
        usual = {
            "masking": RandomMasking(self.unit, RATIO),
            "target": self.form.target,
            "init": "timm",
        }
        return Row(name, shown, SimMIM, {**self.arguments, **usual, **parts}, paper)

    def mae(self, name: str, shown: str, paper: str = "", **parts: Any) -> Row:
        """Returns a row of MAE which has some parts of its own."""
        usual = {
            "masking": RandomMasking(self.patch, 0.75),
            "target": PatchNormalizedPixels(),
            **self.form.decoder,
        }
        arguments = {**self.arguments, **usual, **parts}
        return Row(name, f"MAE: {shown}", MAE, arguments, paper)

    def axis(self, name: str) -> list[Row]:
        """Returns the rows of an axis, in the order of its table.

        Args:
            name:
                One of `AXES`.
        """
        rows = AXES[name].rows(self)
        return [row for row in rows if self.drops_tokens or row.method is not MAE]

    def rows(self) -> dict[str, Row]:
        """Returns the rows of all axes by name, each one once."""
        found: dict[str, Row] = {}
        for axis in AXES:
            for row in self.axis(axis):
                found.setdefault(row.name, row)
        return found

    def notes(self, axis: str) -> list[str]:
        """Returns what an axis leaves out with this encoder, and why.

        Args:
            axis:
                One of `AXES`.
        """
        notes = []
        if axis == "unit":
            refusals = {unit: self.refuses_unit(unit) for unit in UNITS}
            notes += [
                f"Units of {unit} pixels are left out: {reason}."
                for unit, reason in refusals.items()
                if reason
            ]
        with_mae = any(row.method is MAE for row in AXES[axis].rows(self))
        if with_mae and not self.drops_tokens:
            notes.append("MAE is left out: its encoder takes visible patches alone.")
        return notes

    def units(self) -> list[int]:
        """Returns the units that are possible: those of [0], and 1, 2 and 4 patches."""
        units = {*UNITS, self.patch, 2 * self.patch, 4 * self.patch, self.unit}
        return [unit for unit in sorted(units) if not self.refuses_unit(unit)]

    def refuses_unit(self, unit: int, ratio: float = RATIO) -> str:
        """Returns why a unit of masking is not possible; empty if it is."""
        if unit % self.patch:
            return f"the encoder's patches have {self.patch}"
        if self.side % unit:
            return f"they do not tile images of {self.side}"
        try:
            RandomMasking(unit, ratio).count(self.side // unit, self.side // unit)
        except ValueError:
            return f"a ratio of {ratio} masks all of them"
        return ""


@functools.cache
def _measure(
    arguments: str,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    """Returns an encoder's patch size, stride, image size and if it drops tokens."""
    options = json.loads(arguments)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are copied nowhere
        encoder = masked_encoder(options.pop("encoder"), **options)
    size = (encoder.img_size[0], encoder.img_size[1])
    return encoder.patch_size, encoder.stride, size, encoder.can_drop_tokens


# The axes.


def _masking(s: Space) -> Iterator[Row]:
    random, block, square = (
        masking(s.fine, RATIO)
        for masking in (RandomMasking, BlockMasking, SquareMasking)
    )
    yield s.simmim(DEFAULT, "random", "82.8")
    for name, shown, masking in (
        ("block", "block-wise", block),
        ("square", "square", square),
        ("central", "central square", CentralMasking(s.fine, RATIO)),
        ("inverse-block", "inverse block", InverseBlockMasking(s.fine, RATIO)),
        ("grid", "grid", GridMasking(s.fine)),
        (
            "mixture",
            f"a third each: random {s.fine} px, block-wise, square",
            MixtureMasking([random, block, square]),
        ),
    ):
        yield s.simmim(f"masking-{name}", shown, masking=masking)
    yield s.mae(MAE_DEFAULT, "random", "84.9 / 73.5")
    for name, shown, masking, paper in (
        ("block-50", "block-wise", BlockMasking(s.patch, 0.5), "83.9 / 72.3"),
        ("block-75", "block-wise", BlockMasking(s.patch, 0.75), "82.8 / 63.9"),
        ("grid", "grid", GridMasking(s.patch), "84.0 / 66.0"),
    ):
        yield s.mae(f"mae-{name}", shown, paper, masking=masking)


def _ratio(s: Space) -> Iterator[Row]:
    for percent in range(10, 100, 10):
        ratio = percent / 100
        if ratio == RATIO:
            yield s.simmim(DEFAULT, f"{ratio}", "82.8")
        else:
            masking = RandomMasking(s.unit, ratio)
            yield s.simmim(f"ratio-{percent}", f"{ratio}", masking=masking)


def _unit(s: Space) -> Iterator[Row]:
    for unit in s.units():
        patches = unit // s.patch
        shown = f"{unit} px, {patches} x {patches} patch{'es' if patches > 1 else ''}"
        if unit == s.unit:
            yield s.simmim(DEFAULT, shown, "82.8")
            continue
        masking = RandomMasking(unit, RATIO)
        yield s.simmim(f"unit-{patches}", shown, masking=masking)
        # What [0] says that small units need.
        if unit < s.unit:
            masking = RandomMasking(unit, 0.8)
            yield s.simmim(f"unit-{patches}-ratio-80", shown, masking=masking)


def _head(s: Space) -> Iterator[Row]:
    yield s.simmim(DEFAULT, "linear", "82.8")
    yield s.simmim("head-mlp", "two-layer MLP", head=MLPHead())
    yield from _transformers(s)
    for name, head in zip(("small", "large"), s.form.inverse_swins, strict=True):
        shown = f"inverse Swin, {name}: depths {head.depths}, width {head.embed_dim}"
        yield s.simmim(f"head-inverse-swin-{name}", shown, head=head)


def _transformers(s: Space) -> Iterator[Row]:
    for depth in (1, 2, 4):
        shown = f"transformer, {depth} block{'s' if depth > 1 else ''}"
        yield s.simmim(f"head-transformer-{depth}", shown, head=TransformerHead(depth))


def _targets(s: Space) -> Iterator[tuple[str, str, Target]]:
    f = s.form.blocks
    averaged = f" of {f} x {f} px" if f > 1 else ""
    # As many colours as 8 levels of each channel make: 512 of RGB.
    colours = 8 ** s.arguments.get("in_chans", 3)
    window, size = s.form.window, s.cell // 2
    gradients = s.form.gradients
    yield "pixels", "pixels", Pixels()
    yield "patch-normalized", "pixels, patch-normalised", PatchNormalizedPixels()
    yield (
        "locally-normalized",
        f"pixels, normalised in {window} x {window}",
        LocallyNormalizedPixels(window),
    )
    yield "bins-8", f"8 bins{averaged}", ColorBins(8, f)
    yield "bins-256", f"256 bins{averaged}", ColorBins(256, f)
    yield "clusters", f"{colours} clusters{averaged}", ColorClusters(colours, f)
    yield "hog", f"HOG of {gradients} x {gradients} px", HOG(9, gradients)
    yield (
        "low-frequencies",
        f"lowest {size} x {size} frequencies",
        LowFrequencies(size),
    )


def _target(s: Space) -> Iterator[Row]:
    for name, shown, target in _targets(s):
        paper = "82.8" if name == "pixels" else ""
        own = repr(target) != repr(s.form.target)
        row = f"target-{name}" if own else DEFAULT
        yield s.simmim(row, shown, paper, target=target)
    for name, shown, target in _targets(s):
        papers = {"pixels": "84.9 / 73.5", "patch-normalized": "85.4 / 73.9"}
        row = MAE_DEFAULT if name == "patch-normalized" else f"mae-{name}"
        yield s.mae(row, shown, papers.get(name, ""), target=target)


def _resolution(s: Space) -> Iterator[Row]:
    shown = f"1/1, {s.cell} x {s.cell} values of a cell"
    row = DEFAULT if isinstance(s.form.target, Pixels) else "target-pixels"
    yield s.simmim(row, shown, "82.8", target=Pixels())
    factor = 2
    while s.cell % factor == 0:
        n = s.cell // factor
        shown = f"1/{factor}, {n} x {n}"
        yield s.simmim(f"resolution-{factor}", shown, target=Pixels(factor))
        factor *= 2


def _loss(s: Space) -> Iterator[Row]:
    yield s.simmim(DEFAULT, "L1", "82.8")
    yield s.simmim("loss-l2", "L2", loss=L2())
    for beta in (1.0, 0.1):
        shown = f"smooth L1, beta {beta}"
        yield s.simmim(f"loss-smooth-l1-{beta}", shown, loss=SmoothL1(beta))


def _region(s: Space) -> Iterator[Row]:
    yield s.simmim(DEFAULT, "masked pixels", "82.8")
    yield s.simmim("region-all", "all pixels", "81.7", region="all")
    yield s.simmim("region-visible", "visible pixels", region="visible")


def _decoder(s: Space) -> Iterator[Row]:
    yield s.simmim(DEFAULT, "linear, 0 blocks", "82.8")
    yield from _transformers(s)
    for depth, paper in (
        (1, "84.8 / 65.5"),
        (2, "84.9 / 70.0"),
        (4, "84.9 / 71.9"),
        (8, "84.9 / 73.5"),
    ):
        own = depth != s.form.decoder["decoder_depth"]
        row = f"mae-decoder-{depth}" if own else MAE_DEFAULT
        shown = f"decoder of {depth} block{'s' if depth > 1 else ''}"
        yield s.mae(row, shown, paper, decoder_depth=depth)


class Axis(NamedTuple):
    """An axis of the space.

    Attributes:
        title:
            What stands above its table.
        rows:
            Returns its rows.
    """

    title: str
    rows: Callable[[Space], Iterator[Row]]


AXES = {
    "masking": Axis("Masking strategy", _masking),
    "ratio": Axis("Masking ratio, random", _ratio),
    "unit": Axis("Masked unit, random", _unit),
    "head": Axis("Prediction head", _head),
    "target": Axis("Prediction target", _target),
    "resolution": Axis("Resolution of the pixels that are predicted", _resolution),
    "loss": Axis("Loss", _loss),
    "region": Axis("Where the loss is taken", _region),
    "decoder": Axis("Depth of the decoder", _decoder),
}
