"""That every table is made: the numbers depend on the machine."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from lightly_mim import masked_encoder

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def script(on_path: None) -> Any:
    return importlib.import_module("throughput")


@pytest.fixture
def small(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"Imagenette": (300, 40, 6), "ImageNet, a part": (400, 20, 5)}
    monkeypatch.setattr(script, "KNN_SIZES", sizes)
    monkeypatch.setattr(
        script,
        "masked_encoder",
        lambda name: masked_encoder(name, depth=1, patch_size=56),
    )


def lines_of(text: str) -> list[list[str]]:
    """The cells of all tables, without headers."""
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for table in tables
        for line in table.splitlines()[2:]
    ]


@pytest.mark.usefixtures("small")
def test_knn__predicts_what_lightly_does(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["evaluation", "--only", "knn", "--rounds", "1"])
    output = capsys.readouterr().out
    assert "20 queries, 400 x 384 features, 5 classes, 1 rounds" in output
    assert output.count("100.0000% of the predictions are the same.") == 2
    assert [line[0] for line in lines_of(output)] == [
        "lightly's knn_predict",
        "ours",
    ] * 2


@pytest.mark.filterwarnings(
    "ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"
)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("table", "rows"), [("grid", 3), ("linear", 2)])
def test_evaluation__tables(
    script: ModuleType, capsys: pytest.CaptureFixture[str], table: str, rows: int
) -> None:
    script.main(["evaluation", "--only", table, "--rounds", "1"])
    lines = lines_of(capsys.readouterr().out)
    assert len(lines) == rows
    assert all(float(line[-1].split()[0]) > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mae__leaves_patches_out(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--encoder vit_tiny_patch16_224 --batch-size 1 --rounds 1".split()
    script.main(["mae", *words])
    dense, sparse, cross = lines_of(capsys.readouterr().out)
    # A quarter of the patches and the class token: 50 of 197.
    assert 0.2 < float(sparse[1]) / float(dense[1]) < 0.3
    assert cross[1] == sparse[1]
    assert float(cross[2]) < float(sparse[2]) < float(dense[2])
    assert all(float(line[5].replace(",", "")) > 0 for line in (dense, sparse, cross))


def test_masks__tables(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "NUM_MASKS", 50)
    monkeypatch.setattr(script, "MASK_CALLS", 1)
    script.main(["masks", "--rounds", "2"])
    output = capsys.readouterr().out
    assert "50 of 14 x 14 patches, ratio 0.4, 2 rounds of 1" in output
    beit, lightly, block, numpy, random = lines_of(output)
    assert [float(line[2]) for line in (block, numpy, random)] == [79, 79, 79]
    # BEiT's algorithm and lightly's (of 78) give up when the rest does not fit.
    assert 70 < float(lightly[2]) <= 78
    assert 70 < float(beit[2]) <= 79
    for ours in (block, random):
        assert ours[3] == "1.00 [1.00, 1.00]"
    assert all(float(line[3].split()[0]) > 0 for line in (beit, lightly, numpy))


def test_refuses(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["mae", "--rounds", "0"])
    assert caught.value.code == 2
    assert "--rounds is at least 1, got 0" in capsys.readouterr().err
