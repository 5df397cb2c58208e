"""Every exported part in every method, and parts of a user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from lightly_mim import cli, heads, losses, masking, targets
from lightly_mim.heads import (
    Head,
    InverseSwinHead,
    LinearHead,
    TransformerHead,
)
from lightly_mim.losses import L1, CrossEntropy, Loss
from lightly_mim.masking import (
    BlockMasking,
    Mask,
    Masking,
    RandomMasking,
)
from lightly_mim.methods import MAE, CrossMAE, MaskedImageModel, MaskTokenMAE, SimMIM
from lightly_mim.patches import gather_patches
from lightly_mim.pretraining import pretrain
from lightly_mim.targets import (
    HOG,
    ColorBins,
    LowFrequencies,
    Pixels,
    Target,
)

from .parts import HEADS, LOSSES, MASKINGS, NOT_DRAWABLE, TARGETS

VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 64,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}
DECODER: dict[str, Any] = {
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
}
SWIN: dict[str, Any] = {
    "encoder": "swin_tiny_patch4_window7_224",
    "img_size": 64,
    "window_size": 2,
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
}

# By what is tried: the method, its options, and the unit of its masks.
METHODS: dict[str, tuple[type[MaskedImageModel], dict[str, Any], int]] = {
    "SimMIM": (SimMIM, VIT, 16),
    "SimMIM, Swin": (SimMIM, {**SWIN, "img_size": (64, 128)}, 32),
    # Masks finer than a cell, so that cells are masked in part.
    "SimMIM, Swin, parts of cells": (SimMIM, SWIN, 16),
    "MAE": (MAE, {**VIT, **DECODER}, 16),
    "CrossMAE": (CrossMAE, {**VIT, **DECODER}, 16),
    "MaskTokenMAE": (MaskTokenMAE, {**VIT, **DECODER}, 16),
}
SIMMIM = [name for name in METHODS if name.startswith("SimMIM")]


def build(name: str, **parts: Any) -> Any:
    method, options, unit = METHODS[name]
    torch.manual_seed(0)
    return method(**options, **{"masking": RandomMasking(unit, 0.5), **parts})


def images(model: MaskedImageModel, batch_size: int = 3) -> Tensor:
    """Blots of colour, so that neighbours are alike, and some noise."""
    generator = torch.Generator().manual_seed(0)
    (height, width), channels = model.encoder.img_size, model.encoder.in_chans
    shape = (batch_size, channels, height // 8, width // 8)
    blots = torch.randn(shape, generator=generator)
    blots = functional.interpolate(blots, scale_factor=8, mode="bicubic")
    return blots + 0.1 * torch.randn(blots.shape, generator=generator)


def output_grid(model: MaskedImageModel) -> tuple[int, int]:
    (height, width), (p, q) = model.encoder.img_size, model.encoder.stride
    return height // p, width // q


def check_training(model: MaskedImageModel) -> None:
    """Takes a step, which reaches every parameter and makes the loss smaller."""
    pixels = images(model)
    model.fit_target(lambda: pixels)
    mask = model.draw_mask(pixels, Generator().manual_seed(0))
    output = model(pixels, mask)
    width = model.target.width(model.encoder.stride, model.encoder.in_chans)
    assert output.target.shape == (*output.index.shape, width)
    num_values = width * (model.target.num_classes or 1)
    assert output.prediction.shape == (*output.index.shape, num_values)
    assert output.loss.isfinite()
    if output.weight is not None:
        assert output.weight.shape == output.target.shape
        assert 0 <= output.weight.min() < output.weight.max() <= 1
    # Cells that are masked in part have weights, and whole ones need none.
    region = getattr(model, "region", "masked")
    whole = mask.fits(output_grid(model))
    assert (output.weight is None) == (region == "all" or whole)
    output.loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    norm = torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm()
    assert norm.isfinite()
    assert norm > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad / norm)
    assert model(pixels, mask).loss < output.loss


def check_picture(model: MaskedImageModel, drawable: bool) -> None:
    pixels = images(model)
    mask = model.draw_mask(pixels)
    if not drawable:
        name = type(model.target).__name__
        with pytest.raises(ValueError, match=f"{name} does not say what a patch looks"):
            model.reconstruct(pixels, mask)
        return
    picture = model.reconstruct(pixels, mask)
    assert picture.shape == pixels.shape
    assert picture.dtype == pixels.dtype
    assert picture.isfinite().all()
    masked = mask.pixels(model.encoder.img_size).expand_as(pixels)
    assert torch.equal(picture[~masked], pixels[~masked])
    assert (picture != pixels)[masked].float().mean() > 0.99


def test_every_exported_part_is_tried_here() -> None:
    for module, base, tried in (
        (masking, Masking, MASKINGS),
        (heads, Head, HEADS),
        (losses, Loss, LOSSES),
        (targets, Target, TARGETS),
    ):
        assert {name.split(",")[0] for name in tried} == exported(module, base)


def exported(module: ModuleType, base: type) -> set[str]:
    """Returns the names of the classes of a kind that a user can make."""
    names = getattr(module, "__all__", vars(module))
    return {
        name
        for name in names
        if not name.startswith("_")
        and inspect.isclass(part := getattr(module, name))
        and issubclass(part, base)
        and not inspect.isabstract(part)
    }


@pytest.mark.parametrize("part", MASKINGS)
@pytest.mark.parametrize("name", METHODS)
def test_masking(name: str, part: str) -> None:
    model = build(name, masking=MASKINGS[part](METHODS[name][2]))
    model.check_masking()
    check_training(model.eval())  # CrossMAE's share is drawn anew in training
    check_picture(model, drawable=True)


@pytest.mark.parametrize("part", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_target(name: str, part: str) -> None:
    model = build(name, target=TARGETS[part]()).eval()
    check_training(model)
    check_picture(model, drawable=part not in NOT_DRAWABLE)
    assert model.train()(images(model)).loss.isfinite()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("part", HEADS)
@pytest.mark.parametrize("name", SIMMIM)
def test_head(name: str, part: str, target: str) -> None:
    model = build(name, head=HEADS[part], target=TARGETS[target]())
    check_training(model)


@pytest.mark.parametrize("part", LOSSES)
@pytest.mark.parametrize("name", METHODS)
def test_loss(name: str, part: str) -> None:
    target = ColorBins(4, factor=4) if LOSSES[part].for_classes else Pixels(factor=4)
    model = build(name, loss=LOSSES[part], target=target).eval()
    assert model.loss is LOSSES[part]
    check_training(model)


@pytest.mark.parametrize("region", ["masked", "all", "visible"])
@pytest.mark.parametrize("target", ["ColorBins, coarse", "HOG"])
@pytest.mark.parametrize("name", SIMMIM)
def test_region(name: str, target: str, region: str) -> None:
    check_training(build(name, target=TARGETS[target](), region=region))


@pytest.mark.parametrize("part", [part for part in TARGETS if part not in NOT_DRAWABLE])
@pytest.mark.parametrize("name", ["SimMIM", "SimMIM, Swin", "MAE"])
def test_reconstruct__draws_a_perfect_prediction(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, target=TARGETS[part]()).eval()
    pixels = images(model)
    model.fit_target(lambda: pixels)
    mask = model.draw_mask(pixels)
    output = model(pixels, mask)
    perfect = output.target
    if model.target.num_classes is not None:
        perfect = functional.one_hot(perfect, model.target.num_classes).flatten(2)
    output = output._replace(prediction=perfect.float())
    monkeypatch.setattr(model, "forward", lambda *_: output)
    picture = model.reconstruct(pixels, mask)
    # Of the picture the target is the same, up to what float32 resolves.
    again = model.target(picture, output.index, model.encoder.stride)
    torch.testing.assert_close(again, output.target, rtol=1e-3, atol=1e-3)
    if part in ("Pixels", "PatchNormalizedPixels", "LocallyNormalizedPixels"):
        torch.testing.assert_close(picture, pixels, rtol=1e-4, atol=1e-4)
    else:
        masked = mask.pixels(model.encoder.img_size).expand_as(pixels)
        assert (picture != pixels)[masked].float().mean() > 0.9


# Parts of a user's own: anything with the call.


def checkers(
    batch_size: int,
    image_size: tuple[int, int],
    device: torch.device | str | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A checkerboard of 16 pixels, black or white first."""
    rows = torch.arange(image_size[0] // 16, device=device)[:, None]
    columns = torch.arange(image_size[1] // 16, device=device)
    first = torch.randint(2, (batch_size, 1, 1), device=device, generator=generator)
    return (rows + columns + first) % 2 == 0


class Contrast:
    """The darkest and the brightest value of a cell."""

    num_classes = None

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        return 2

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        cells = gather_patches(images, index, cell_size)
        return torch.stack([cells.amin(dim=-1), cells.amax(dim=-1)], dim=-1)


class TanhHead(nn.Module):
    def __init__(self, embed_dim: int, num_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, num_values)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], index: Tensor | None = None
    ) -> Tensor:
        rows = torch.arange(len(tokens))[:, None]
        values: Tensor = self.linear(
            tokens.tanh() if index is None else tokens[rows, index]
        )
        return values


def tanh_head(
    embed_dim: int,
    num_values: int,
    cell_size: tuple[int, int],
    grid: tuple[int, int],
    per_pixel: bool,
) -> nn.Module:
    assert (embed_dim, cell_size, grid) == (32, (16, 16), (4, 4))
    return TanhHead(embed_dim, num_values)


def cubes(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    losses = (prediction - target).abs() ** 3
    return losses.mean() if reduction == "mean" else losses


@pytest.mark.parametrize("name", ["SimMIM", "MAE", "CrossMAE", "MaskTokenMAE"])
def test_own_parts(name: str) -> None:
    parts: dict[str, Any] = {"masking": checkers, "target": Contrast(), "loss": cubes}
    if name == "SimMIM":
        parts["head"] = tanh_head
    model = build(name, **parts).eval()
    assert model.masking is checkers
    model.check_masking()
    check_training(model)

    pixels = images(model)
    mask = model.draw_mask(pixels, Generator().manual_seed(5))
    assert isinstance(mask, Mask)
    assert mask.count == 8
    expected = checkers(3, (64, 64), generator=Generator().manual_seed(5))
    assert torch.equal(mask.cells, expected)
    output = model(pixels, expected)
    total, count = 0.0, 0
    for b in range(3):
        for k, cell in enumerate(output.index[b].tolist()):
            y, x = cell // 4 * 16, cell % 4 * 16
            assert expected[b, cell // 4, cell % 4]
            patch = pixels[b, :, y : y + 16, x : x + 16]
            for value, wanted in zip(
                output.prediction[b, k].tolist(),
                (patch.min().item(), patch.max().item()),
                strict=True,
            ):
                total += abs(value - wanted) ** 3
                count += 1
    assert count == 3 * 8 * 2
    torch.testing.assert_close(output.loss, torch.tensor(total / count))


class Means(Target):
    """The mean of a cell, which is not drawn; the weights are the base class's."""

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        return 1

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        return gather_patches(images, index, cell_size).mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", METHODS)
def test_own_target__counts_cells_by_their_share(name: str) -> None:
    model = build(name, target=Means()).eval()
    check_training(model)
    check_picture(model, drawable=False)


@pytest.mark.parametrize("target", [Contrast(), Means(), HOG()])
def test_own_parts__pretrain_goes_on_without_pictures(
    target: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: dict[str, Any] = {"masking": checkers, "target": target, "loss": cubes}
    trained = pretrain(
        tmp_path / "run",
        photos,
        lambda: SimMIM(**VIT | {"img_size": 32} | parts),
        epochs=1,
        batch_size=8,
        precision="32-true",
        accelerator="cpu",
        devices=1,
        num_workers=0,
        tensorboard=False,
        reconstruct_every=1,
        report=False,  # whose curves are pictures, too
    )
    assert trained.target is target
    assert (tmp_path / "run" / "finished.json").exists()
    assert not list((tmp_path / "run").rglob("*.png"))
    said = f"No pictures of reconstructions: {type(target).__name__} does not say"
    assert said in capsys.readouterr().out


# Bad input: one message that says what to do, in Python and on the command line.

COMMAND = [
    *("pretrain", "--out", "nowhere", "--data", "nothing"),
    *("--accelerator", "cpu", "--devices", "1"),
]


def words(options: dict[str, Any]) -> list[str]:
    """Says the options of a method as on the command line."""
    return [
        word
        for name, value in options.items()
        for word in (f"--method.{name}", str(value).replace(" ", ""))
    ]


MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "blocks larger than a cell": (
        lambda: {"target": Pixels(factor=32)},
        "target Pixels target.factor 32",
        "cell of 16 x 16 pixels does not divide into blocks of 32 x 32.*choose",
    ),
    "blocks that do not tile a cell": (
        lambda: {"target": HOG(pixels_per_cell=5)},
        "target HOG target.pixels_per_cell 5",
        r"16 x 16.*5 x 5 \(pixels_per_cell=5\): choose a pixels_per_cell that divides",
    ),
    "more frequencies than pixels": (
        lambda: {"target": LowFrequencies(17)},
        "target LowFrequencies target.size 17",
        "no 17 x 17 frequencies: choose a size of at most 16",
    ),
    "classes and L1": (
        lambda: {"target": ColorBins(), "loss": L1()},
        "target ColorBins loss L1",
        r"target is classes, which need CrossEntropy\(\), got the loss L1\(\)",
    ),
    "numbers and cross-entropy": (
        lambda: {"target": HOG(), "loss": CrossEntropy()},
        "target HOG loss CrossEntropy",
        r"target is numbers.*got the loss CrossEntropy\(\)",
    ),
    "a unit that does not divide the patch": (
        lambda: {"masking": RandomMasking(8, 0.5)},
        "masking RandomMasking masking.mask_patch_size 8",
        "mask_patch_size.* is a multiple of",
    ),
    "a unit that does not divide the image": (
        lambda: {"masking": BlockMasking(48, 0.5)},
        "masking BlockMasking masking.mask_patch_size 48",
        "image of 64 x 64 pixels does not divide into mask_patch_size 48 x 48. Resize",
    ),
    "a ratio that leaves nothing visible": (
        lambda: {"masking": RandomMasking(16, 0.99)},
        "masking RandomMasking masking.mask_patch_size 16 masking.ratio 0.99",
        "masks 16 of 16.*nothing to predict from. Use larger images",
    ),
    "a ratio out of range": (
        lambda: {"masking": RandomMasking(16, 1.5)},
        "masking RandomMasking masking.ratio 1.5",
        "strictly between 0 and 1, got ratio=1.5",
    ),
    "a masking and its short form": (
        lambda: {"masking": BlockMasking(), "mask_ratio": 0.5},
        "masking BlockMasking mask_ratio 0.5",
        "mask_ratio are short for .*masking.RandomMasking.*and BlockMasking",
    ),
    "a masking and the size of its short form": (
        lambda: {"masking": BlockMasking(), "mask_patch_size": 16},
        "masking BlockMasking mask_patch_size 16",
        "mask_ratio are short for .*masking.RandomMasking.*and BlockMasking",
    ),
}
HEAD_MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "heads that do not divide the encoder's width": (
        lambda: {"head": TransformerHead(num_heads=5)},
        "head TransformerHead head.num_heads 5",
        "got 5 heads for a width of 32. Leave num_heads out",
    ),
    "heads that do not divide their own width": (
        lambda: {"head": TransformerHead(embed_dim=30, num_heads=4)},
        "head TransformerHead head.embed_dim 30 head.num_heads 4",
        "got 4 heads for a width of 30",
    ),
    "a cell that does not halve as often": (
        lambda: {"head": InverseSwinHead(depths=(1,) * 6)},
        "head InverseSwinHead head.depths [1,1,1,1,1,1]",
        "6 stages halve the sides of a cell 5 times.*Give fewer depths",
    ),
}


@pytest.mark.parametrize(
    ("name", "misfit"),
    [
        *((name, misfit) for name in ("SimMIM", "MAE") for misfit in MISFITS),
        *(("SimMIM", misfit) for misfit in HEAD_MISFITS),
    ],
)
def test_misfits(name: str, misfit: str) -> None:
    parts, said, message = (MISFITS | HEAD_MISFITS)[misfit]
    method, options, _ = METHODS[name]
    with pytest.raises(ValueError, match=message):
        method(**options, **parts()).check_masking()
    spoken = [f"--method.{w}" if i % 2 == 0 else w for i, w in enumerate(said.split())]
    command = [*COMMAND, "--method", name, *words(options), *spoken]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cli.check(command)


@pytest.mark.parametrize("how", ["class", "word"])
@pytest.mark.parametrize(
    ("part", "cls"),
    [
        ("masking", BlockMasking),
        ("target", Pixels),
        ("head", LinearHead),
        ("loss", L1),
    ],
)
def test_parts__are_objects(part: str, cls: type, how: str) -> None:
    for name in ("SimMIM", "MAE"):
        if (name, part) == ("MAE", "head"):
            continue
        method, options, _ = METHODS[name]
        given: Any = cls if how == "class" else cls.__name__
        with pytest.raises(ValueError, match=f"{part} of .*got .*{cls.__name__}"):
            method(**options, **{part: given})
        if how == "word":
            command = [*COMMAND, "--method", name, *words(options)]
            with pytest.raises(ValueError, match=f"no {part} 'no_such_part'"):
                cli.check([*command, f"--method.{part}", "no_such_part"])


def test_own_parts__say_what_is_missing() -> None:
    def no_target(images: Tensor, index: Tensor, cell_size: tuple[int, int]) -> Tensor:
        return gather_patches(images, index, cell_size)

    parts: dict[str, Any] = {"target": no_target}
    with pytest.raises(ValueError, match="width and num_classes.*no_target"):
        SimMIM(**VIT, **parts)
    parts = {"head": nn.Linear(32, 768)}
    with pytest.raises(ValueError, match="A head is built by the method.*Linear"):
        SimMIM(**VIT, **parts)
    parts = {"head": lambda *sizes: TanhHead(32, 700)}
    model = SimMIM(**VIT, **parts, mask_patch_size=32)
    with pytest.raises(ValueError, match=r"\(3, 12, 700\).*has \(3, 12, 768\): build"):
        model(images(model))
    with pytest.raises(ValueError, match="ColorBins.*has not seen any images"):
        SimMIM(**VIT, target=ColorBins())(images(model))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda n: torch.zeros(n, 4, 4), "bool tensor.*got torch.float32"),
        (lambda n: torch.zeros(n, 4, 4).bool(), "got 0 of 16 cells masked"),
        (lambda n: torch.ones(n, 4, 4).bool(), "got 16 of 16 cells masked"),
        (lambda n: torch.eye(4).bool()[None], "3 images and 1 masks"),
        (lambda n: torch.eye(3).bool().expand(n, 3, 3), "3 x 3 cells"),
        (lambda n: torch.rand(n, 16).argsort(1).bool(), "bool tensor.*shape"),
    ],
)
@pytest.mark.parametrize("name", ["SimMIM", "MAE"])
def test_own_masking__is_checked(
    name: str, masks: Callable[[int], Tensor], message: str
) -> None:
    def own(batch_size: int, image_size: Any, **_: Any) -> Tensor:
        return masks(batch_size)

    model = build(name, masking=own)
    with pytest.raises(ValueError, match=message):
        model(images(model))
