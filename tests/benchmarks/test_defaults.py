"""The evidence for the defaults."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightly_mim.targets import Pixels

MODELS = ["SimMIM", "lightly's MAE"]

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def defaults(on_path: None) -> Any:
    return importlib.import_module("defaults")


@pytest.fixture
def tiny(defaults: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"embed_dim": 32, "depth": 1, "num_heads": 1}
    monkeypatch.setattr(defaults, "ENCODER", size)
    monkeypatch.setattr(
        defaults, "LINEAR", defaults.Linear(learning_rates=(0.1,), epochs=2)
    )


def test_main__measures_once_and_goes_on(
    defaults: Any, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--sets", "digits", "--seeds", "0", "--images", "200", "--out"]
    words += [str(tmp_path), "--pictures", "200", "--models", *MODELS]
    with pytest.warns(FutureWarning, match="MAEDecoderTIMM"):
        defaults.main(words)
    rows = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {row["model"] for row in rows} == set(MODELS)
    for row in rows:
        assert row["pictures"] == row["images"] == 200
        assert row["before"] != row["after"]
        assert all(
            0 < row[when][protocol] <= 100
            for when in ("before", "after")
            for protocol in defaults.PROTOCOLS
        )
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    defaults.main(words)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert (
        "| digits | lightly's MAE, 200 pictures, 200 images |"
        in capsys.readouterr().out
    )


def test_choice__is_scored_on_training_images(
    defaults: Any, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def score(*args: Any) -> dict[str, float]:
        seen.append(args)
        return {"knn": 1.0}

    monkeypatch.setattr(defaults, "score", score)
    row = defaults.measure(
        "digits", "SimMIM", 0, 64, defaults.CHOICES["target"]["pixels"], 64
    )
    assert row["after"] == {"knn": 1.0}
    assert all(test is None for _, _, test, _ in seen)


def test_ours__says_nothing_but_the_encoder(defaults: Any) -> None:
    of = defaults.SETS["digits"]
    build = defaults.ours(of, "SimMIM", {})
    assert set(build.keywords) == {
        *("encoder", "img_size", "patch_size", "in_chans"),
        *defaults.ENCODER,
    }
    pixels = defaults.ours(of, "SimMIM", {"target": Pixels()})()
    assert isinstance(pixels.target, Pixels)


def test_lightly__masks_single_patches_and_measures_them_alone(defaults: Any) -> None:
    peers: Any = importlib.import_module("peers.lightly_methods")
    options = {**defaults.SETS["digits"].options, **defaults.ENCODER}
    with pytest.warns(FutureWarning, match="MAEDecoderTIMM"):
        models = [build(options) for build in peers.LIGHTLY.values()]
    for model in models:
        loss = model(torch.randn(3, 1, 8, 8))
        loss.backward()
        assert loss.isfinite()
        assert loss > 0


def test_tabulate__means_and_deviations_over_seeds(defaults: Any) -> None:
    values = np.array([70.0, 72.0, 77.0])
    rows = [
        {
            "set": "a",
            "label": "b",
            **{w: {"knn": v, "linear": 1} for w in ("before", "after")},
        }
        for v in values
    ]
    header, [line] = defaults.tabulate(rows)
    assert header[2] == "knn, before"
    assert line[2] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def test_learning_curves__a_line_per_number_of_pictures(defaults: Any) -> None:
    rows = [
        {
            "model": model,
            "pictures": pictures,
            "images": images,
            "before": {"knn": 60.0, "linear": 62.0},
            "after": {"knn": images / 100 + seed, "linear": 70.0},
        }
        for model in ("SimMIM", "MAE")
        for pictures in (300, 50)
        for images in (8000, 4000)
        for seed in (0, 2)
    ]
    figure = defaults.learning_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        *("SimMIM, knn", "MAE, knn", "SimMIM, linear", "MAE, linear")
    ]
    untrained, *lines = figure.axes[0].get_lines()
    assert set(untrained.get_ydata()) == {60.0}
    assert [line.get_label() for line in lines] == ["50 pictures", "300 pictures"]
    assert list(lines[0].get_xdata()) == [4000, 8000]
    assert list(figure.axes[0].get_xticks()) == [4000, 8000]
    assert list(lines[0].get_ydata()) == [41.0, 81.0]
