from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from lightly_mim.reporting import (
    measures_table,
    results_markdown,
    results_table,
    results_text,
)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "runs/a",
        "protocol": "knn",
        "layer": 11,
        "pooling": "mean",
        "hyperparameters": {"k": 20, "temperature": 0.07},
        "top1": 0.75,
        "top1_low": 0.7,
        "top1_high": 0.796,
        "top5": None,
        "feature_seconds": 12.34,
        "seconds": 0.5,
        **changes,
    }


ROWS = [
    row(),
    row(protocol="linear", hyperparameters={"learning_rate": 0.01}, top1=0.8),
    row(model="raw pixels", layer=None, pooling="pixels"),
]


def test_results_markdown() -> None:
    assert results_markdown(ROWS).splitlines() == [
        "| Model | Protocol | Layer | Pooling | Chosen | Top-1 % [95 %] | Seconds |",
        "| --- | --- | ---: | --- | --- | --- | ---: |",
        "| runs/a | knn | 11 | mean | k 20, T 0.07 | 75.0 [70.0, 79.6] | 12.8 |",
        "| runs/a | linear | 11 | mean | lr 0.01 | 80.0 [70.0, 79.6] | 12.8 |",
        "| raw pixels | knn |  | pixels | k 20, T 0.07 | 75.0 [70.0, 79.6] | 12.8 |",
    ]


def test_results_markdown__top5_and_bars() -> None:
    text = results_markdown([row(top5=0.987, model="a|b")])
    assert "Top-5 %" in text
    assert "98.7" in text
    assert "a\\|b" in text


def test_results_text() -> None:
    text = results_text(ROWS, title="Accuracy [of] it", width=80)
    assert text.splitlines()[0].rstrip() == "Accuracy [of] it"
    assert max(map(len, text.splitlines())) <= 80
    for cell in ("runs/a", "80.0 [70.0, 79.6]", "lr 0.01", "raw pixels"):
        assert cell in text
    assert "Top-5" not in text
    assert "\x1b" not in text


def test_results_text__square_brackets_are_no_markup() -> None:
    assert "runs/[red]a" in results_text([row(model="runs/[red]a")], width=140)


def test_results_table__draws_a_line_between_models() -> None:
    table = results_table(ROWS)
    assert [line.end_section for line in table.rows] == [False, True, True]


def test_results_table__no_rows() -> None:
    assert "Model" in results_text([])


@pytest.mark.parametrize("width", [80, 90, 100, 120])
def test_results_text__breaks_no_label(width: int) -> None:
    rows = [
        row(model="vit_base_patch16_224.mae", top5=0.99, seconds=1234.5),
        row(protocol="low_label", variant="10 per class", draws=[0.7, 0.8], top5=0.9),
        row(
            protocol="linear",
            pooling="cls+mean",
            hyperparameters={"learning_rate": 0.01, "weight_decay": 1e-5},
            top5=0.9,
        ),
    ]
    lines = results_text(rows, width=width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    wanted = "low_label 10 per class 75.0 ± 7.1 [70.0, 79.6] cls+mean 1e-05 1246.8"
    assert set(wanted.split()) <= set(words)
    # A hyper-parameter stays beside its name.
    assert any("wd 1e-05" in line for line in lines)
    assert any("k 20," in line for line in lines)


def test_measures_table() -> None:
    measures = {
        "model": "runs/a",
        "layer": 3,
        "pooling": "mean",
        "num_images": 100,
        "dim": 384,
        "rank_me": 41.26,
        "alpha_req": None,
        "uniformity": -2.345,
    }
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(measures_table([measures]))
    line = capture.get().splitlines()[3]
    assert line.split() == ["runs/a", "3", "mean", "41.3", "100", "-2.35"]
