from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lightly_mim
from lightly_mim import cli
from lightly_mim.config import Recorded, constructor_arguments, to_config
from lightly_mim.encoders import masked_encoder
from lightly_mim.heads import InverseSwinHead, LinearHead
from lightly_mim.losses import L1, CrossEntropy, SmoothL1
from lightly_mim.masking import (
    BlockMasking,
    GridMasking,
    MixtureMasking,
    RandomMasking,
)
from lightly_mim.methods import MAE, CrossMAE, MaskedImageModel, MaskTokenMAE, SimMIM
from lightly_mim.targets import HOG, ColorBins, PatchNormalizedPixels, Pixels

from .methods.parts import HEADS, LOSSES, MASKINGS, TARGETS

VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": (64, 32),
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}
DECODER: dict[str, Any] = {
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
}


def always(part: Recorded) -> Callable[[], Recorded]:
    return lambda: part


# Makers, because some parts learn.
PARTS: dict[str, tuple[str, Callable[[], Recorded]]] = {
    **{name: ("masking", partial(make, 16)) for name, make in MASKINGS.items()},
    **{name: ("head", always(head)) for name, head in HEADS.items()},
    **{name: ("loss", always(loss)) for name, loss in LOSSES.items()},
    **{name: ("target", make) for name, make in TARGETS.items()},
}
ROOMS = {
    "masking": "lightly_mim.masking",
    "head": "lightly_mim.heads",
    "loss": "lightly_mim.losses",
    "target": "lightly_mim.targets",
}


def assert_same(value: Any, expected: Any) -> None:
    """Compares recorded arguments, those of parts within parts included."""
    assert type(value) is type(expected)
    if isinstance(expected, Recorded):
        value, expected = value.init_args, expected.init_args
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for name in expected:
            assert_same(value[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_same(one, other)
    else:
        assert value == expected


# What is recorded.


class Recipe(Recorded):
    def __init__(self, flour: int, *, salt: float = 0.5, **spices: Any) -> None:
        super().__init__()


class Cake(Recipe):
    def __init__(self, flour: int, sugar: int = 3, **more: Any) -> None:
        super().__init__(flour, **more)


class Bread(Recipe):
    def __init__(self, yeast: int = 1) -> None:
        super().__init__(500)


def test_recorded__knows_arguments_and_defaults() -> None:
    assert Recipe(2, mint=1).init_args == {"flour": 2, "salt": 0.5, "mint": 1}
    assert Recipe(flour=2, salt=1).init_args == {"flour": 2, "salt": 1}
    assert Cake(2, 4, salt=1).init_args == {"flour": 2, "sugar": 4, "salt": 1}
    # Of the outermost constructor, whatever it passes on.
    assert Bread().init_args == {"yeast": 1}
    assert repr(Cake(2, salt=1)) == "Cake(flour=2, sugar=3, salt=1)"
    first, second = Recipe(1), Recipe(2)
    assert (first.init_args["flour"], second.init_args["flour"]) == (1, 2)


def test_recorded__replaces_what_was_chosen() -> None:
    cake = Cake(2)
    cake.record(sugar=7, salt=1)
    assert cake.init_args == {"flour": 2, "sugar": 7, "salt": 1}
    # A parent's choice is not recorded where it is no argument.
    bread = Bread()
    bread.record(yeast=2, salt=1)
    assert bread.init_args == {"yeast": 2}


@pytest.mark.parametrize(
    ("cls", "args", "options", "message"),
    [
        (Recipe, (), {}, "flour"),
        (Recipe, (1, 2), {}, "Recipe: too many positional arguments"),
        (Bread, (1,), {"water": 2}, "Bread: got an unexpected.*'water'"),
        (LinearHead, (5,), {}, "LinearHead: too many positional arguments"),
        (L1, (2,), {}, "L1: too many positional arguments"),
        (CrossEntropy, (), {"weight": 1}, "CrossEntropy: got an unexpected.*'weight'"),
        (PatchNormalizedPixels, (3,), {}, "PatchNormalizedPixels: too many"),
        (RandomMasking, (16, 0.5, 1), {}, "RandomMasking: too many positional"),
        (SmoothL1, (), {"gamma": 1}, "SmoothL1: got an unexpected.*'gamma'"),
        (ColorBins, (), {"bins": 8}, "ColorBins: got an unexpected.*'bins'"),
        (SimMIM, (), {}, "encoder"),
        (MAE, range(30), {}, "MAE: too many positional arguments"),
    ],
)
def test_recorded__refuses_arguments(
    cls: type[Any], args: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        cls(*args, **options)


def test_constructor_arguments__go_on_where_options_do() -> None:
    assert constructor_arguments(Cake) == ["flour", "sugar", "salt"]
    assert constructor_arguments(Bread) == ["yeast"]
    assert constructor_arguments(LinearHead) == []
    own = ["encoder", "predict_ratio", "weighted_feature_maps"]
    of_mae = constructor_arguments(MAE)
    assert constructor_arguments(CrossMAE)[:3] == own
    assert set(constructor_arguments(CrossMAE)) == {*own, *of_mae}
    assert set(constructor_arguments(MaskTokenMAE)) == set(of_mae)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))]
)
@pytest.mark.parametrize("name", PARTS)
def test_clones__keep_the_arguments(name: str, clone: Callable[[Any], Any]) -> None:
    part = PARTS[name][1]()
    other = clone(part)
    assert other is not part
    assert_same(other, part)
    assert repr(other) == repr(part)


def test_clones__of_methods_keep_their_parts() -> None:
    part = MixtureMasking([GridMasking(16), RandomMasking(16, 0.75)], [1, 3])
    model = SimMIM(**VIT, masking=part, target=ColorBins(4), head=LinearHead())
    model.fit_target(lambda: torch.randn(4, 3, 64, 32))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, model)
        assert isinstance(model.target, ColorBins)
        assert isinstance(other.target, ColorBins)
        # One object in both places, as it was.
        assert other.init_args["target"] is other.target
        assert torch.equal(other.target.low, model.target.low)
        assert other.target.low is not model.target.low


# What config.yaml says.


@dataclasses.dataclass
class Point:
    x: int
    part: Any


def a_function() -> None:
    pass


def test_to_config__is_yaml() -> None:
    value = {
        "path": Path("a") / "b",
        1: (1, 2.5, None, True, "word"),
        "point": Point(3, RandomMasking(32, 0.5)),
        "module": nn.Linear(1, 1),
        "function": a_function,
        "class": Point,
    }
    here = Point.__module__
    expected = {
        "path": "a/b",
        "1": [1, 2.5, None, True, "word"],
        "point": {
            "x": 3,
            "part": {
                "class_path": "lightly_mim.masking.RandomMasking",
                "init_args": {"mask_patch_size": 32, "ratio": 0.5},
            },
        },
        "module": "<torch.nn.modules.linear.Linear>",
        "function": f"<{here}.a_function>",
        "class": f"<{here}.Point>",
    }
    assert to_config(value) == expected
    assert yaml.safe_load(yaml.safe_dump(to_config(value))) == expected


@pytest.mark.parametrize("name", PARTS)
def test_to_config__names_parts_by_their_public_path(name: str) -> None:
    kind, make = PARTS[name]
    part = make()
    config = to_config(part)
    assert config["class_path"] == f"{ROOMS[kind]}.{type(part).__name__}"
    assert config.get("init_args", {}).keys() == part.init_args.keys()
    assert "dict_kwargs" not in config


def test_to_config__names_methods_by_their_public_path() -> None:
    for cls in (SimMIM, MAE, CrossMAE, MaskTokenMAE):
        options = VIT if cls is SimMIM else {**VIT, **DECODER}
        config = to_config(cls(**options))
        public = hasattr(lightly_mim, cls.__name__)
        room = "lightly_mim" if public else "lightly_mim.methods"
        assert config["class_path"] == f"{room}.{cls.__name__}"
        # What is timm's own is told apart.
        timms = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        assert config["dict_kwargs"] == timms
        assert not config["init_args"].keys() & timms.keys()


def test_to_config__says_what_was_chosen_for_a_method() -> None:
    config = to_config(MAE(**VIT, **DECODER, mask_ratio=0.5))["init_args"]
    assert config["masking"] == {
        "class_path": "lightly_mim.masking.RandomMasking",
        "init_args": {"mask_patch_size": [16, 16], "ratio": 0.5},
    }
    assert config["mask_ratio"] is config["mask_patch_size"] is None
    path = "lightly_mim.targets.PatchNormalizedPixels"
    assert config["target"] == {"class_path": path}
    assert config["loss"] == {"class_path": "lightly_mim.losses.L2"}
    classes = to_config(MAE(**VIT, **DECODER, target=ColorBins()))["init_args"]
    assert classes["loss"] == {"class_path": "lightly_mim.losses.CrossEntropy"}
    config = to_config(SimMIM(**VIT))["init_args"]
    assert {name: config[name]["class_path"] for name in ROOMS} == {
        "masking": "lightly_mim.masking.RandomMasking",
        "target": "lightly_mim.targets.LocallyNormalizedPixels",
        "head": "lightly_mim.heads.LinearHead",
        "loss": "lightly_mim.losses.L1",
    }


class HOGMIM(SimMIM):
    """A method that says its target, and little else."""

    def __init__(self, encoder: str, num_orientations: int = 9) -> None:
        options = {name: VIT[name] for name in VIT if name != "encoder"}
        super().__init__(encoder, target=HOG(num_orientations), **options)


def test_to_config__of_a_method_that_chooses_for_itself() -> None:
    model = HOGMIM(VIT["encoder"], 6)
    assert model.init_args == {"encoder": VIT["encoder"], "num_orientations": 6}
    again = HOGMIM(**model.init_args)
    assert to_config(again) == to_config(model)
    assert isinstance(again.target, HOG)
    assert again.target.num_orientations == 6


# And back.

COMMAND = ["pretrain", "--accelerator", "cpu", "--devices", "1"]


def assert_rebuilt(again: MaskedImageModel, model: MaskedImageModel) -> None:
    """Compares the arguments of methods; jsonargparse says some defaults aloud."""
    assert type(again) is type(model)
    assert again.init_args.keys() >= model.init_args.keys()
    classes: tuple[Any, ...] = type(model).__mro__
    defaults = {
        parameter.name: parameter.default
        for function in (masked_encoder, *(cls.__init__ for cls in classes))
        for parameter in inspect.signature(function).parameters.values()
    }
    expected = to_config({**defaults, **model.init_args})
    for name, value in to_config(again.init_args).items():
        if name in model.init_args or name not in CHOSEN:
            assert value == expected[name], name


# Where None stands for what a method chooses.
CHOSEN = ("masking", "target", "loss")


def rebuild(model: MaskedImageModel, directory: Path, *words: str) -> Any:
    """Returns the method that a run with this method's config.yaml builds."""
    config = {"out": "nowhere", "data": "nothing", "method": to_config(model)}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return cli.check([*COMMAND, "--config", str(directory / "config.yaml"), *words])


def test_config__words_win_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("out: nowhere\ndata: nothing\nepochs: 3\nlr: 0.1\n")
    for words in (["--epochs", "7", "--config"], ["--config"]):
        given = cli.read(["pretrain", *words, str(file), "--lr", "2"])
        assert (given["epochs"], given["lr"]) == (7 if "7" in words else 3, 2)
    with pytest.raises(ValueError, match="--config takes one file, got '5' behind it"):
        cli.read(["pretrain", "--lr", "2", "--config", str(file), "5"])


def test_config__of_a_command_with_first_words(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("top: 3\n")
    config = ["--config", str(file)]
    for words in (["m", "i", *config], [*config, "m", "i"], ["m", *config, "i"]):
        given = cli.read(["predict", *words])
        found = [str(given[name]) for name in ("model", "images", "top")]
        assert found == ["m", "i", "3"]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((SimMIM, name) for name in PARTS),
        *((MAE, name) for name in PARTS if name not in HEADS),
    ],
)
def test_config__builds_the_same_parts(
    method: type[MaskedImageModel], name: str, tmp_path: Path
) -> None:
    kind, make = PARTS[name]
    options = VIT if method is SimMIM else {**VIT, **DECODER}
    parts: dict[str, Any] = {"masking": RandomMasking(16, 0.5), kind: make()}
    if name == "CrossEntropy":
        parts["target"] = ColorBins(4)
    model = method(**options, **parts)
    again = rebuild(model, tmp_path)
    assert_rebuilt(again, model)
    for part in parts:
        assert_same(again.init_args[part], model.init_args[part])
    assert type(again.target) is type(model.target)
    assert repr(again.loss) == repr(model.loss)
    assert repr(again.masking) == repr(model.masking)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (SimMIM, {**VIT, "region": "all", "in_chans": 1, "mask_patch_size": 16}),
        (SimMIM, {**VIT, "mask_patch_size": (32, 16), "mask_ratio": 0.3}),
        (MAE, {**VIT, **DECODER, "reg_tokens": 2, "mask_ratio": 0.5}),
        (CrossMAE, {**VIT, **DECODER, "predict_ratio": 0.5}),
        (CrossMAE, {**VIT, **DECODER, "weighted_feature_maps": False}),
        (MaskTokenMAE, {**VIT, **DECODER, "target": Pixels()}),
    ],
)
def test_config__builds_the_same_method(
    method: type[MaskedImageModel], options: dict[str, Any], tmp_path: Path
) -> None:
    model = method(**options)
    again = rebuild(model, tmp_path)
    assert_rebuilt(again, model)
    assert to_config(rebuild(again, tmp_path)) == to_config(again)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {n: t.shape for n, t in again.state_dict().items()} == shapes


WORDS = [
    *("--method.encoder", "vit_tiny_patch16_224", "--method.img_size", "64"),
    *("--method.embed_dim", "32", "--method.depth", "1", "--method.num_heads", "2"),
]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "masking=BlockMasking masking.ratio=0.5",
            {"masking": BlockMasking(ratio=0.5)},
        ),
        (
            "masking=BlockMasking masking.mask_patch_size=[32,16]",
            {"masking": BlockMasking((32, 16))},
        ),
        (
            "masking=MixtureMasking masking.maskings=[BlockMasking,RandomMasking]",
            {"masking": MixtureMasking([BlockMasking(), RandomMasking()])},
        ),
        ("mask_ratio=0.5", {"masking": RandomMasking((16, 16), 0.5)}),
        (
            "target=Pixels target.factor=4 loss=SmoothL1 loss.beta=0.25",
            {"target": Pixels(factor=4), "loss": SmoothL1(0.25)},
        ),
        (
            "target=lightly_mim.targets.ColorBins target.num_bins=16",
            {"target": ColorBins(16), "loss": CrossEntropy()},
        ),
        (
            "head=InverseSwinHead head.size=base head.depths=[1,1] target=HOG",
            {"head": InverseSwinHead("base", depths=(1, 1)), "target": HOG()},
        ),
        ("region=visible", {"region": "visible"}),
    ],
)
def test_words__build_the_same_parts(words: str, expected: dict[str, Any]) -> None:
    said = [f"--method.{word}" for word in words.split()]
    where = ["--out", "nowhere", "--data", "nothing", "--method", "SimMIM"]
    model = cli.check([*COMMAND, *where, *WORDS, *said])
    assert type(model) is SimMIM
    for name, part in expected.items():
        assert_same(model.init_args[name], part)
        if name != "head":  # what is built of it
            assert_same(getattr(model, name), part)


def test_words__find_parts_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts_of_ones_own.py").write_text(
        "import torch\n"
        "from lightly_mim.masking import Masking\n"
        "class Stripes(Masking):\n"
        "    def __init__(self, width: int = 16) -> None:\n"
        "        super().__init__()\n"
        "        self.width = width\n"
        "    def __call__(self, batch_size, image_size, device=None, generator=None):\n"
        "        rows = torch.arange(image_size[0] // self.width, device=device) % 2\n"
        "        return rows.bool()[None, :, None].expand(batch_size, -1, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    where = ["--out", "nowhere", "--data", "nothing", "--method", "SimMIM"]
    own = ["--method.masking", "parts_of_ones_own.Stripes"]
    command = [*COMMAND, *where, *WORDS, *own]
    model = cli.check([*command, "--method.masking.width", "32"])
    assert model is not None
    assert model.masking.init_args == {"width": 32}
    config = to_config(model.masking)
    assert config["class_path"] == "parts_of_ones_own.Stripes"
    with pytest.raises(ValueError, match=r"masking .* is not of lightly_mim.*--trust"):
        rebuild(model, tmp_path)
    assert_same(rebuild(model, tmp_path, "--trust").masking, model.masking)
    again = rebuild(model, tmp_path, *own)  # the words name it
    assert type(again.masking) is type(model.masking)
    # It is asked whether its masks fit.
    with pytest.raises(ValueError, match="8 x 1 cells cannot be laid over.*4 x 4"):
        cli.check([*command, "--method.masking.width", "8"])
