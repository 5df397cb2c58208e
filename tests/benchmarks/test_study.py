from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

from lightly_mim.methods import SimMIM


@pytest.fixture(scope="module")
def study(on_path: None) -> Any:
    return importlib.import_module("studies.study")


def make_parser() -> Any:
    options: Any = importlib.import_module("studies.options")
    defaults = dict.fromkeys(["encoder", "img_size"], "x")
    return options.study_parser("s.py", "What.", "How.", {"out": "runs/s", **defaults})


@pytest.mark.parametrize(
    ("words", "cuda", "device"),
    [
        ("", True, None),
        ("--accelerator cpu", True, "cpu"),
        ("--accelerator mps", False, None),
        ("--devices 2", True, None),
        ("--devices 2,3", True, "cuda:2"),
        ("--devices 2 3", True, "cuda:2"),
        ("--devices 2,3", False, None),
    ],
)
def test_evaluation_device(
    study: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    cuda: bool,
    device: str | None,
) -> None:
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: cuda)
    arguments = make_parser().parse_args(words.split())
    assert study.evaluation_device(arguments) == device


@pytest.mark.parametrize(
    ("batch_size", "recipe", "refused"),
    [(33, None, 33), (32, None, 0), (None, "swin_base_100ep", 2048), (None, None, 0)],
)
def test_check__batch_of_more_images_than_there_are(
    study: Any,
    photos: Path,
    tmp_path: Path,
    batch_size: int | None,
    recipe: str | None,
    refused: int,
) -> None:
    settings = {"batch_size": batch_size, "recipe": recipe}
    build = functools.partial(SimMIM, "vit_tiny_patch16_224", depth=1)
    plans = {"SimMIM": study.Plan(build, settings)}
    arguments = make_parser().parse_args(["--out", str(tmp_path / "out")])
    made = study.Study(arguments, str(photos), plans, last_layers=1, evaluation={})
    if refused:
        message = f"SimMIM: .* has 32 training images.*got batch_size={refused}"
        with pytest.raises(ValueError, match=message):
            made.check()
    else:
        made.check()
    assert not (tmp_path / "out").exists()
