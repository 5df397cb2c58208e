from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lightly_mim import defaults
from lightly_mim.data.named import solar_cells

# Smaller still than --quick.
WORDS = (
    "--quick --encoder-option patch_size=16 embed_dim=24 depth=2 num_heads=2 "
    "--batch-size 256 --accelerator cpu"
).split()


@pytest.fixture(scope="module")
def script(on_path: None) -> Any:
    return importlib.import_module("solar_cells")


@pytest.mark.slow
def test_main__quick(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    script.main([*WORDS, "--out", str(out)])

    output = capsys.readouterr().out
    assert "1968 training and 656 test images" in output
    assert "CC-BY-NC-SA-4.0" in output and "Buerhop" in output
    assert "cells of one module may lie on both sides" in output
    assert "points (95 %)" in output
    picture = out / "SimMIM-seed0" / "reconstructions" / "epoch_0001.png"
    assert f"SimMIM's reconstructions: {picture}\n" in output
    assert picture.exists()
    assert f"; open {out / 'report.html'} with a browser." in output
    assert output.endswith(
        "Next, the real thing, in minutes:\n"
        "  python benchmarks/solar_cells.py --overwrite\n"
    )
    for label in ("SimMIM, pretrained", "random initialisation", "raw pixels"):
        assert any(line.strip().startswith(label) for line in output.splitlines())

    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["num_test"] == "656" for row in rows)
    # Four classes, the most frequent of which has 37 % of the images.
    assert all(float(row["top1"]) > 0.4 for row in rows)
    config = yaml.safe_load((out / "SimMIM-seed0" / "config.yaml").read_text())
    assert config["data"] == "solar-cells"
    assert config["method"]["init_args"]["in_chans"] == 1

    words = ["--img-size", "64", "--init", str(out / "SimMIM-seed0"), "--stage"]
    script.main([*WORDS, *words, "train", "--out", str(tmp_path / "further")])
    said = capsys.readouterr().out
    assert "takes the encoder, its mask token, the head." in said
    assert "img_size (96, 96) -> (64, 64)" in said


def test_main__without_the_images(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec: Any = lambda name: None  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(SystemExit) as exit_:
        script.main(["--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def plan_of(script: ModuleType, *words: str, method: str = "SimMIM") -> Any:
    return script.plan(method, script.parser().parse_args(list(words)))


@pytest.mark.parametrize("method", ["SimMIM", "MAE"])
def test_plan__constants(script: ModuleType, method: str) -> None:
    plan = plan_of(script, method=method)
    encoder = plan.build().encoder
    assert encoder.name == script.ENCODER
    assert encoder.in_chans == 1
    assert encoder.img_size == (script.IMG_SIZE, script.IMG_SIZE)
    assert encoder.grid == (8, 8)
    assert encoder.embed_dim == script.ENCODER_OPTIONS["embed_dim"]
    # All else is what the defaults choose for that many images.
    assert plan.pretraining == {"epochs": script.EPOCHS, "validate": False}
    chosen = plan.build().default_recipe(len(solar_cells("train")), epochs=24)
    assert (chosen.batch_size, chosen.lr, chosen.lr_batch_size) == (32, 1e-3, 32)


def test_encoder_is_what_pretrain_chooses(script: ModuleType) -> None:
    _, chosen = defaults.method(num_images=1968, side=300, grey=True, gpu=False)
    plan = plan_of(script).build.keywords
    assert {name: plan[name] for name in chosen} == chosen


def test_plan__parts_of_a_method(script: ModuleType) -> None:
    mixture = "MixtureMasking([RandomMasking(16, .5), BlockMasking(16, ratio=.5)])"
    words = [f"masking={mixture}", "target=HOG()", "loss=SmoothL1(beta=2)"]
    method = plan_of(script, "--method-option", *words).build()
    assert [(type(m).__name__, m.ratio) for m in method.masking.maskings] == [
        ("RandomMasking", 0.5),
        ("BlockMasking", 0.5),
    ]
    assert type(method.target).__name__ == "HOG"
    assert method.loss.beta == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("masking=BlokMasking(16)", "no part 'BlokMasking'; there are: .*BlockMasking"),
        ("masking=BlockMasking(16, 2)", "strictly between 0 and 1"),
        ("loss=SmoothL1(gamma=2)", "gamma"),
        ("target=__import__('os').getcwd()", "target of SimMIM is None or a Target"),
        ("masking=open('x')", "no part 'open'"),
    ],
)
def test_plan__refuses_parts(
    script: ModuleType, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    with pytest.raises((SystemExit, ValueError)) as ended:
        plan_of(script, "--method-option", word).build()
    assert re.search(message, capsys.readouterr().err + str(ended.value))


def test_plan__options_win(script: ModuleType) -> None:
    plan = plan_of(
        script,
        *"--quick --epochs 3 --lr 0.5 --img-size 80 --batch-size 8".split(),
        *"--encoder-option depth=1 --method-option mask_ratio=0.3".split(),
    )
    method = plan.build()
    assert method.encoder.num_layers == 1
    assert method.encoder.img_size == (80, 80)
    assert method.masking.ratio == 0.3
    assert plan.pretraining["epochs"] == 3
    assert plan.pretraining["lr"] == 0.5
    assert plan.pretraining["batch_size"] == 8


def test_plan__another_encoder_without_the_options_of_the_default(
    script: ModuleType,
) -> None:
    words = "--encoder deit_tiny_patch16_224 --encoder-option depth=1"
    encoder = plan_of(script, *words.split()).build().encoder
    assert encoder.options == {"depth": 1, "drop_path_rate": 0.0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--quick", "  python benchmarks/solar_cells.py --overwrite\n"),
        (
            "--out runs/demo --overwrite",
            "  python benchmarks/solar_cells.py --out runs/demo --seeds 0 1 2 "
            "--resume\n",
        ),
        (
            "--seeds 0 1 2 --out a",
            "  lightly-mim evaluate --encoder a/SimMIM-seed0 --data solar-cells",
        ),
    ],
)
def test_next_command(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    words: str,
    expected: str,
) -> None:
    arguments = script.parser().parse_args(words.split())
    script._say_next(arguments, f"python benchmarks/solar_cells.py {words}")
    assert expected in capsys.readouterr().out
