from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def options(on_path: None) -> Any:
    return importlib.import_module("studies.options")


def make_parser(options: Any) -> Any:
    defaults = dict.fromkeys(["encoder", "img_size", "epochs", "batch_size", "lr"], "x")
    return options.study_parser("s.py", "What.", "How.", {"out": "runs/s", **defaults})


def test_parser__defaults(options: Any) -> None:
    arguments = make_parser(options).parse_args([])
    assert arguments.out == Path("runs/s")
    assert arguments.method == ["SimMIM"]
    assert arguments.seed == [0]
    assert arguments.encoder is arguments.epochs is arguments.lr is None
    assert arguments.devices == "auto"
    assert not arguments.resume and not arguments.overwrite


def test_parser__offers_all_methods_but_not_their_base(options: Any) -> None:
    assert "SimMIM" in options.METHODS
    assert not {"MaskedImageModel", "MIMOutput"} & set(options.METHODS)


def test_parser__of_a_script_with_plans_of_its_own(options: Any) -> None:
    defaults = dict.fromkeys(["encoder", "img_size", "epochs", "batch_size", "lr"], "x")
    parser = options.study_parser(
        "s.py", "What.", "How.", {"out": "runs/s", **defaults}, methods=False
    )
    arguments = parser.parse_args([])
    assert not hasattr(arguments, "method") and not hasattr(arguments, "method_option")
    assert arguments.encoder_option == []


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--seed 3", "seed", [3]),
        ("--seeds 0 1 2", "seed", [0, 1, 2]),
        ("--method SimMIM", "method", ["SimMIM"]),
        ("--devices 2", "devices", 2),
        ("--devices 1,3", "devices", "1,3"),
        ("--devices 1 3", "devices", [1, 3]),
        ("--compile --weight-decay 0.1", "given",
         {"compile": True, "weight_decay": 0.1}),
        ("--epochs 3", "batch_size", None),
        ("--encoder-option depth=2 x=1e-3", "encoder_option",
         [("depth", 2), ("x", 1e-3)]),
        ("--encoder-option a=true --encoder-option b=False c=x", "encoder_option",
         [("a", True), ("b", False), ("c", "x")]),
        ("--method-option size=[8,4]", "method_option", [("size", [8, 4])]),
        ("--method-option size=8=4", "method_option", [("size", "8=4")]),
    ],
)  # fmt: skip
def test_parser__reads(options: Any, words: str, name: str, value: Any) -> None:
    assert getattr(make_parser(options).parse_args(words.split()), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method SimCLR", "'SimCLR' (choose from"),
        ("--seed -1", "--seed"),
        ("--seeds", "expected at least one"),
        ("--epochs 0", "got --epochs 0"),
        ("--epochs", "--epochs has no value"),
        ("--batch-size 1.5", "--batch_size takes a whole number, got 1.5"),
        ("--lr fast", "--lr takes a number, got fast"),
        ("--minutes 3", "unrecognized"),
        ("--precision fp8", "bf16-mixed"),
        ("--encoder-option depth", "KEY=VALUE, got 'depth'"),
        ("--resume --overwrite", "not allowed with"),
        ("--epoch 3", "unrecognized"),
    ],
)
def test_parser__refuses(
    options: Any, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        make_parser(options).parse_args(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
