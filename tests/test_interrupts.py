"""Ctrl-C while a program imports, reads, trains, evaluates: one line, exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightly_mim.training.signals import Preempted
from lightly_mim.training.trainer import calling

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "lightly_mim"]
TINY = (
    "--method SimMIM --method.encoder vit_tiny_patch16_224 --method.img_size 32 "
    "--method.mask_patch_size 8 --method.patch_size 8 --method.embed_dim 32 "
    "--method.depth 2 --method.num_heads 2 --batch_size 8 --accelerator cpu"
).split()

# Presses Ctrl-C as soon as a module is imported, and runs a program.
IMPORTING = """
import os, runpy, signal, sys
module, *sys.argv[:] = sys.argv[1:]
class Press:
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press)
if sys.argv[0] == "-m":
    runpy.run_module("lightly_mim", run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a program as a terminal does, which a shell's & would not."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def interrupted(words: list[str], text: str, **options: Any) -> str:
    """Presses Ctrl-C once a program has printed a text, and returns all it says."""
    said = ""
    with start(words, **options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if text in line:
                os.killpg(
                    process.pid, signal.SIGINT
                )  # a terminal's goes to workers too
                said += process.stdout.read()
    check(process.returncode, said)
    return said


def check(code: int, said: str) -> None:
    assert code == 130, said
    assert "Traceback" not in said and "Exception ignored" not in said, said


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("torch", ["-m", "evaluate", "--encoder", "x", "--data", "x"]),
        ("jsonargparse", ["-m", "evaluate", "--encoder", "x", "--data", "x"]),
        ("torch", [str(ROOT / "benchmarks" / "solar_cells.py")]),
        ("torch", [str(ROOT / "benchmarks" / "throughput.py")]),
    ],
)
def test_interrupt__of_imports(module: str, words: list[str]) -> None:
    with start([sys.executable, "-c", IMPORTING, module, *words]) as process:
        said, _ = process.communicate()
    check(process.returncode, said)
    name = "lightly-mim" if words[0] == "-m" else Path(words[0]).name
    assert said.strip() == f"{name}: interrupted."


def test_interrupt__of_submit_while_it_imports() -> None:
    pytest.importorskip("submitit")
    script = str(ROOT / "slurm" / "submit.py")
    with start([sys.executable, "-c", IMPORTING, "submitit", script]) as process:
        said, _ = process.communicate()
    check(process.returncode, said)
    assert said.strip() == "submit.py: interrupted."


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1 x cpu", "epoch 2/"])
def test_interrupt__of_pretrain(photos: Path, tmp_path: Path, text: str) -> None:
    words = ["pretrain", "--out", str(tmp_path / "run"), "--data", str(photos), *TINY]
    words += ["--epochs", "900", "--num_workers", "2"]
    said = interrupted([*PROGRAM, *words], text)
    assert said.rstrip().endswith(("by --resume.", "There is no run yet."))


@pytest.mark.slow
def test_interrupt__of_evaluate(photos: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--encoder", "vit_tiny_patch16_224", "--pretrained", "false"]
    words += ["--data", str(photos), "--protocols", "finetune", "--device", "cpu"]
    words += ["--num_workers", "2", "--out", str(tmp_path / "out")]
    said = interrupted([*PROGRAM, *words, "--finetune.epochs", "900"], "finetune")
    assert "The same command goes on with what is missing." in said


@pytest.mark.slow
def test_interrupt__of_a_benchmark(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "solar_cells.py")
    words = [sys.executable, script, "--quick", "--epochs", "900", "--out", "out"]
    said = interrupted(words, "epoch 1/", cwd=tmp_path)
    assert "Interrupted. Go on with: python benchmarks/solar_cells.py" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted(15)])
def test_calling__tells_lightnings_ways_to_end_apart(error: Any) -> None:
    class Stops(BoringModel):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise error

    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(BaseException) as raised, calling(trainer):
        trainer.test(Stops(), DataLoader(RandomDataset(32, 4)))
    assert raised.type is (error if error is KeyboardInterrupt else Preempted)
