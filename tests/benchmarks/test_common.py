from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightly_mim.methods import SimMIM
from lightly_mim.optim import NonFiniteLossError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("common")


# Parser.


def make_parser(common: ModuleType) -> Any:
    defaults = dict.fromkeys(["encoder", "img_size", "epochs", "batch_size", "lr"], "x")
    return common.build_parser("s.py", "What.", "How.", {"out": "runs/s", **defaults})


def test_parser__defaults(common: ModuleType) -> None:
    arguments = make_parser(common).parse_args([])
    assert arguments.out == Path("runs/s")
    assert arguments.method == ["SimMIM"]
    assert arguments.seed == [0]
    assert arguments.encoder is arguments.epochs is arguments.lr is None
    assert arguments.devices == "auto"
    assert not arguments.resume and not arguments.overwrite


def test_parser__offers_all_methods_but_not_their_base(common: ModuleType) -> None:
    assert "SimMIM" in common.METHODS
    assert not {"MaskedImageModel", "MIMOutput"} & set(common.METHODS)


def test_parser__of_a_script_with_plans_of_its_own(common: ModuleType) -> None:
    defaults = dict.fromkeys(["encoder", "img_size", "epochs", "batch_size", "lr"], "x")
    parser = common.build_parser(
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
def test_parser__reads(common: ModuleType, words: str, name: str, value: Any) -> None:
    assert getattr(make_parser(common).parse_args(words.split()), name) == value


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
    common: ModuleType, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        make_parser(common).parse_args(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


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
    common: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    cuda: bool,
    device: str | None,
) -> None:
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: cuda)
    arguments = make_parser(common).parse_args(words.split())
    assert common._evaluation_device(arguments) == device


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
def test_run_script__exit_codes(
    common: ModuleType,
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
        common.run_script(make_parser(common), main, words)
    assert exit_.value.code == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch_size 8 --encoder_option depth_x=2", "batch-size 8 encoder-option"),
        ("--img_size=32 --num-workers 0", "img-size=32 num-workers"),
        ("--out a_b --method_option mask_ratio=0.5", "out a_b method-option"),
        ("--num_nodes 2 --seeds 1", "num-nodes 2 seeds"),
    ],
)
def test_run_script__both_spellings(common: ModuleType, words: str, said: str) -> None:
    found: list[Any] = []
    for given in (words, words.replace("--", "--").replace("_size", "-size")):
        common.run_script(
            make_parser(common), lambda *seen: found.append(seen), given.split()
        )
    parser = make_parser(common)
    spelled = common.spell(parser, words.split())
    assert " ".join(spelled).replace("--", "").startswith(said)
    assert found[0][0] == found[1][0] == parser.parse_args(spelled)
    assert f" {' '.join(spelled)}" in found[0][1]


def test_spell__leaves_other_words(common: ModuleType) -> None:
    words = ["--no_such", "a_b", "--lr=1_0", "-x_y", "masking=A(b_c=1)", "--"]
    assert common.spell(make_parser(common), words) == words


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("got batch_size=0.", "got --batch-size 0."),
        ("img_size=(64, 96) or num_workers=2", "--img-size 64 96 or --num-workers 2"),
        ("layers=3 and accelerator='tpu'", "layers=3 and --accelerator tpu"),
    ],
)
def test_run_script__messages_in_its_own_words(
    common: ModuleType, capsys: pytest.CaptureFixture[str], message: str, said: str
) -> None:
    def main(arguments: Any, command: str) -> None:
        raise ValueError(message)

    with pytest.raises(SystemExit):
        common.run_script(make_parser(common), main, [])
    assert capsys.readouterr().err == f"s.py: error: {said}\n"


@pytest.mark.parametrize(
    ("batch_size", "recipe", "refused"),
    [(33, None, 33), (32, None, 0), (None, "swin_base_100ep", 2048), (None, None, 0)],
)
def test_check_study__batch_of_more_images_than_there_are(
    common: ModuleType,
    photos: Path,
    tmp_path: Path,
    batch_size: int | None,
    recipe: str | None,
    refused: int,
) -> None:
    settings = {"batch_size": batch_size, "recipe": recipe}
    build = functools.partial(SimMIM, "vit_tiny_patch16_224", depth=1)
    plans = {"SimMIM": common.Plan(build, settings)}
    arguments = make_parser(common).parse_args(["--out", str(tmp_path / "out")])
    if refused:
        message = f"SimMIM: .* has 32 training images.*got batch_size={refused}"
        with pytest.raises(ValueError, match=message):
            common.check_study(arguments, str(photos), plans, 1)
    else:
        common.check_study(arguments, str(photos), plans, 1)
    assert not (tmp_path / "out").exists()
