"""Images that cannot be read, classes that test images lack, pictures of 12 bits."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

from lightly_mim.checkpoints import save_encoder
from lightly_mim.cli import main
from lightly_mim.data import ImageDataset
from lightly_mim.data.notes import printable
from lightly_mim.data.opening import BrokenImageError
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation import (
    DenseResults,
    Result,
    Results,
    evaluate,
    evaluate_dense,
)
from lightly_mim.evaluation.dense.results import DenseResult
from lightly_mim.evaluation.probes.attentive import Attentive
from lightly_mim.evaluation.supervised.finetune import FineTune
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE
from lightly_mim.monitoring import check_finite_images
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.reporting import results_markdown

from .dense.test_dense import draw

FAST: dict[str, Any] = {
    "num_workers": 0,
    "device": "cpu",
}
FINETUNE = FineTune(epochs=1, batch_size=4, micro_batch_size=4)
PROTOCOLS: list[Any] = [
    "knn",
    Attentive(epochs=2, learning_rates=[1e-3], weight_decays=[0.0]),
    FINETUNE,
    LinearMAE(epochs=1, batch_size=4, micro_batch_size=4),
]


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    return masked_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, **options)


def write(root: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    """Writes noise, brighter from folder to folder."""
    rng = np.random.default_rng(0)
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(60 * (number % 3), 60 * (number % 3) + 90, (32, 32))
            kind = suffix if i % 2 else "png"
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(root / folder / f"{i}.{kind}")
    return root


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    counts = {"train/a": 8, "train/b": 8, "val/a": 4, "val/b": 4}
    return write(tmp_path / "whole", counts, "jpg")


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """The same with a truncated, an empty and an invented picture."""
    root = Path(shutil.copytree(whole, tmp_path / "broken"))
    (root / "train" / "a" / "2.png").write_bytes(
        (whole / "train" / "a" / "2.png").read_bytes()[:300]
    )
    (root / "train" / "b" / "5.jpg").write_bytes(b"")
    (root / "val" / "a" / "1.jpg").write_bytes(b"no picture")
    return root


def without(broken: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(broken, tmp_path / "without"))
    for name in ("train/a/2.png", "train/b/5.jpg", "val/a/1.jpg"):
        (root / name).unlink()
    return root


def numbers(results: Results) -> list[Result]:
    """The rows without times."""
    return [replace(row, seconds=0.0, feature_seconds=0.0) for row in results.rows]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_raise__names_the_file_and_the_option(
    broken: Path, encoder: MaskedEncoder, protocol: Any
) -> None:
    with pytest.raises(
        BrokenImageError, match=r'train/(a/2\.png|b/5\.jpg).*with on_error="skip"\.$'
    ):
        evaluate(encoder, broken, [protocol], **FAST)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skip__is_as_if_they_had_never_been_there(
    broken: Path,
    encoder: MaskedEncoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    protocols: Any = PROTOCOLS if num_workers == 0 else ["knn", FINETUNE]
    options = FAST | {"num_workers": num_workers}
    found = evaluate(encoder, broken, protocols, on_error="skip", **options)
    expected = evaluate(encoder, without(broken, tmp_path), protocols, **options)
    assert numbers(found) == numbers(expected)
    assert [(r.num_train, r.num_test) for r in found.rows] == [(14, 7)] * len(protocols)
    first, second, *others = found.notes
    assert others == expected.notes
    assert first.startswith("2 of 16 training images are left out:\n  1: Cannot read")
    assert len(first.splitlines()) == 3
    assert "b/5.jpg: it is empty" in first
    assert second.startswith("1 of 8 test images are left out:\n  1: Cannot read the ")
    assert "val/a/1.jpg: cannot identify its format" in second
    printed = capsys.readouterr().out
    assert printed.count(first) == printed.count(second) == 1
    assert found.record["arguments"]["on_error"] == "skip"


def test_skip__many_are_told_by_reason(encoder: MaskedEncoder, tmp_path: Path) -> None:
    root = write(tmp_path, {"train/a": 30, "train/b": 4, "val/a": 2, "val/b": 2})
    for i in range(4, 30):
        content = (root / "train" / "a" / f"{i}.png").read_bytes()
        cut = b"" if i % 3 == 0 else content[: 200 + i]
        (root / "train" / "a" / f"{i}.png").write_bytes(cut)
    found = evaluate(encoder, root, ["knn"], on_error="skip", **FAST)
    lines = found.notes[0].splitlines()
    assert lines[0] == "26 of 34 training images are left out:"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [
        "18, such as",
        "8, such as",
    ]
    assert found.rows[0].num_train == 8


def test_skip__what_is_mended_is_read(
    whole: Path, broken: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    options: Any = FAST | {"cache": tmp_path / "cache", "on_error": "skip"}
    first = evaluate(encoder, broken, ["knn"], **options)
    stores = sorted((tmp_path / "cache").iterdir())
    assert numbers(evaluate(encoder, broken, ["knn"], **options)) == numbers(first)
    assert sorted((tmp_path / "cache").iterdir()) == stores
    for name in ("train/a/2.png", "val/a/1.jpg"):
        shutil.copy(whole / name, broken / name)
    mended = evaluate(encoder, broken, ["knn"], **options)
    assert (mended.rows[0].num_train, mended.rows[0].num_test) == (15, 8)
    assert sum("left out" in note for note in mended.notes) == 1
    # One that breaks later is not read from the cache either.
    (broken / "val" / "b" / "0.png").write_bytes(b"")
    assert evaluate(encoder, broken, ["knn"], **options).rows[0].num_test == 7


def test_skip__held_out_images(
    broken: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    options: Any = FAST | {"holdout": 0.25}
    found = evaluate(encoder, broken, ["knn"], on_error="skip", **options)
    expected = evaluate(encoder, without(broken, tmp_path), ["knn"], **options)
    assert numbers(found) == numbers(expected)
    assert sum("left out" in note for note in found.notes) == 1  # val/ is not read


def test_skip__a_class_that_is_all_broken(broken: Path, encoder: MaskedEncoder) -> None:
    for file in (broken / "val" / "b").iterdir():
        file.write_bytes(b"")
    found = evaluate(encoder, broken, ["knn"], on_error="skip", **FAST)
    assert found.rows[0].per_class[1] is None
    assert "There are no test images of b." in found.notes
    for file in (broken / "val" / "a").iterdir():
        file.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"None of the 8 test images .*\n  4, such as"):
        evaluate(encoder, broken, ["knn"], on_error="skip", **FAST)


def test_skip__what_may_pass_is_not_left_out(
    whole: Path, encoder: MaskedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_file(path: Path, *arguments: Any) -> Any:
        if path.name == "3.jpg":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "open", open_file)
    with pytest.raises(BrokenImageError, match=r"the file may be whole\)$"):
        evaluate(encoder, whole, ["knn"], on_error="skip", **FAST)


class Pictures(Dataset[Any]):
    classes = ("a", "b")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (32, 32), (30 * index,) * 3), index % 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("on_error", "skip"), ("value_range", (0, 4095)), ("value_range", (1, 9))],
)
def test_options_of_files__not_for_data_sets(
    whole: Path, encoder: MaskedEncoder, option: str, value: Any
) -> None:
    for data, val in ((Pictures(), whole / "val"), (whole / "train", Pictures())):
        with pytest.raises(ValueError, match=f"{option}=.* is for folders"):
            evaluate(encoder, data, ["knn"], val=val, **FAST, **{option: value})


def test_on_error__bad_word(whole: Path, encoder: MaskedEncoder) -> None:
    for word in ("ignore", "Skip", ""):
        with pytest.raises(ValueError, match="is one of 'raise', 'skip', got"):
            evaluate(encoder, whole, ["knn"], on_error=word, **FAST)  # type: ignore


def test_dense__skip(encoder: MaskedEncoder, tmp_path: Path) -> None:
    for part, count in (("train", 8), ("val", 4)):
        draw(tmp_path / part, count, (40, 40), count)
    for name in ("train/images/a/2.png", "train/masks/a/5.png", "val/masks/a/0.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    options: Any = {"num_workers": 0, "device": "cpu"}
    with pytest.raises(BrokenImageError, match=r'(2|5)\.png.*on_error="skip"\.$'):
        evaluate_dense(encoder, tmp_path, ["knn"], **options)
    found = evaluate_dense(encoder, tmp_path, ["knn"], on_error="skip", **options)
    for name in ("train/{}/a/2.png", "train/{}/a/5.png", "val/{}/a/0.png"):
        for kind in ("images", "masks"):
            (tmp_path / name.format(kind)).unlink()
    expected = evaluate_dense(encoder, tmp_path, ["knn"], **options)
    assert found.rows[0].miou == expected.rows[0].miou
    assert (found.rows[0].num_train, found.rows[0].num_test) == (6, 3)
    assert found.notes[0].startswith("2 of 8 training images are left out:\n  ")
    assert found.notes[1].startswith("1 of 4 test images are left out:\n  1: Cannot")
    assert expected.notes == []
    with pytest.raises(ValueError, match="is one of 'raise', 'skip', got"):
        evaluate_dense(encoder, tmp_path, on_error="drop", **options)  # type: ignore


# Classes.


@pytest.mark.parametrize(
    ("val", "lacking"),
    [({"b": 4, "c": 4}, "a"), ({"c": 3}, "a, b"), ({"a": 2, "c": 2}, "b")],
)
def test_classes_that_test_images_lack(
    encoder: MaskedEncoder, tmp_path: Path, val: dict[str, int], lacking: str
) -> None:
    write(tmp_path, {f"train/{name}": 6 for name in "abc"})
    write(tmp_path, {f"val/{name}": count for name, count in val.items()})
    (tmp_path / "train" / "z").mkdir()  # empty: no class
    (tmp_path / "val" / "b").mkdir(exist_ok=True)
    (tmp_path / "val" / "y" / "deeper").mkdir(parents=True)
    found = evaluate(encoder, tmp_path, ["knn", FINETUNE], **FAST)
    for row in found.rows:
        assert len(row.per_class) == 3
        missing = [share is None for share in row.per_class]
        assert missing == [name not in val for name in "abc"]
        assert [sum(row.confusion[i]) for i in range(3)] == [
            val.get(name, 0) for name in "abc"
        ]
    assert f"There are no test images of {lacking}." in found.notes
    assert found.record["data"]["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("val", [{"a": 2, "abbey": 2}, {"A": 2}, {"x": 1, "y": 1}])
def test_classes_that_training_lacks(
    encoder: MaskedEncoder, tmp_path: Path, val: dict[str, int]
) -> None:
    write(tmp_path, {f"train/{name}": 6 for name in "ab"})
    write(tmp_path, {f"val/{name}": count for name, count in val.items()})
    unknown = ", ".join(name for name in val if name not in "ab")
    with pytest.raises(ValueError, match=f"only in validation: {unknown}\\. Give both"):
        evaluate(encoder, tmp_path, ["knn"], **FAST)
    # Held-out training images are scored: nobody looks at the others.
    found = evaluate(encoder, tmp_path, ["knn"], holdout=0.25, **FAST)
    assert found.record["data"]["classes"] == ["a", "b"]


# Values.


def deep(root: Path, highest: int) -> Path:
    """Pictures of 16 bits whose values go up to a number."""
    rng = np.random.default_rng(1)
    for part in ("train", "val"):
        for number, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for i in range(6):
                low = number * highest // 3
                pixels = rng.integers(low, highest + 1, (32, 32)).astype(np.uint16)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("highest", [1023, 4095, 16383])
def test_value_range__equals_pictures_of_8_bits(
    encoder: MaskedEncoder, tmp_path: Path, highest: int
) -> None:
    root = deep(tmp_path / "deep", highest)
    for file in list(root.rglob("*.png")):
        place = tmp_path / "flat" / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        values = np.asarray(Image.open(file)).astype(np.float64)
        flat = np.floor(values * 255 / highest + 0.5)
        Image.fromarray(flat.astype(np.uint8)).save(place)
    cache: dict[str, Any] = {"cache": tmp_path / "cache"}
    found = evaluate(encoder, root, ["knn"], value_range=(0, highest), **FAST, **cache)
    assert numbers(found) == numbers(
        evaluate(encoder, tmp_path / "flat", ["knn"], **FAST)
    )
    # Features of another range are others: the cache keeps them apart.
    evaluate(encoder, root, ["knn"], value_range=(0, 65535), **FAST, **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_value_range__that_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    grey, colour, array = (tmp_path / name for name in ("grey", "colour", "array"))
    for folder in (grey, colour, array):
        folder.mkdir()
    Image.new("RGB", (8, 8)).save(colour / "1.jpg")
    Image.fromarray(rng.integers(0, 255, (8, 8)).astype(np.uint8)).save(grey / "1.png")
    np.save(array / "1.npy", rng.integers(0, 255, (2, 8, 8)).astype(np.uint8))
    said = "is for grey pictures of 16 bits. None of"
    for root, in_chans in ((colour, 3), (grey, 1), (array, 2)):
        ImageDataset(root, in_chans=in_chans, value_range=(0, 4095))
        ImageDataset(root, in_chans=in_chans, value_range=(0, 4095))
        assert capsys.readouterr().out.count(said) == 1, root
        ImageDataset(root, in_chans=in_chans)
    # One that it is for, and files that tell nothing.
    deep = Image.fromarray(rng.integers(0, 4095, (8, 8)).astype(np.uint16))
    for name in ("2.png", "3.tif"):
        deep.save(grey / name)
        ImageDataset(grey, in_chans=1, value_range=(0, 4094))
        (grey / name).unlink()
    (grey / "1.png").write_bytes(b"")
    ImageDataset(grey, in_chans=1, value_range=(0, 4094))
    assert said not in capsys.readouterr().out


def test_value_range__is_taken_over_from_the_run(
    whole: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    data = deep(tmp_path / "deep", 4095)
    encoder = masked_encoder(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2
    )
    encoder.value_range = (0, 4095)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    keys = []
    ranges: list[dict[str, Any]] = [
        {},
        {"value_range": (0, 4095)},
        {"value_range": (0, 9999)},
    ]
    for number, given in enumerate(ranges):
        cache: Any = tmp_path / str(number)
        evaluate(tmp_path, data, ["knn"], cache=cache, **FAST, **given)
        keys.append(sorted(path.name for path in cache.iterdir()))
    assert keys[0] == keys[1] != keys[2]
    # Data sets of one's own and those with a name have 8 bits.
    pictures = Pictures()
    assert evaluate(tmp_path, pictures, ["knn"], val=pictures, **FAST).rows
    with pytest.raises(ValueError, match="solar-cells have 8"):
        evaluate(tmp_path, "solar-cells", ["knn"], value_range=(0, 9), **FAST)


@pytest.mark.parametrize(
    "value_range", [(0, 4095, 1), (9, 9), (5, 2), (0, 70000), 4095, "0-9", (0.0, 9.0)]
)
def test_value_range__out_of_range(
    whole: Path, encoder: MaskedEncoder, value_range: Any
) -> None:
    with pytest.raises(ValueError, match="two whole numbers within 0..65535, got va"):
        evaluate(encoder, whole, ["knn"], value_range=value_range, **FAST)
    with pytest.raises(ValueError, match="two whole numbers within 0..65535, got va"):
        evaluate_dense(encoder, whole, value_range=value_range)


def test_value_range__words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = deep(tmp_path / "deep", 1000)
    words = ["evaluate", "--encoder", "vit_tiny_patch16_224", "--img_size", "32"]
    words += ["--pretrained", "false", "--device", "cpu", "--num_workers", "0"]
    words += ["--data", str(data), "--protocols", "knn"]
    for given, said in (
        (["5", "2"], "within 0..65535, got --value_range 5 2"),
        (["0", "999"], "--on_error skip"),
        (["7"], "--value_range"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--value-range", *given])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert "value_range=" not in error
    main([*words, "--value_range", "0", "1000", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == ""  # no warning of dark pictures
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["arguments"]["value_range"] == [0, 1000]


# Names.

NAMES = ["two\nlines", "tab\there", "[red]x[bold]", "gr\u00fcn", "na\udcefve", "a|b"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_names__of_classes_files_and_folders(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    root = tmp_path / "da\udce4ta\n[b]"
    write(root, {f"train/{name}": 4 for name in NAMES})
    write(root, {f"val/{name}": 2 for name in NAMES[1:]})
    for name in NAMES[:5]:
        (root / "train" / name / "3.png").rename(root / "train" / name / f"{name}.png")
    (root / "train" / NAMES[0] / f"{NAMES[0]}.png").write_bytes(b"")
    out = tmp_path / "out\n"
    results = evaluate(
        encoder, root, ["knn", FINETUNE], out=out, on_error="skip", **FAST
    )
    stored = json.loads((out / "results.json").read_text())
    assert stored["data"]["classes"] == sorted(NAMES)
    assert any("two\\nlines.png: it is empty" in note for note in results.notes)
    assert "There are no test images of two\\nlines." in results.notes
    assert (
        numbers(evaluate(encoder, root, ["knn"], on_error="skip", **FAST))
        == (numbers(results)[:1])
    )


def test_names__of_a_cache(whole: Path, encoder: MaskedEncoder, tmp_path: Path) -> None:
    for name in ("out", "cache"):
        folder: Any = {name: tmp_path / "\udcff"}
        with pytest.raises(ValueError, match=r"udcff.*is not UTF-8\. Give another fol"):
            evaluate(encoder, whole, ["knn"], **FAST, **folder)
        assert not (tmp_path / "\udcff").exists()


def empty(kind: type[Any]) -> dict[str, Any]:
    return {field.name: None for field in fields(kind)}


@pytest.mark.parametrize("name", NAMES)
def test_names__are_shown_in_one_line(name: str) -> None:
    row = Result(
        **empty(Result)
        | {"model": name, "protocol": "knn", "pooling": "mean", "hyperparameters": {}}
        | {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6, "seconds": 1.0}
        | {"feature_seconds": 1.0, "layer": 3}
    )
    results = Results([row], [f"A note on {printable(name)}."], {}, [])
    dense = DenseResults(
        [
            DenseResult(
                **empty(DenseResult)
                | {"model": name, "protocol": "knn", "layer": 1, "hyperparameters": {}}
                | {"miou": 0.5, "miou_low": 0.4, "miou_high": 0.6, "seconds": 1.0}
                | {"pixel_accuracy": 0.5, "feature_seconds": 1.0, "iou": {name: 0.5}}
            )
        ],
        [f"A note on {printable(name)}."],
        {},
    )
    for found in (results, dense):
        console = Console(width=120)
        with console.capture() as capture:
            console.print(found)
        text = capture.get()
        text.encode()
        assert f"A note on {printable(name)}." in text
        assert text.count(printable(name)) >= 2
    markdown = results_markdown([asdict(row)])
    assert len(markdown.splitlines()) == 3
    assert printable(name).replace("|", "\\|") in markdown


def test_names__no_utf_8_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8"))
    root = tmp_path / "da\udce4ta"
    write(root, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    words = ["evaluate", "--encoder", "vit_tiny_patch16_224", "--img_size", "32"]
    words += ["--pretrained", "false", "--data", str(root), "--device", "cpu"]
    main([*words, "--num_workers", "0", "--protocols", "knn"])
    print("da\udce4ta", flush=True)
    assert b"da\\udce4ta" in written.getvalue()


def test_names__of_images_with_nan() -> None:
    images = torch.full((2, 3, 4, 4), torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"two\\nlines, na\\udcefve\. Mend"):
        check_finite_images(images, ["two\nlines", "na\udcefve"])
