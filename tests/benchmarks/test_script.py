from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest

from lightly_mim.optim import NonFiniteLossError


@pytest.fixture(scope="module")
def script(on_path: None) -> Any:
    return importlib.import_module("studies.script")


def make_parser() -> Any:
    options: Any = importlib.import_module("studies.options")
    defaults = dict.fromkeys(["encoder", "img_size"], "x")
    return options.study_parser("s.py", "What.", "How.", {"out": "runs/s", **defaults})


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("That is wrong."), 2, "s.py: error: That is wrong.\n"),
        (NonFiniteLossError("NaN."), 1, "s.py: error: NaN.\n"),
        (OSError("Disk full."), 1, "s.py: error: Disk full.\n"),
        (
            KeyboardInterrupt(),
            130,
            "\nInterrupted. Go on with: python benchmarks/s.py --epochs 3 --resume\n",
        ),
    ],
)
def test_script__exit_codes(
    script: Any,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def main(arguments: Any, command: str) -> None:
        assert arguments.epochs == 3
        assert command == "python benchmarks/s.py --overwrite --epochs 3"
        raise error

    words = ["--overwrite", "--epochs", "3"]
    with pytest.raises(SystemExit) as exit_:
        script.script(make_parser)(main)(words)
    assert exit_.value.code == code
    assert capsys.readouterr().err == message


def test_script__what_cannot_resume_is_called_again(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: Any, command: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        script.script(lambda: argparse.ArgumentParser(prog="s.py"))(main)([])
    assert exit_.value.code == 130
    assert "Go on with: python benchmarks/s.py\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch_size 8 --encoder_option depth_x=2", "batch-size 8 encoder-option"),
        ("--img_size=32 --num-workers 0", "img-size=32 num-workers"),
        ("--out a_b --method_option mask_ratio=0.5", "out a_b method-option"),
        ("--num_nodes 2 --seeds 1", "num-nodes 2 seeds"),
    ],
)
def test_script__both_spellings(script: Any, words: str, said: str) -> None:
    found: list[Any] = []
    for given in (words, words.replace("--", "--").replace("_size", "-size")):
        script.script(make_parser)(lambda *seen: found.append(seen))(given.split())
    spelled = script.spell(words.split())
    assert " ".join(spelled).replace("--", "").startswith(said)
    assert found[0][0] == found[1][0] == make_parser().parse_args(spelled)
    assert f" {' '.join(spelled)}" in found[0][1]


def test_spell__leaves_other_words(script: Any) -> None:
    words = ["a_b", "--lr=1_0", "-x_y", "masking=A(b_c=1)", "--"]
    assert script.spell(words) == words


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("got batch_size=0.", "got --batch-size 0."),
        ("img_size=(64, 96) or num_workers=2", "--img-size 64 96 or --num-workers 2"),
        ("layers=3 and accelerator='tpu'", "layers=3 and --accelerator tpu"),
    ],
)
def test_script__messages_in_its_own_words(
    script: Any, capsys: pytest.CaptureFixture[str], message: str, said: str
) -> None:
    def main(arguments: Any, command: str) -> None:
        raise ValueError(message)

    with pytest.raises(SystemExit):
        script.script(make_parser)(main)([])
    assert capsys.readouterr().err == f"s.py: error: {said}\n"
