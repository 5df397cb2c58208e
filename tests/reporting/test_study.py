from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from lightly_mim.reporting import study
from lightly_mim.runs import RunDirectory

# Top-1 accuracies of four seeds that somebody might have measured.
TOP1 = {
    ("pretrained", "knn"): [0.79, 0.81, 0.805, 0.78],
    ("pretrained", "linear"): [0.80, 0.82, 0.79, 0.83],
    ("random initialisation", "knn"): [0.66, 0.65, 0.67, 0.655],
    ("random initialisation", "linear"): [0.64, 0.68, 0.66, 0.65],
    ("raw pixels", "knn"): [0.74, 0.74, 0.74, 0.74],
    ("raw pixels", "linear"): [0.79, 0.795, 0.79, 0.80],
}


def make_run(
    seed: int,
    method: str = "SimMIM",
    top1: dict[tuple[str, str], list[float]] = TOP1,
) -> study.Run:
    rows = [
        {
            "model": "runs/a" if model == "pretrained" else model,
            "protocol": protocol,
            "layer": None if model == "raw pixels" else 5 + seed % 2,
            "pooling": "pixels" if model == "raw pixels" else "mean",
            "hyperparameters": {"k": 10} if protocol == "knn" else {"lr": 0.1},
            "top1": values[seed],
            "top1_low": values[seed] - 0.03,
            "top1_high": values[seed] + 0.02,
            "feature_seconds": 1.5,
            "seconds": 2.25,
            "num_train": 1968,
            "num_test": 656,
        }
        for (model, protocol), values in top1.items()
    ]
    results = {
        "rows": rows,
        "notes": [],
        "encoder": {"name": "vit", "options": {"depth": 8}, "img_size": [96, 64]},
        "versions": {"torch": "2.14"},
    }
    return study.Run(method, seed, Path(f"a-{seed}"), 100.0 + seed, 160.0, results)


# Numbers.


@pytest.mark.parametrize("count", [2, 3, 10])
def test_paired_difference__scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    a, b = rng.normal(75, 3, count).tolist(), rng.normal(70, 3, count).tolist()
    interval = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    difference = study.paired_difference(a, b, confidence=0.9)
    np.testing.assert_allclose(
        difference, [np.mean(np.subtract(a, b)), interval.low, interval.high]
    )


def test_paired_difference__same_on_every_seed() -> None:
    assert study.paired_difference([3.0, 5.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)


def test_paired_difference__needs_two_seeds() -> None:
    with pytest.raises(ValueError, match="two seeds or more, got 1"):
        study.paired_difference([1.0], [2.0])


def test_training_speed__counts_every_epoch(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.marker.write_text(json.dumps({"epochs": 3, "steps": 30}))
    (tmp_path / "metrics.csv").write_text(
        "step,images_per_second\n9,100\n9,\n19,200\n29,400\n"
    )
    seconds, speed = study.training_speed(run, batch_size=40)
    assert seconds == pytest.approx(400 / 100 + 400 / 200 + 400 / 400)
    assert speed == pytest.approx(1200 / 7)


# The table.


def test_table_lines__one_seed() -> None:
    header, lines = study.table_lines([make_run(0)])
    assert header == [
        "", "kNN top-1 %", "layer", "linear top-1 %", "layer", "training", "images/s",
    ]  # fmt: skip
    assert lines == [
        ["SimMIM, pretrained", "79.0 [76.0, 81.0]", "5", "80.0 [77.0, 82.0]", "5",
         "1 min 40 s", "160"],
        ["random initialisation", "66.0 [63.0, 68.0]", "5", "64.0 [61.0, 66.0]", "5",
         "", ""],
        ["raw pixels", "74.0 [71.0, 76.0]", "", "79.0 [76.0, 81.0]", "", "", ""],
    ]  # fmt: skip


def test_table_lines__several_seeds() -> None:
    seeds = [0, 1, 2, 3]
    _, lines = study.table_lines([make_run(seed) for seed in seeds])
    cells = {line[0]: line[1:] for line in lines}
    for label, model in [("SimMIM, pretrained", "pretrained"), ("raw pixels",) * 2]:
        for column, protocol in [(0, "knn"), (2, "linear")]:
            values = 100 * np.array(TOP1[model, protocol])
            mean, spread = values.mean(), values.std(ddof=1)
            assert cells[label][column] == f"{mean:.1f} ± {spread:.1f}"
    assert cells["SimMIM, pretrained"][1] == "5, 6"
    assert cells["raw pixels"][1] == ""
    assert cells["SimMIM, pretrained"][4] == "1 min 42 s"
    for baseline in ("random initialisation", "raw pixels"):
        for column, protocol in [(0, "knn"), (2, "linear")]:
            a = 100 * np.array(TOP1["pretrained", protocol])
            b = 100 * np.array(TOP1[baseline, protocol])
            interval = scipy.stats.ttest_rel(a, b).confidence_interval()
            expected = (
                f"{(a - b).mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
            )
            assert cells[f"SimMIM - {baseline}"][column] == expected
    assert len(lines) == 5


def test_table_lines__methods_share_baselines_with_the_same_numbers() -> None:
    other = {
        (model, protocol): [value - 0.01 * (model == "random initialisation")] * 1
        for (model, protocol), (value, *_) in TOP1.items()
    }
    runs = [make_run(0), make_run(0, "MAE", other)]
    labels = [line[0] for line in study.table_lines(runs)[1]]
    assert labels == [
        "SimMIM, pretrained",
        "MAE, pretrained",
        "random initialisation (SimMIM)",
        "random initialisation (MAE)",
        "raw pixels",
    ]


def test_tables__rich_and_markdown_hold_every_cell() -> None:
    header, lines = study.table_lines([make_run(seed) for seed in range(4)])
    console = Console(file=io.StringIO(), width=study.LOG_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(study.rich_table(header, lines))
    text = capture.get()
    markdown = study.markdown_table(header, lines)
    for cell in [*header, *(cell for line in lines for cell in line)]:
        assert cell in text
        assert cell in markdown
    rows = [row.split("|")[1:-1] for row in markdown.splitlines()]
    assert {len(row) for row in rows} == {len(header)}
    assert [cell.strip() for cell in rows[2]] == lines[0]


def test_verdict() -> None:
    runs = [make_run(seed) for seed in range(4)]
    assert study.verdict(runs, "random initialisation") == (
        "SimMIM beats random initialisation on both protocols on every seed "
        "(0, 1, 2, 3)."
    )
    assert study.verdict(runs[:1], "raw pixels") == (
        "SimMIM beats raw pixels on both protocols with seed 0."
    )
    # 79 % and 79 % with seed 2 is no win.
    assert study.verdict(runs, "raw pixels") == (
        "SimMIM does not beat raw pixels everywhere: linear with seed 2 (+0.0 points)."
    )


def test_captions__name_images_and_seeds() -> None:
    one = " ".join(study.captions([make_run(0)]))
    assert "656 test images" in one and "1968 training" in one and "bootstrap" in one
    several = " ".join(study.captions([make_run(0), make_run(2)]))
    assert "standard deviation over the seeds 0, 2" in several
    assert "Student's t" in several


def test_write_summary__one_line_per_run_model_and_protocol(tmp_path: Path) -> None:
    runs = [make_run(seed) for seed in (0, 1)]
    study.write_summary(runs, "python x.py, --seeds 0 1", tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2
    study.write_summary(
        runs, "x", tmp_path / "own.csv", lambda run: {"twice": 2 * run.seed}
    )
    with (tmp_path / "own.csv").open(newline="") as file:
        own = list(csv.DictReader(file))
    assert list(own[0]) == ["twice", *list(rows[0])[1:]]
    assert [row["twice"] for row in own] == ["0"] * 6 + ["2"] * 6
    for row in rows:
        expected = TOP1[row["model"], row["protocol"]][int(row["seed"])]
        assert float(row["top1"]) == expected
    assert rows[0] | {"top1": "", "top1_low": "", "top1_high": ""} == {
        "method": "SimMIM",
        "encoder": "vit",
        "encoder_options": '{"depth": 8}',
        "img_size": "96x64",
        "seed": "0",
        "model": "pretrained",
        "protocol": "knn",
        "layer": "5",
        "pooling": "mean",
        "hyperparameters": '{"k": 10}',
        "top1": "",
        "top1_low": "",
        "top1_high": "",
        "num_train": "1968",
        "num_test": "656",
        "pretraining_seconds": "100.0",
        "images_per_second": "160.0",
        "evaluation_seconds": "3.8",
        "versions": '{"torch": "2.14"}',
        "run": "a-0",
        "command": "python x.py, --seeds 0 1",
    }
