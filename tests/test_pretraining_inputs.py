"""What comes in: labels that nobody asked for, values that are no numbers, lengths."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightly_mim import defaults
from lightly_mim.checkpoints import encoder_spec
from lightly_mim.cli import COMMANDS, main
from lightly_mim.data import depth, open_data
from lightly_mim.data.notes import is_first
from lightly_mim.encoders import masked_encoder, resize_encoder
from lightly_mim.evaluation import evaluate, load_encoder
from lightly_mim.methods import SimMIM
from lightly_mim.monitoring import FeatureWatch, OnlineProbe
from lightly_mim.optim import NonFiniteLossError, learning_rate_factor
from lightly_mim.pretraining import Pretraining, check_pretraining, pretrain
from lightly_mim.spelling import as_options

from .conftest import SHORT_RUN, TINY_VIT
from .test_pretraining import build, few_batches, no_validation, rows_of, run, trainer

pytestmark = [no_validation, few_batches]


class Labelled(Dataset[Any]):
    """Images with any kind of label, as pictures, bytes, floats or views."""

    def __init__(self, label: Any, kind: str = "bytes", num_images: int = 16) -> None:
        self.label, self.kind, self.num_images = label, kind, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (3, 32, 32), generator=generator).to(torch.uint8)
        sample: Any = pixels
        if self.kind == "picture":
            sample = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        elif self.kind == "views":
            sample = [pixels / 255]
        label = self.label(index) if callable(self.label) else self.label
        return sample, label


LABELS: dict[str, Any] = {
    "dictionary": lambda i: {"boxes": torch.rand(i, 4), "labels": [1] * i},
    "mask": lambda i: torch.zeros(32, 32),
    "array": lambda i: np.zeros((i + 1, 2)),
    "picture": lambda i: Image.new("L", (8, 8)),
    "string": "cat",
    "float": lambda i: i / 3,
    "nothing": None,
    "unknown": -1,
    "sometimes": lambda i: None if i % 2 else i,
    "list": lambda i: list(range(i)),
}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("kind", ["bytes", "views"])
def test_pretrain__needs_no_labels(tmp_path: Path, label: str, kind: str) -> None:
    data = Labelled(LABELS[label], kind)
    options = SHORT_RUN | {"epochs": 1, "rank_every": 1}
    pretrain(tmp_path / "run", data, build, val=data, **options)
    ranks = [float(r["rankme"]) for r in rows_of(tmp_path / "run") if r["rankme"]]
    assert len(ranks) == 2
    assert min(ranks) > 1


@pytest.mark.parametrize("label", LABELS)
def test_probe__names_labels_that_are_no_classes(label: str) -> None:
    with pytest.raises(ValueError, match="The label of|The probe needs labelled"):
        OnlineProbe(Labelled(LABELS[label]), num_workers=0).read()


def shape_of(index: int) -> Any:
    return torch.zeros(3, 32, 32 + 8 * (index == 11))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (shape_of, "need the same shape, 11 has"),
        (lambda i: [shape_of(i)], "need the same shape, 11 has"),
        (lambda i: None if i == 11 else shape_of(0), "Sample 11 .*type NoneType"),
        (lambda i: "x", r"Sample \d+ .*type str"),
    ],
)
def test_pretrain__names_the_sample(tmp_path: Path, sample: Any, message: str) -> None:
    data = [(sample(index), 0) for index in range(16)]
    with pytest.raises(ValueError, match=message):
        pretrain(tmp_path / "run", data, build, **SHORT_RUN | {"batch_size": 16})


# NaN.


class Holed(Labelled):
    """Float images, some of which have a value that is no number."""

    def __init__(self, bad: dict[int, float], num_images: int = 16) -> None:
        super().__init__(lambda index: index % 2, num_images=num_images)
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        pixels, label = super().__getitem__(index)
        images = pixels / 255
        if index in self.bad:
            images[0, 3] = self.bad[index]
        return images, label


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_every": 0},
        {"rank_every": 0, "reconstruct_every": 0},
        {"rank_every": 1},
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pretrain__nan_in_images(
    tmp_path: Path, options: dict[str, Any], value: float
) -> None:
    for bad in ({i: value for i in range(16)}, {0: value}):
        with pytest.raises(NonFiniteLossError, match="NaN"):
            pretrain(
                tmp_path / "run",
                Holed(bad),
                build,
                **SHORT_RUN | options,
                overwrite=True,
            )


def test_pretrain__nan_in_validation_images(tmp_path: Path) -> None:
    for bad, message in (
        ({0: math.nan}, r"hold NaN .* 0\."),
        (
            {21: math.nan, 23: math.inf},
            "validation loss became NaN or infinite in epoch 1",
        ),
    ):
        val = Holed(bad, 40)
        with pytest.raises(NonFiniteLossError, match=message):
            pretrain(
                tmp_path / "run",
                Labelled(0),
                build,
                val=val,
                **SHORT_RUN | {"overwrite": True},
            )


def test_watchers__name_images_with_nan() -> None:
    data = Holed({3: math.nan, 5: -math.inf})
    with pytest.raises(NonFiniteLossError, match=r"2 of 16 images .*: 3, 5\."):
        FeatureWatch(data, num_workers=0).measure(SimMIM(**TINY_VIT))
    with pytest.raises(NonFiniteLossError, match=r"hold NaN or infinite"):
        OnlineProbe(data, num_workers=0).read()


# Classes.


def without(photos: Path, tmp_path: Path, part: str, name: str) -> Path:
    data = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.rmtree(data / part / name)
    return data


@pytest.mark.parametrize(
    ("part", "name"), [("val", "temple"), ("train", "temple"), ("val", "flower")]
)
def test_pretrain__classes_may_differ(
    photos: Path, tmp_path: Path, part: str, name: str
) -> None:
    data = without(photos, tmp_path, part, name)
    run(tmp_path / "run", data, epochs=1)
    assert any(row["val_loss"] for row in rows_of(tmp_path / "run"))


def test_pretrain__validate_false_opens_no_validation_images(
    photos: Path, tmp_path: Path
) -> None:
    data = without(photos, tmp_path, "val", "temple")
    shutil.rmtree(data / "val")
    (data / "val").mkdir()  # no image in it
    run(tmp_path / "run", data, epochs=1, validate=False)
    with pytest.raises(ValueError, match="No images"):
        run(tmp_path / "other", data, epochs=1)


def test_probe__matches_classes_by_name(photos: Path, tmp_path: Path) -> None:
    """Here the numbers differ: flower is class 0 in training, 1 in validation."""
    data = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copytree(data / "val" / "temple", data / "val" / "abbey")
    with pytest.raises(ValueError, match="only in validation: abbey"):
        run(tmp_path / "other", data, epochs=1, probe="linear")
    assert not (tmp_path / "other").exists()
    shutil.rmtree(data / "val" / "abbey")
    run(tmp_path / "run", data, epochs=1, probe="linear")
    run(tmp_path / "plain", photos, epochs=1, probe="linear")
    tops = [
        [row["probe_top1"] for row in rows_of(tmp_path / name) if row["probe_top1"]]
        for name in ("run", "plain")
    ]
    assert tops[0] == tops[1] != []
    (data / "val" / "flower").rename(data / "val" / "f")
    (data / "val" / "temple").rename(data / "val" / "t")
    with pytest.raises(ValueError, match="only in validation: f, t"):
        run(tmp_path / "other", data, probe="linear")


# How long a run is.


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.rand(3, 32, 32), 0


def fitted(loader: Any, tmp_path: Path, **options: Any) -> Pretraining:
    module = Pretraining(SimMIM(**TINY_VIT), options.pop("recipe", None), 4)
    fit: pl.Trainer = trainer(tmp_path, **{"max_epochs": None, **options})
    fit.fit(module, loader)
    return module


def rates(module: Pretraining, steps: int) -> list[float]:
    return [module._schedule.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("num_images", [8, 40])
def test_pretraining__max_steps(tmp_path: Path, num_images: int) -> None:
    """10 steps are the same run in 5 epochs, in one, or without epochs."""
    recipe = defaults.recipe(SimMIM(**TINY_VIT).encoder, num_images)
    expected = [
        learning_rate_factor(step, 10 / recipe.epochs, 10, recipe) for step in range(10)
    ]
    images: Any = DataLoader(Labelled(0, num_images=num_images), batch_size=4)
    for loader in (images, DataLoader(Endless(), batch_size=4)):
        module = fitted(loader, tmp_path, max_steps=10)
        assert module.trainer.global_step == module._total_steps == 10
        assert rates(module, 10) == pytest.approx(expected)
        assert expected[1] != expected[9]


def test_pretraining__shorter_of_steps_and_epochs(tmp_path: Path) -> None:
    loader: Any = DataLoader(Labelled(0), batch_size=4)  # 4 steps in an epoch
    for options, steps in (
        ({"max_epochs": 3, "max_steps": 6}, 6),
        ({"max_epochs": 1, "max_steps": 6}, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
    ):
        module = fitted(loader, tmp_path, **options)
        assert module.trainer.global_step == module._total_steps == steps


def test_pretraining__own_recipe_keeps_its_epochs(tmp_path: Path) -> None:
    recipe = SimMIM.recipe().for_epochs(10)
    module = fitted(
        DataLoader(Labelled(0), batch_size=4), tmp_path, max_steps=6, recipe=recipe
    )
    warmup = round(recipe.warmup_epochs * 4)
    expected = [learning_rate_factor(step, 4, 6, recipe) for step in range(6)]
    assert warmup > 0
    assert rates(module, 6) == pytest.approx(expected)


def test_pretraining__max_time(tmp_path: Path) -> None:
    """The schedule is that of the recipe's epochs, and the time cuts it."""
    loader: Any = DataLoader(Labelled(0), batch_size=4)
    module = fitted(loader, tmp_path, max_time=timedelta(seconds=1))
    assert module._total_steps == 4 * defaults.passes(16)
    assert 0 < module.trainer.global_step < module._total_steps
    options: Any = {"recipe": SimMIM.recipe(), "max_time": timedelta(seconds=1)}
    module = fitted(loader, tmp_path, **options)
    assert module._total_steps == 4 * 100
    assert 0 < module.trainer.global_step < module._total_steps
    with pytest.raises(ValueError, match="for a loader without a length, max_steps"):
        fitted(DataLoader(Endless(), batch_size=4), tmp_path, max_time="00:00:00:01")
    with pytest.raises(ValueError, match="for a loader without a length, max_steps"):
        fitted(DataLoader(Endless(), batch_size=4), tmp_path, max_epochs=2)


# Names of models that come with their settings.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as timm writes it for the hub."""
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
    }
    options["num_heads"] = 2
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": options,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_local_dir__in_pretrain_and_evaluate(folder: Path) -> None:
    name = f"local-dir:{folder}"
    one = load_encoder(name, img_size=32)
    two = masked_encoder(name, img_size=32, pretrained=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(one.eval()(images), two.eval()(images))
    assert one.mean == two.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:nobody/nothing", "Cannot load 'hf-hub:nobody/nothing': no route.*hub"),
        ("local-dir:nowhere", "Cannot load 'local-dir:nowhere'.*local-dir:FOLDER"),
        ("vit_tiny_patch16_224", "weights of 'vit_tiny_patch16_224': no route.*=False"),
    ],
)
def test_weights_that_cannot_be_fetched(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = timm.create_model

    def no_network(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("local-dir:"):
            return original(name, *arguments, **options)
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=message):
        load_encoder(name)
    with pytest.raises(ValueError, match=message):
        SimMIM(name, pretrained=True)


# What a run says of its pictures, which an evaluation takes over.


def deep(root: Path, highest: int) -> Path:
    """Pictures of 16 bits whose values go up to a number, in folders a and b."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, highest + 1, (40, 40)).astype(np.uint16)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.mark.parametrize("highest", [1023, 4095, 16383])
def test_value_range__of_a_run_is_its_evaluations(tmp_path: Path, highest: int) -> None:
    data = deep(tmp_path / "deep", highest)
    out = tmp_path / "run"
    run(out, data, epochs=1, value_range=(0, highest))
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["value_range"] == [0, highest]
    pretrain(out, resume=True)
    with pytest.raises(ValueError, match=r"value_range: \[0, \d+\] in the run, \[0, 9"):
        run(out, data, epochs=1, value_range=(0, 9), resume=True)
    encoder = load_encoder(out)
    assert encoder.value_range == (0, highest)
    # The mean of the run's images is that of the whole range.
    assert encoder.mean == pytest.approx([0.5] * 3, abs=0.02)
    options: Any = {"device": "cpu", "num_workers": 0}
    given: dict[str, Any] = {"value_range": (0, highest)}
    found = [
        evaluate(out, data, ["knn"], cache=tmp_path / name, **options, **more)
        for name, more in (("a", {}), ("b", given))
    ]
    assert found[0].rows[0].selection == found[1].rows[0].selection
    stores = [{path.name for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert stores[0] == stores[1]


@pytest.mark.parametrize("value_range", [(0, 4095, 1), (9, 9), 4095, ("0", "9")])
def test_value_range__out_of_range(tmp_path: Path, value_range: Any) -> None:
    with pytest.raises(ValueError, match="two whole numbers within 0..65535, got va"):
        run(tmp_path / "run", tmp_path, value_range=value_range)
    with pytest.raises(ValueError, match="two whole numbers within 0..65535, got va"):
        check_pretraining({"value_range": value_range})
    assert not (tmp_path / "run").exists()


def test_value_range__beyond_it(tmp_path: Path) -> None:
    data = deep(tmp_path / "deep", 4095)
    with pytest.raises(
        ValueError, match=r"beyond the range 0 to 999\. Give a value_ra"
    ):
        run(tmp_path / "run", data, value_range=(0, 999))
    with pytest.raises(ValueError, match="value_range=.* is for folders"):
        run(tmp_path / "run", Labelled(0), value_range=(0, 999))


@pytest.mark.filterwarnings("always")
def test_value_range__warning_in_the_words_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "is_first", lambda key: is_first(f"{key} {tmp_path}"))
    monkeypatch.setattr(  # pytest's own keeps them
        warnings,
        "_showwarnmsg_impl",
        lambda message: sys.stderr.write(warnings._formatwarnmsg(message)),  # type: ignore
    )
    data = deep(tmp_path / "deep", 4000)
    words = ["--encoder", "vit_tiny_patch16_224", "--img_size", "32", "--pretrained"]
    words += ["false", "--data", str(data), "--protocols", "knn", "--device", "cpu"]
    main(["evaluate", *words, "--num_workers", "0"])
    error = capsys.readouterr().err
    assert "If the camera has 12 bits, give --value_range 0 4095." in error
    assert "value_range=" not in error


SWIN: Any = {
    "img_size": 32,
    "window_size": 4,
    "depths": [1, 1],
    "embed_dim": 16,
    "num_heads": [1, 1],
    "mask_patch_size": 8,
}


@pytest.mark.parametrize(
    ("name", "recipe", "tables"),
    [
        ("swin_tiny_patch4_window7_224", "swin_base_100ep", "simmim"),
        ("swin_tiny_patch4_window7_224", "swin_large_800ep", "simmim"),
        ("swin_tiny_patch4_window7_224", None, "timm"),
        ("swinv2_tiny_window8_256", "swinv2_base_800ep", "timm"),  # it has no tables
    ],
)
def test_recipe_says_how_tables_go_to_another_size(
    name: str, recipe: str | None, tables: str
) -> None:
    method = SimMIM(name, **SWIN)
    Pretraining(method, None if recipe is None else SimMIM.recipe(recipe))
    assert method.encoder.tables == tables
    assert resize_encoder(method.encoder, 64).tables == tables
    assert encoder_spec(method.encoder).get("tables", "timm") == tables


# Words that do nothing, and what is proposed.


@pytest.mark.parametrize("every", [0, 1, 25])
def test_probe_every__without_a_probe(tmp_path: Path, every: int) -> None:
    message = rf"probe_every={every} does nothing without a probe: pass probe=.linear"
    with pytest.warns(UserWarning, match=message):
        check_pretraining({"probe_every": every})
    check_pretraining({"probe_every": every, "probe": "linear"})
    check_pretraining({"probe_every": 10})


@pytest.mark.parametrize("name", ["my photos", "it's", "a;b", "plain"])
def test_proposed_command_is_quoted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = tmp_path / name / "data"
    shutil.copytree(photos, data)
    out = tmp_path / f"{name} run"
    run(out, data / "train", epochs=1, val=data / "val")
    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("Evaluate it: ")
    ]
    words = shlex.split(line.removeprefix("Evaluate it: "))
    assert words[:4] == ["lightly-mim", "evaluate", "--encoder", str(out)]
    where = ["--data", str(data / "train"), "--val", str(data / "val")]
    where += ["--baselines", "random", "pixels", "--out", str(out)]
    assert words[4:] == where
    # Without test images, and without labels.
    run(tmp_path / "b", data / "val", epochs=1)
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.removeprefix("Evaluate it: "))
    assert words[4:8] == ["--data", str(data / "val"), "--holdout", "0.2"]
    one = data / "train" / "flower"
    run(tmp_path / "c", one, epochs=1, batch_size=2)
    last = capsys.readouterr().out.splitlines()[-1]
    features = tmp_path / "c" / "features.npz"
    words = shlex.split(last.removeprefix("Write the features of its images: "))
    assert words[2:] == [str(tmp_path / "c"), str(one), "--out", str(features)]


@pytest.mark.parametrize(
    ("shape", "in_chans", "remedy"),
    [
        ((5, 40, 48), 3, "For 5 channels pass in_chans=5."),
        ((2, 40, 48), 1, "For 2 channels pass in_chans=2."),
        ((13, 40, 48), 4, "For 13 channels pass in_chans=13."),
        ((40, 48, 5), 3, r"channels come last: save numpy.moveaxis\(array, -1, 0\)"),
        ((40, 48, 6), 6, r"channels come last: save numpy.moveaxis\(array, -1, 0\)"),
        ((3, 40, 48), 3, r"Save arrays of 3 channel\(s\) as pictures"),
        ((40, 48), 1, "Save it as a uint8 array of three dimensions."),
    ],
)
def test_arrays_of_another_number_of_channels(
    tmp_path: Path, shape: tuple[int, ...], in_chans: int, remedy: str
) -> None:
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=remedy) as error:
        options = {**TINY_VIT, "in_chans": in_chans}
        run(tmp_path / "run", tmp_path, method=lambda: SimMIM(**options))
    assert "No images in" in str(error.value) or in_chans not in (1, 3)
    if "pass" in remedy:
        words = ["pretrain", "--method", "SimMIM"]
        said = as_options(str(error.value), pretrain, words)
        assert f"pass --method.in_chans {shape[0]}." in said
        words = ["evaluate"]
        assert f"pass --in_chans {shape[0]}." in as_options(
            str(error.value), COMMANDS["evaluate"], words
        )


@pytest.mark.parametrize("in_chans", [2, 5])
def test_pictures_where_arrays_are_expected(photos: Path, in_chans: int) -> None:
    with pytest.raises(ValueError, match=r"Pictures are read with in_chans=1 or in_ch"):
        open_data(photos, in_chans=in_chans)
