"""What a run is made of: published where a recipe is named, else chosen and kept."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from lightly_mim import MAE, SimMIM, cli, defaults
from lightly_mim.config import to_config
from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import BlockMasking
from lightly_mim.methods import MaskedImageModel
from lightly_mim.pretraining import check_pretraining, pretrain
from lightly_mim.pretraining.images import PretrainingImages
from lightly_mim.settings import (
    as_published,
    channel_statistics,
    choose_method,
    set_statistics,
    settings_of,
    warn_of_few_steps,
)
from lightly_mim.targets import LocallyNormalizedPixels, Pixels
from lightly_mim.transforms import EvalTransform

from .conftest import SHORT_RUN, TINY_VIT
from .test_pretraining import Interrupt, assert_same, weights

SWIN: dict[str, Any] = {
    "encoder": "swinv2_base_window12_192",
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
}
V2 = "swinv2_base_800ep"


# What a recipe published of the method.


class Mine(SimMIM):
    """A method of somebody else, with SimMIM's recipes."""


@pytest.mark.parametrize("method", [SimMIM, Mine])
def test_as_published__fills_in_what_is_open(method: type[SimMIM]) -> None:
    for recipe, target in (
        (V2, LocallyNormalizedPixels(47)),
        (SimMIM.recipe(V2), LocallyNormalizedPixels(47)),
        ("swin_base_100ep", Pixels()),
    ):
        for build in (
            partial(method, **SWIN),
            partial(method, SWIN["encoder"], **{k: SWIN[k] for k in list(SWIN)[1:]}),
            partial(method, **SWIN, target=None, init=None),
        ):
            model = as_published(build, recipe)()
            assert type(model) is method
            assert to_config(model.target) == to_config(target)
            assert model.init_args["init"] == "simmim"
    model = as_published(
        partial(MAE, "vit_tiny_patch16_224", depth=1), "vit_base_400ep"
    )()
    assert model.init_args["init"] == "mae"


def test_as_published__what_was_said_wins() -> None:
    said: dict[str, Any] = {"target": Pixels(factor=2), "init": "timm"}
    model = as_published(partial(SimMIM, **SWIN, **said), V2)()
    assert to_config(model.target) == to_config(said["target"])
    assert model.init_args["init"] == "timm"
    # By its place, too: encoder, img_size, in_chans, masking, target.
    places = (SWIN["encoder"], None, 3, None, said["target"])
    rest = {name: value for name, value in SWIN.items() if name != "encoder"}
    model = as_published(partial(SimMIM, *places, **rest), V2)()
    assert to_config(model.target) == to_config(said["target"])
    assert model.init_args["init"] == "simmim"


def test_as_published__draws_nothing_for_a_module() -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    for build in (partial(SimMIM, module), partial(SimMIM, encoder=module)):
        published = as_published(build, "swin_base_100ep")
        assert "init" not in published.keywords  # type: ignore[attr-defined]
        assert isinstance(published().target, Pixels)


def test_as_published__a_masking_of_ones_own_wins() -> None:
    encoder = {k: v for k, v in TINY_VIT.items() if k != "mask_patch_size"}
    build = partial(SimMIM, **encoder, masking=BlockMasking(8, 0.5))
    assert isinstance(as_published(build, "swin_base_100ep")().masking, BlockMasking)


def test_as_published__leaves_others_alone() -> None:
    def function(**options: Any) -> SimMIM:
        return SimMIM(**TINY_VIT, **options)

    builds: list[Callable[[], MaskedImageModel]] = [
        lambda: SimMIM(**TINY_VIT),
        partial(function),
        function,
    ]
    for build in builds:
        assert as_published(build, V2) is build
    build = partial(SimMIM, **TINY_VIT)
    assert as_published(build, None) is build
    # Weights that are there are not drawn.
    published = as_published(partial(SimMIM, **SWIN, pretrained=True), V2)
    assert isinstance(published, partial) and "init" not in published.keywords
    assert isinstance(published.keywords["target"], LocallyNormalizedPixels)
    with pytest.raises(ValueError, match="no recipe 'best'"):
        as_published(partial(SimMIM, **TINY_VIT), "best")


@pytest.mark.parametrize(
    ("words", "target", "init"),
    [
        (f"--recipe {V2}", LocallyNormalizedPixels(47), "simmim"),
        ("--recipe swin_base_100ep", Pixels(), "simmim"),
        ("--recipe vit_base_800ep --method.init mae", Pixels(), "mae"),
        (f"--recipe {V2} --method.target Pixels", Pixels(), "simmim"),
        ("", LocallyNormalizedPixels(7), "mae"),
    ],
)
def test_as_published__on_the_command_line(words: str, target: Any, init: str) -> None:
    full = "pretrain --out x --data nowhere --method SimMIM"
    for name, value in TINY_VIT.items():
        full += f" --method.{name} {value}"
    model = cli.check([*full.split(), *words.split()])
    assert model is not None
    assert to_config(model.target) == to_config(target)
    assert model.init_args["init"] == init


# The settings of the optimiser.


def arguments(**given: Any) -> dict[str, Any]:
    names = ("recipe", "epochs", "batch_size", "lr", "warmup_epochs")
    return dict.fromkeys((*names, "weight_decay", "min_scale")) | given


def test_settings_of__are_chosen_or_published_or_the_runs_own() -> None:
    method = SimMIM(**TINY_VIT)
    chosen = settings_of(method, arguments(), num_images=1000)
    assert chosen == defaults.recipe(method.encoder, 1000)
    # Without a recipe the rate is that of the run, whatever the batch.
    for batch_size in (8, 512):
        given = arguments(lr=0.3, batch_size=batch_size)
        own = settings_of(method, given, num_images=1000)
        assert own.lr * own.batch_size / own.lr_batch_size == pytest.approx(0.3)
    # A run that goes on keeps what was chosen, for other images as well.
    assert settings_of(method, arguments(), chosen, num_images=9) == chosen
    longer = settings_of(method, arguments(epochs=2 * chosen.epochs), chosen)
    assert longer.warmup_epochs == pytest.approx(2 * chosen.warmup_epochs)
    published = SimMIM.recipe("swin_base_100ep")
    named = arguments(recipe="swin_base_100ep")
    assert settings_of(method, named, num_images=9) == published
    assert settings_of(method, named, chosen) == published
    again = settings_of(method, named | {"epochs": 10, "lr": 1.0})
    assert again == dataclasses.replace(published.for_epochs(10), lr=1.0)


def test_settings_of__refuses() -> None:
    method = SimMIM(**TINY_VIT)
    with pytest.raises(ValueError, match="no recipe 'best'"):
        settings_of(method, arguments(recipe="best"))
    with pytest.raises(ValueError, match="warm-up of 0 to `epochs`"):
        settings_of(method, arguments(epochs=2, warmup_epochs=3), num_images=9)


# Too few steps.


def test_warn_of_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """100 epochs of 1,281,167 images in batches of 2048 are 62,556 steps."""
    method = SimMIM(**TINY_VIT)
    name = "swin_base_100ep"
    recipe = SimMIM.recipe(name)
    message = (
        "takes 625 steps at a learning rate of up to 0.0008, .* published for 62,556 "
    )
    with pytest.warns(UserWarning, match=message + "steps at up to 0.0008"):
        warn_of_few_steps(method, name, recipe, 625)
    small = dataclasses.replace(recipe, batch_size=8)
    with pytest.warns(UserWarning, match="4 steps at a learning rate of up to 3.1e-06"):
        warn_of_few_steps(method, name, small, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_steps(method, name, recipe, 626)
        warn_of_few_steps(method, None, small, 500)
        assert not capsys.readouterr().out
        warn_of_few_steps(method, None, small, 499)
        warn_of_few_steps(method, small, small, 4)  # of one's own
    few, fewer = capsys.readouterr().out.splitlines()
    assert few.startswith("This run takes 499 steps")
    assert fewer.startswith("This run takes 4 steps")


def test_pretrain__warns_of_few_steps(photos: Path, tmp_path: Path) -> None:
    options = SHORT_RUN | {"epochs": 1, "lr": None}
    build = partial(SimMIM, **TINY_VIT)
    with pytest.warns(UserWarning, match="This run takes 4 steps .* Leave recipe out"):
        model = pretrain(
            tmp_path / "a", photos, build, recipe="swin_base_100ep", **options
        )
    # As published: target, initial weights, ImageNet's statistics.
    assert isinstance(model.target, Pixels)
    assert model.init_args["init"] == "simmim"
    assert model.encoder.mean == (0.485, 0.456, 0.406)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["normalize"] is None
    assert config["recipe"]["lr"] == 2e-4
    # By its directory alone, with what the recipe says of the method.
    assert_same(pretrain(tmp_path / "a", resume=True).state_dict(), model.state_dict())


# The statistics of the images.


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channel_statistics__are_numpys(channels: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(5, channels, 7, 9), dtype=np.uint8)
    images[:, 0] //= 3
    found = channel_statistics(torch.from_numpy(images))
    assert found is not None
    values = images.astype(np.float64) / 255
    for name, expected in (
        ("mean", values.mean(axis=(0, 2, 3))),
        ("std", values.std(axis=(0, 2, 3))),
    ):
        assert all(type(value) is float for value in found[name])
        np.testing.assert_allclose(found[name], expected, atol=5.1e-5)


def test_channel_statistics__of_one_colour() -> None:
    grey = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    assert channel_statistics(grey) == {"mean": [0.2], "std": [0.0039]}  # 1 / 255


def test_set_statistics() -> None:
    encoder = masked_encoder("vit_tiny_patch16_224", depth=1, in_chans=2)
    set_statistics(encoder, {"mean": [0, 0.5], "std": [1, 0.25]})
    assert (encoder.mean, encoder.std) == ((0.0, 0.5), (1.0, 0.25))


BAD: list[Any] = [
    {},
    {"mean": [0.5, 0.5]},
    {"mean": [0.5, 0.5], "std": [0.5]},
    {"mean": [0.5], "std": [0.5]},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"mean": [0.5, 0.5], "std": [0.5, 0.0]},
    {"mean": [0.5, 0.5], "std": [0.5, -0.1]},
    {"mean": [0.5, math.nan], "std": [0.5, 0.5]},
    {"mean": [0.5, 0.5], "std": [0.5, math.inf]},
    {"mean": [0.5, 0.5], "std": [0.5, 0.5], "variance": [1, 1]},
]


@pytest.mark.parametrize("normalize", BAD)
def test_set_statistics__refuses(normalize: Any) -> None:
    encoder = masked_encoder("vit_tiny_patch16_224", depth=1, in_chans=2)
    before = encoder.mean, encoder.std
    message = r"mean and std, 2 number\(s\) each.*above 0, got " + re.escape(
        repr(normalize)
    )
    with pytest.raises(ValueError, match=message):
        set_statistics(encoder, normalize)
    assert (encoder.mean, encoder.std) == before


def plain_statistics(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    transform = EvalTransform(size, normalize=None)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    images = np.stack([transform(Image.open(file)).numpy() for file in files]) / 255
    return images.mean((0, 2, 3)), images.std((0, 2, 3))


# The batch, the rate and the rest are chosen.
CHOSEN = {k: v for k, v in SHORT_RUN.items() if k not in ("lr", "batch_size")}


def begin(out: Path, data: Any, **options: Any) -> MaskedImageModel:
    build = partial(SimMIM, **TINY_VIT)
    return pretrain(out, data, **{"method": build, **CHOSEN, **options})


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    begin(out, photos)
    return out


def config_of(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return config


def test_pretrain__normalises_with_the_images_own_statistics(
    photos: Path, whole: Path
) -> None:
    found = config_of(whole)["normalize"]
    mean, std = plain_statistics(photos / "train", 32)
    np.testing.assert_allclose(found["mean"], mean, atol=5.1e-5)
    np.testing.assert_allclose(found["std"], std, atol=5.1e-5)
    encoder: Any = load_encoder(whole)
    assert (encoder.mean, encoder.std) == (tuple(found["mean"]), tuple(found["std"]))


def test_pretrain__resumed_run_keeps_what_was_chosen(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(InterruptedError):
        last = out / "checkpoints" / "last.ckpt"
        begin(out, photos, callbacks=[Interrupt(1, 2, last)])
    shutil.copytree(photos, moved)
    # A later version chooses otherwise, and does not look at the images again.
    monkeypatch.setattr(defaults, "learning_rate", lambda batch_size: 0.5)
    monkeypatch.setattr(defaults, "images_per_step", lambda num_images: 4)
    monkeypatch.delattr(PretrainingImages, "pixels")
    begin(out, moved, callbacks=[Interrupt(9, 9)], resume=True)
    assert_same(weights(out), weights(whole))
    for name in ("recipe", "normalize"):
        assert config_of(out)[name] == config_of(whole)[name]
    assert config_of(out)["recipe"]["source"] == defaults.SOURCE
    with pytest.raises(ValueError, match="normalize.*in the run"):
        other = {"mean": [0.5] * 3, "std": [0.5] * 3}
        begin(out, moved, callbacks=[Interrupt(9, 9)], resume=True, normalize=other)


def test_pretrain__statistics_of_other_sources(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    short = {"epochs": 1, "batch_size": 8}
    given = {"mean": [0.5] * 3, "std": [0.25] * 3}
    model = begin(tmp_path / "a", photos, normalize=given, **short)
    assert (model.encoder.mean, model.encoder.std) == ((0.5,) * 3, (0.25,) * 3)
    assert config_of(tmp_path / "a")["normalize"] == given
    # Weights that are trained keep theirs: of a run, and of this process.
    flower = photos / "train" / "flower"
    trained: Any = load_encoder(whole)
    for number, method in enumerate((SimMIM(trained, mask_patch_size=8), model)):
        before = method.encoder.mean, method.encoder.std
        begin(tmp_path / f"further{number}", flower, method=method, **short)
        assert (method.encoder.mean, method.encoder.std) == before
    # Floats count as normalised, and views have been transformed.
    floats = [(torch.rand(3, 32, 32), 0) for _ in range(8)]
    views = [([(image * 255).byte()], 0) for image, _ in floats]
    for number, data in enumerate((floats, views)):
        model = begin(tmp_path / f"other{number}", data, **short)
        assert model.encoder.mean == (0.485, 0.456, 0.406)
        assert config_of(tmp_path / f"other{number}")["normalize"] is None


def test_pretrain__refuses_statistics(photos: Path, tmp_path: Path) -> None:
    for number in ({"mean": [0.5]}, {"mean": [0.5] * 3, "std": [0.0] * 3}):
        with pytest.raises(ValueError, match="normalize has mean and std, 3 number"):
            begin(tmp_path / "a", photos, normalize=number)
    assert not (tmp_path / "a").exists()


# Nothing but a folder.


def pictures(folder: Path, mode: str, count: int = 24, size: int = 32) -> Path:
    """PNGs whose brightness and stripes differ."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    shape = (size, size) if mode == "L" else (size, size, 3)
    for number in range(count):
        pixels = generator.integers(40, size=shape) + 8 * number
        pixels[:: 2 + number % 3] //= 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pretrain__data_alone_is_enough(
    mode: str,
    channels: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(defaults, "passes", lambda num_images: 2)
    # On a GPU other settings are chosen; Lightning counts them.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    data = pictures(tmp_path / "data", mode)
    cli.main(["pretrain", "--data", str(data), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "MAE, vit_tiny_patch16_224 at 32 x 32 pixels in patches of 4 x 4" in said
    assert "where not said chosen by lightly_mim.defaults" in said
    config = config_of(tmp_path / "run")
    assert config["method"]["init_args"]["in_chans"] == channels
    assert len(config["normalize"]["mean"]) == channels
    encoder: Any = load_encoder(tmp_path / "run")
    assert encoder.in_chans == channels
    assert encoder.embed(torch.rand(2, channels, 32, 32)).isfinite().all()
    # And goes on by its directory alone.
    model = pretrain(tmp_path / "run", resume=True)
    assert_same(model.encoder.vit.state_dict(), encoder.vit.state_dict())


def test_settings_of__a_rate_is_the_rate_behind_a_config() -> None:
    method = SimMIM(**TINY_VIT)
    chosen = settings_of(method, arguments(batch_size=8), num_images=100)
    again = partial(arguments, recipe=chosen, batch_size=4)
    for lr in (None, 0.003):
        own = settings_of(method, again(lr=lr))
        rate = own.lr * own.batch_size / own.lr_batch_size
        assert rate == pytest.approx(lr or chosen.lr)
    # A published one counts by its own images.
    own = settings_of(method, again(recipe="vit_base_800ep", lr=0.003))
    assert own.lr_batch_size == method.recipe("vit_base_800ep").lr_batch_size


def test_pretrain__fewer_images_than_a_batch(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "RGB", count=5)
    options = {k: v for k, v in CHOSEN.items() if k != "epochs"} | {"epochs": 1}
    begin(tmp_path / "run", data, **options)
    assert config_of(tmp_path / "run")["recipe"]["batch_size"] == 5


def test_choose_method__needs_pictures() -> None:
    data: Any = [(torch.rand(3, 32, 32), 0)] * 4
    with pytest.raises(ValueError, match="cannot be chosen without the sizes"):
        choose_method(data, "cpu")
    data = [(torch.zeros(1, 40, 64, dtype=torch.uint8), 0)] * 4
    build: Any = choose_method(data, "cpu")
    assert build.func is MAE
    assert (build.keywords["in_chans"], build.keywords["img_size"]) == (1, 40)
    assert choose_method(data, "gpu").func is MAE  # type: ignore[attr-defined]


# A time instead of epochs.


def test_pretrain__minutes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {"epochs": None, "minutes": 0.05}
    model = begin(out, photos, **options)
    match = re.search(
        r"(\d+) images/s: (\d+) epochs? in (\S+) minutes", capsys.readouterr().out
    )
    assert match is not None
    speed, epochs, minutes = float(match[1]), int(match[2]), float(match[3])
    config = config_of(out)
    assert config["recipe"]["epochs"] == epochs
    assert config["minutes"] == 0.05
    assert epochs == 1 or minutes <= 0.05 * 1.01
    assert epochs * 32 / speed / 60 == pytest.approx(minutes, rel=0.05)
    # The steps that were measured left nothing behind.
    begin(tmp_path / "plain", photos, epochs=epochs)
    assert_same(weights(tmp_path / "plain"), weights(out))
    again = begin(out, photos, **options, resume=True)
    assert_same(again.state_dict(), model.state_dict())


def test_pretrain__minutes_of_a_named_recipe_are_kept(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {"epochs": None, "minutes": 0.01, "batch_size": 8}
    options["recipe"] = "swin_base_100ep"
    with pytest.warns(UserWarning, match="was published for"):
        begin(out, photos, **options)
    epochs = config_of(out)["recipe"]["epochs"]
    begin(out, photos, **options, resume=True)
    assert config_of(out)["recipe"]["epochs"] == epochs < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3, "minutes": 3}, "epochs or minutes, not both"),
        ({"minutes": -1.0, "epochs": None}, "minutes=-1.0"),
        ({"minutes": math.inf, "epochs": None}, "minutes=inf"),
        (
            {"minutes": 1, "epochs": None, "devices": 2, "strategy": "ddp"},
            "measured in one process, .* this run has devices=2",
        ),
    ],
)
def test_pretrain__refuses_minutes(
    photos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "run", photos, **options)
    assert not (tmp_path / "run").exists()


# Pictures that are smaller than what is masked as a whole.


def test_pretrain__refuses_small_pictures(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "RGB")
    Image.new("RGB", (35, 16)).save(data / "13.png")
    build = partial(SimMIM, **TINY_VIT | {"img_size": 96, "mask_patch_size": 32})
    message = r"1 of 24 images .* smaller than 32 x 32.*13.png, has 16 x 35 .*skip"
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "run", data, method=build)
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run", data, method=build, on_error="skip", epochs=1)


def test_pretrain__says_that_channels_do_not_fit(tmp_path: Path) -> None:
    grey = [(Image.new("L", (40, 40), value), 0) for value in range(0, 240, 10)]
    with pytest.raises(ValueError, match="in_chans=1"):
        begin(tmp_path / "run", grey)
    assert not (tmp_path / "run").exists()


def test_check_pretraining__method_that_is_chosen() -> None:
    assert check_pretraining({"data": "nowhere"}) is None
    with pytest.raises(ValueError, match="'swin_base_100ep' is a method's"):
        check_pretraining({"recipe": "swin_base_100ep"})
