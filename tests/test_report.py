"""`report(...)`, what is kept beside a run for it, and where it is called."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightly_mim import SimMIM, evaluate, pretrain
from lightly_mim.cli import main
from lightly_mim.data import open_data
from lightly_mim.gallery import _colours, write_gallery
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.report import look_at, report, report_run
from lightly_mim.reporting.page import REPORT, find_runs
from lightly_mim.reporting.page.curves import curves
from lightly_mim.reporting.page.facts import facts
from lightly_mim.reporting.page.reading import read_run
from lightly_mim.sessions import describe_session
from lightly_mim.transforms import EvalTransform

from .conftest import SHORT_RUN, TINY_VIT

ONE_EPOCH: dict[str, Any] = {**SHORT_RUN, "epochs": 1, "rank_every": 0}


@pytest.fixture(scope="module")
def reported(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose report was written at its end."""
    out = tmp_path_factory.mktemp("reported") / "run"
    pretrain(out, photos, partial(SimMIM, **TINY_VIT), **{**ONE_EPOCH, "report": True})
    return out


def images_of(run: Path, photos: Path) -> tuple[Any, Any]:
    method = from_pretrained(run)
    transform = EvalTransform(method.encoder.img_size, normalize=None)
    return method, open_data(photos, transform=transform)[1]


def test_pretrain__reports_at_its_end(reported: Path) -> None:
    assert (reported / REPORT).stat().st_size > 50_000
    assert (reported / "curves.png").exists()
    found = json.loads((reported / "gallery" / "gallery.json").read_text())
    assert (found["from"], found["of"]) == ("validation images", 12)
    assert found["classes"] == ["flower", "temple"]
    assert (
        json.loads((reported / "history.json").read_text())["sessions"][0]["step"] == 0
    )


class Cut(Callback):
    """Ends the training before the second epoch, as a kill does."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError("cut")


def test_pretrain__notes_each_session(photos: Path, tmp_path: Path) -> None:
    options = {**ONE_EPOCH, "epochs": 2, "method": partial(SimMIM, **TINY_VIT)}
    with pytest.raises(InterruptedError):
        pretrain(tmp_path / "run", photos, callbacks=[Cut()], **options)
    again: dict[str, Any] = {"resume": True, "allow_changes": ("callbacks",)}
    pretrain(tmp_path / "run", photos, **options, **again)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    first, second = history["sessions"]
    assert (first["step"], second["step"]) == (0, 4)
    assert first["command"].split()[0] == sys.orig_argv[0]
    assert first["versions"]["torch"] == importlib.metadata.version("torch")
    run = read_run(tmp_path / "run")
    assert next(mark["x"] for figure in curves([run]) for mark in figure["marks"]) == 4
    assert "went on" in {name for name, _, _ in dict(facts(run))["Machine"]}


def test_describe_session__of_a_job_that_was_queued_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    session = describe_session(7, torch.device("cpu"))
    assert (session["job"], session["restarts"], session["step"]) == ("17", 2, 7)


def test_report__looks_once_and_keeps_it(
    reported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As the run had it.
    cpu = torch.device("cpu")
    monkeypatch.setattr("lightly_mim.report.choose_device", lambda _: cpu)
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    kept = (run / "gallery" / "gallery.json").stat().st_mtime_ns
    report(run)
    assert (run / "gallery" / "gallery.json").stat().st_mtime_ns == kept
    shutil.rmtree(run / "gallery")
    capsys.readouterr()
    report([run])
    assert "Looking at validation images of" in capsys.readouterr().out
    # The same images, weights and seeds: the same features, to the last bit.
    again, first = (r / "gallery" / "gallery.json" for r in (run, reported))
    one, two = (json.loads(path.read_text()) for path in (again, first))
    assert one.pop("from").startswith(two.pop("from"))
    assert one == two


def test_report__says_why_features_are_missing(reported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    shutil.rmtree(run / "gallery")
    text = (run / "config.yaml").read_text().partition("\n")[2]
    lines = [
        f"data: {tmp_path}/gone" if line.startswith("data:") else line
        for line in text.splitlines()
    ]
    (run / "config.yaml").write_text("\n".join(lines))
    assert "gone" in look_at(run)
    assert not (run / "gallery").exists()
    assert report(run).exists()
    (run / "encoder.safetensors").write_bytes(b"junk")
    assert look_at(run)
    (run / "encoder.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    assert look_at(run) == "the run has no checkpoint yet."


def test_report__imports_nothing_that_a_file_names(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    shutil.rmtree(run / "gallery")
    text = (run / "config.yaml").read_text().partition("\n")[2]
    strange = text.replace("lightly_mim.SimMIM", "strange_module.SimMIM")
    assert strange != text
    (run / "config.yaml").write_text(strange)
    assert report(run).exists()
    assert "strange_module" not in sys.modules


def test_report_run__a_failure_is_a_warning(
    reported: Path, photos: Path, tmp_path: Path
) -> None:
    method, images = images_of(reported, photos)
    plain, images.transform = images.transform, fail
    run = tmp_path / "run"
    shutil.copytree(reported, run)
    (run / REPORT).unlink()
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="(?s)shows no features: .*no Image today"):
        report_run(run, method, images, "images", cpu)
    assert (run / REPORT).exists()
    images.transform = plain
    said = "(?s)could not be written: .*All else is complete.*lightly-mim report"
    with pytest.warns(UserWarning, match=said):
        report_run(tmp_path / "empty", method, images, "images", cpu)


def fail(image: Any) -> Any:
    raise ValueError(f"no {type(image).__name__} today")


def test_evaluate__reports(reported: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    options: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
    results = evaluate(reported, photos, ("knn",), out=out, **options)
    text = (out / REPORT).read_text()
    assert f'data-value="{results.rows[0].top1}"' in text


def test_report__command_line(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        shutil.copytree(reported, run)
    main(["report", *map(str, runs), "--out", str(tmp_path / "out"), "--title", "Two"])
    assert "<title>Two</title>" in (tmp_path / "out" / REPORT).read_text()
    assert f"The report is in {tmp_path / 'out' / REPORT}" in capsys.readouterr().out
    main(["report", str(tmp_path)])  # a folder of runs
    assert "2 runs" in (tmp_path / REPORT).read_text()
    main(["report", "--runs", str(runs[0]), "--figures", "false"])
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert "is not a directory" in capsys.readouterr().err


def test_report__data_is_for_one_run(reported: Path, tmp_path: Path) -> None:
    shutil.copytree(reported, tmp_path / "other")
    with pytest.raises(ValueError, match="data is for one run, and there are 2"):
        report([reported, tmp_path / "other"], data="photos")
    # The same run twice is one.
    assert find_runs(reported.parent) == find_runs(reported) == [reported]


# What the gallery says.


def test_gallery__leaves_the_method_and_random_numbers_alone(
    reported: Path, photos: Path, tmp_path: Path
) -> None:
    method, images = images_of(reported, photos)
    method.train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    state = torch.get_rng_state()
    write_gallery(tmp_path, method, images, "images")
    assert method.training
    assert torch.equal(torch.get_rng_state(), state)
    after = method.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gallery__similarities_and_neighbours_by_hand(
    reported: Path, photos: Path, tmp_path: Path
) -> None:
    method, images = images_of(reported, photos)
    write_gallery(tmp_path, method, images, "images")
    found = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    encoder = method.eval().encoder
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    pixels = torch.stack([images[n][0] for n in range(len(images))])
    batch = (pixels.float() / 255 - mean) / std
    with torch.no_grad():
        pooled = encoder.embed(batch).double().numpy()
        chosen = found["patches"]["images"]
        tokens = encoder.feature_map(batch[chosen]).flatten(2).transpose(1, 2)
    cosine = 1 - cdist(*[StandardScaler().fit_transform(pooled)] * 2, "cosine")
    for entry in found["neighbours"]:
        others = np.argsort(-cosine[entry["image"]])
        wanted = [n for n in others if n != entry["image"]][:6]
        assert entry["near"] == wanted
        assert entry["cosine"] == pytest.approx(
            cosine[entry["image"], wanted], abs=1e-3
        )
    flat = tokens.flatten(0, 1).double().numpy()
    scaled = StandardScaler().fit_transform(flat).reshape(tokens.shape)
    assert found["patches"]["grid"] == [4, 4]
    for text, values in zip(found["patches"]["similarity"], scaled, strict=True):
        shown = np.frombuffer(base64.b64decode(text), np.uint8).reshape(16, 16)
        wanted = (1 - cdist(values, values, "cosine") + 1) * 127.5
        assert np.abs(shown - wanted).max() <= 1


def test_gallery__best_and_worst(reported: Path, photos: Path, tmp_path: Path) -> None:
    method, images = images_of(reported, photos)
    write_gallery(tmp_path, method, images, "images")
    found = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    rows = found["reconstructed"]["rows"]
    kinds = ["best", "best", "typical", "typical", "worst", "worst"]
    assert [row["kind"] for row in rows] == kinds
    errors = [row["error"] for row in rows]
    assert errors == sorted(errors)
    assert len({row["image"] for row in rows}) == 6


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gallery__few_images(
    reported: Path, photos: Path, tmp_path: Path, count: int
) -> None:
    method, images = images_of(reported, photos)
    few = torch.utils.data.Subset(images, range(count))
    write_gallery(tmp_path, method, few, "images")
    found = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert len(found["files"]) == count
    assert found["labels"] is None  # a subset does not tell its classes


class Same(torch.utils.data.Dataset[Any]):
    """Images that are all the same, of which no feature tells anything."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        return torch.full((3, 32, 32), 100, dtype=torch.uint8), 0, f"{index}.png"


def test_gallery__images_that_are_all_the_same(reported: Path, tmp_path: Path) -> None:
    write_gallery(tmp_path, from_pretrained(reported), Same(), "images")
    found = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert found["map"] is None
    with Image.open(tmp_path / "gallery" / "patches.webp") as picture:
        assert picture.width == 3 * 224


def test_gallery__colours_are_principal_components_of_fixed_sign() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(50, 6)).astype(np.float32)
    tokens[:, 2] *= 10  # the first component, whose largest loading is that value's
    colours = _colours(tokens)
    assert colours.shape == (50, 3) and colours.dtype == np.uint8
    red = colours[:, 0].astype(float)
    assert np.corrcoef(red, tokens[:, 2])[0, 1] > 0.9
    assert np.corrcoef(_colours(-tokens)[:, 0].astype(float), red)[0, 1] < -0.9
    moved = _colours(tokens[::-1] + 5)[::-1].astype(int)
    assert abs(moved - colours).max() <= 1
