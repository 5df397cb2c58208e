from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightly_mim
from lightly_mim import cli
from lightly_mim.cli import main
from lightly_mim.preemption import Preempted

VIT = [
    *("--method", "SimMIM", "--method.encoder", "vit_tiny_patch16_224"),
    *("--method.img_size", "32", "--method.mask_patch_size", "8"),
    # timm's own options pass through.
    *("--method.patch_size", "8", "--method.embed_dim", "32", "--method.depth", "2"),
    *("--method.num_heads", "2"),
]
RUN = [
    *("--epochs", "1", "--batch_size", "8", "--accelerator", "cpu"),
    *("--num_workers", "0", "--tensorboard", "false", "--precision", "32-true"),
    *("--devices", "1"),
]


def test_pretrain_then_evaluate(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    where = ["--out", str(out), "--data", str(photos)]
    main(["pretrain", *where, *VIT, *RUN])
    assert (out / "encoder.safetensors").exists()
    assert f"lightly-mim evaluate --encoder {out} --data {photos}" in (
        capsys.readouterr().out
    )
    main(["pretrain", *where, *VIT, *RUN, "--resume"])
    evaluation = ["--encoder", str(out), "--data", str(photos), "--num_workers", "0"]
    layers = ["--layers", "0", "-1", "--protocols", "knn", "--knn.ks", "1", "5"]
    main(["evaluate", *evaluation, *layers, "--out", str(out)])
    assert "knn" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [row["protocol"] for row in results["rows"]] == ["knn"]
    assert results["arguments"]["layers"] == [0, -1]
    assert results["rows"][0]["hyperparameters"]["k"] in (1, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere", *VIT, *RUN], "nowhere does not exist"),
        (["--data", "PHOTOS", *VIT, *RUN, "--epochs", "0"], "epochs=0"),
        (["--data", "PHOTOS", *VIT, *RUN, "--method.depht", "2"], "depht"),
        (["--data", "PHOTOS", "--method", "MEA", *RUN], "no method 'MEA'.*SimMIM"),
        (["--data", "PHOTOS", *VIT, "--bach_size", "8"], "bach_size"),
        (["--data", "PHOTOS", *VIT, "--epochs", "many"], "many"),
        (["--data", "PHOTOS", *VIT, "--recipe", "best"], "no recipe 'best'"),
        (["--data", "PHOTOS", *VIT, *RUN, "--devices", "cuda:7"], "cuda:7"),
    ],
)
def test_pretrain__wrong_words_end_with_2(
    photos: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [str(photos) if word == "PHOTOS" else word for word in words]
    with pytest.raises(SystemExit) as error:
        main(["pretrain", "--out", str(tmp_path / "run"), *words])
    assert error.value.code == 2
    text = capfd.readouterr().err
    assert re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_failed_runs_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise lightly_mim.pretraining.NonFiniteLossError("the loss became NaN")

    monkeypatch.setattr(cli, "COMMANDS", {"pretrain": fail, "evaluate": fail})
    with pytest.raises(SystemExit) as error:
        main(["pretrain"])
    assert error.value.code == 1
    assert capsys.readouterr().err == "lightly-mim: error: the loss became NaN\n"


def options(
    a: int,
    layers: list[int] | None = None,
    devices: int | str | list[int] = "auto",
    size: int | tuple[int, int] | None = None,
    resume: bool = False,
) -> None:
    pass


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--layers 1 2 -1 --a 3", "--layers [1,2,-1] --a 3"),
        ("--a 3 --layers 1", "--a 3 --layers [1]"),
        ("--layers [1,2] --a 3", "--layers [1,2] --a 3"),
        ("--layers=0 1", "--layers [0,1]"),
        ("--devices 1", "--devices 1"),
        ("--devices auto --a 3", "--devices auto --a 3"),
        ("--devices 0 1", "--devices [0,1]"),
        ("--size 32", "--size 32"),
        ("--size 32 64", "--size [32,64]"),
        ("--a=3", "--a 3"),
        ("--resume --a 3", "--resume true --a 3"),
        ("--resume false --a 3", "--resume false --a 3"),
        ("--a 3 --resume", "--a 3 --resume true"),
    ],
)
def test_words(given: str, read: str) -> None:
    words: Any = cli._join_lists(cli._split(given.split()), options)
    assert " ".join(cli._say_true(words, options)) == read


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightly_mim", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pretrain" in done.stdout
    assert "evaluate" in done.stdout


@pytest.mark.parametrize(
    ("words", "error", "code", "said"),
    [
        (["pretrain", "--out", "x"], KeyboardInterrupt(), 130, "go on with it by"),
        (["evaluate", "--out=x"], KeyboardInterrupt(), 130, "the same command goes"),
        (["evaluate", "--out", "x"], Preempted(signal.SIGTERM), 143, "the same comm"),
        (["evaluate", "--data", "x"], KeyboardInterrupt(), 130, "interrupted.\n"),
    ],
)
def test_main__interrupted(
    words: list[str],
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "auto_cli", fail)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == code
    assert said in capsys.readouterr().err.lower()
