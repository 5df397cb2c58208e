from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from torch import Tensor

from lightly_mim import SimMIM
from lightly_mim.methods import MIMOutput

TINY = [
    *("--encoder-option", "depth=1", "embed_dim=16", "num_heads=2", "patch_size=8"),
    *("--img-size", "32", "--batch-size", "4", "--steps", "5"),
]


class HostReading(SimMIM):
    """Reads a value of the device within a step."""

    def forward(self, images: Tensor, mask: Any = None) -> MIMOutput:
        output = super().forward(images, mask)
        scale = 1.0 if output.loss.item() < 1e9 else 2.0
        return output._replace(loss=scale * output.loss)


@pytest.fixture
def gpu_check(on_path: None) -> Any:
    return importlib.import_module("gpu_check")


def cells(printed: str) -> list[list[str]]:
    """Returns the table's lines."""
    lines = printed.partition("───")[2].splitlines()
    return [re.split("  +", line.strip()) for line in lines[1:] if "  " in line]


def test_cpu__says_what_only_a_gpu_can_tell(
    gpu_check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_check.main(["--device", "cpu", "--method", "SimMIM", *TINY])
    printed = capsys.readouterr().out
    exact, tf32, bf16, fp16 = cells(printed)
    assert exact[3:5] == ["0", "0"]  # it is the reference itself
    assert float(bf16[4]) > 0
    for line in (exact, bf16):
        assert line[-5:] == ["CUDA only"] * 3 + ["yes", "0"]
        assert float(line[5]) > 0
    for line in (tf32, fp16):
        assert line[2:] == ["CUDA only"] * 9
    assert "All checks passed." in printed


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("graph", "The step does not compile as one graph"),
        ("rounding", r"The gradient is off by \d.\de-\d+, more than 0e\+00"),
        ("resume", "told to stop and came to its end"),
    ],
)
def test_a_check_that_fails_ends_with_1(
    gpu_check: Any,
    broken: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if broken == "graph":
        monkeypatch.setitem(gpu_check.METHODS, "SimMIM", HostReading)
    if broken == "rounding":
        bf16 = gpu_check.PRECISIONS["bf16"]
        monkeypatch.setitem(gpu_check.PRECISIONS, "bf16", bf16._replace(gradient=0.0))
    if broken == "resume":
        monkeypatch.setattr(gpu_check, "CUT", 99)
    words = ["--device", "cpu", "--method", "SimMIM", "--precision", "bf16", *TINY]
    with pytest.raises(SystemExit) as error:
        gpu_check.main(words)
    assert error.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(f"1 failed:\nSimMIM, bf16: .*{said}", printed), printed
    assert "FAILED" in printed and "All checks passed" not in printed


def test_no_gpu_ends_with_2(
    gpu_check: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu_check.main([])
    assert error.value.code == 2
    assert "sees no GPU here. --device cpu tries" in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--encoder", "vit_tiny_patch16_224", "--encoder-option", "depth=2"]
    gpu_check.main([*words, "--steps", "20"])
    assert "CUDA only" not in capsys.readouterr().out


@pytest.mark.gpu
def test_gpu__a_step_that_waits_is_found(
    gpu_check: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(gpu_check.METHODS, "SimMIM", HostReading)
    words = ["--method", "SimMIM", "--precision", "32", *TINY, "--steps", "20"]
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert "A step waits for the device" in capsys.readouterr().out
