from __future__ import annotations

import csv
import functools
import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from lightly_mim.methods import SimMIM
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.runs import RunDirectory

FOLDER = Path(__file__).parents[2] / "benchmarks"

# Top-1 accuracies of four seeds that somebody might have measured.
TOP1 = {
    ("pretrained", "knn"): [0.79, 0.81, 0.805, 0.78],
    ("pretrained", "linear"): [0.80, 0.82, 0.79, 0.83],
    ("random initialisation", "knn"): [0.66, 0.65, 0.67, 0.655],
    ("random initialisation", "linear"): [0.64, 0.68, 0.66, 0.65],
    ("raw pixels", "knn"): [0.74, 0.74, 0.74, 0.74],
    ("raw pixels", "linear"): [0.79, 0.795, 0.79, 0.80],
}


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("common")


def make_run(
    common: ModuleType,
    seed: int,
    method: str = "SimMIM",
    top1: dict[tuple[str, str], list[float]] = TOP1,
) -> Any:
    rows = [
        {
            "model": "runs/a" if model == "pretrained" else model,
            "protocol": protocol,
            "layer": None if model == "raw pixels" else 5 + seed % 2,
            "pooling": "pixels" if model == "raw pixels" else "mean",
            "hyperparameters": {"k": 10} if protocol == "knn" else {"lr": 0.1},
            "top1": values[seed],
            "top1_low": values[seed] - 0.03,
            "top1_high": values[seed] + 0.02,
            "feature_seconds": 1.5,
            "seconds": 2.25,
            "num_train": 1968,
            "num_test": 656,
        }
        for (model, protocol), values in top1.items()
    ]
    results = {
        "rows": rows,
        "notes": [],
        "encoder": {"name": "vit", "options": {"depth": 8}, "img_size": [96, 64]},
        "versions": {"torch": "2.14"},
    }
    return common.Run(method, seed, Path(f"a-{seed}"), 100.0 + seed, 160.0, results)


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
        ("--devices 1,3", "devices", [1, 3]),
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
        ("--epochs 0", "from 1, got '0'"),
        ("--batch-size 1.5", "from 1, got '1.5'"),
        ("--lr fast", "invalid float"),
        ("--devices 0", "got '0'"),
        ("--devices two", "got 'two'"),
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


# Numbers.


@pytest.mark.parametrize("count", [2, 3, 10])
def test_paired_difference__scipy(common: ModuleType, count: int) -> None:
    rng = np.random.default_rng(count)
    a, b = rng.normal(75, 3, count).tolist(), rng.normal(70, 3, count).tolist()
    interval = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    difference = common.paired_difference(a, b, confidence=0.9)
    np.testing.assert_allclose(
        difference, [np.mean(np.subtract(a, b)), interval.low, interval.high]
    )


def test_paired_difference__same_on_every_seed(common: ModuleType) -> None:
    assert common.paired_difference([3.0, 5.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)


def test_paired_difference__needs_two_seeds(common: ModuleType) -> None:
    with pytest.raises(ValueError, match="two seeds or more, got 1"):
        common.paired_difference([1.0], [2.0])


def test_training_speed__counts_every_epoch(common: ModuleType, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.marker.write_text(json.dumps({"epochs": 3, "steps": 30}))
    (tmp_path / "metrics.csv").write_text(
        "step,images_per_second\n9,100\n9,\n19,200\n29,400\n"
    )
    seconds, speed = common.training_speed(run, batch_size=40)
    assert seconds == pytest.approx(400 / 100 + 400 / 200 + 400 / 400)
    assert speed == pytest.approx(1200 / 7)


# The table.


def test_table_lines__one_seed(common: ModuleType) -> None:
    header, lines = common.table_lines([make_run(common, 0)])
    assert header == [
        "", "kNN top-1 %", "layer", "linear top-1 %", "layer", "training", "images/s",
    ]  # fmt: skip
    assert lines == [
        ["SimMIM, pretrained", "79.0 [76.0, 81.0]", "5", "80.0 [77.0, 82.0]", "5",
         "1 min 40 s", "160"],
        ["random initialisation", "66.0 [63.0, 68.0]", "5", "64.0 [61.0, 66.0]", "5",
         "", ""],
        ["raw pixels", "74.0 [71.0, 76.0]", "", "79.0 [76.0, 81.0]", "", "", ""],
    ]  # fmt: skip


def test_table_lines__several_seeds(common: ModuleType) -> None:
    seeds = [0, 1, 2, 3]
    _, lines = common.table_lines([make_run(common, seed) for seed in seeds])
    cells = {line[0]: line[1:] for line in lines}
    for label, model in [("SimMIM, pretrained", "pretrained"), ("raw pixels",) * 2]:
        for column, protocol in [(0, "knn"), (2, "linear")]:
            values = 100 * np.array(TOP1[model, protocol])
            mean, spread = values.mean(), values.std(ddof=1)
            assert cells[label][column] == f"{mean:.1f} ± {spread:.1f}"
    assert cells["SimMIM, pretrained"][1] == "5, 6"
    assert cells["raw pixels"][1] == ""
    assert cells["SimMIM, pretrained"][4] == "1 min 42 s"
    for baseline in ("random initialisation", "raw pixels"):
        for column, protocol in [(0, "knn"), (2, "linear")]:
            a = 100 * np.array(TOP1["pretrained", protocol])
            b = 100 * np.array(TOP1[baseline, protocol])
            interval = scipy.stats.ttest_rel(a, b).confidence_interval()
            expected = (
                f"{(a - b).mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
            )
            assert cells[f"SimMIM - {baseline}"][column] == expected
    assert len(lines) == 5


def test_table_lines__methods_share_baselines_with_the_same_numbers(
    common: ModuleType,
) -> None:
    other = {
        (model, protocol): [value - 0.01 * (model == "random initialisation")] * 1
        for (model, protocol), (value, *_) in TOP1.items()
    }
    runs = [make_run(common, 0), make_run(common, 0, "MAE", other)]
    labels = [line[0] for line in common.table_lines(runs)[1]]
    assert labels == [
        "SimMIM, pretrained",
        "MAE, pretrained",
        "random initialisation (SimMIM)",
        "random initialisation (MAE)",
        "raw pixels",
    ]


def test_tables__rich_and_markdown_hold_every_cell(common: ModuleType) -> None:
    header, lines = common.table_lines([make_run(common, seed) for seed in range(4)])
    console = Console(file=io.StringIO(), width=common.LOG_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(common.rich_table(header, lines))
    text = capture.get()
    markdown = common.markdown_table(header, lines)
    for cell in [*header, *(cell for line in lines for cell in line)]:
        assert cell in text
        assert cell in markdown
    rows = [row.split("|")[1:-1] for row in markdown.splitlines()]
    assert {len(row) for row in rows} == {len(header)}
    assert [cell.strip() for cell in rows[2]] == lines[0]


def test_verdict(common: ModuleType) -> None:
    runs = [make_run(common, seed) for seed in range(4)]
    assert common.verdict(runs, "random initialisation") == (
        "SimMIM beats random initialisation on both protocols on every seed "
        "(0, 1, 2, 3)."
    )
    assert common.verdict(runs[:1], "raw pixels") == (
        "SimMIM beats raw pixels on both protocols with seed 0."
    )
    # 79 % and 79 % with seed 2 is no win.
    assert common.verdict(runs, "raw pixels") == (
        "SimMIM does not beat raw pixels everywhere: linear with seed 2 (+0.0 points)."
    )


def test_captions__name_images_and_seeds(common: ModuleType) -> None:
    one = " ".join(common.captions([make_run(common, 0)]))
    assert "656 test images" in one and "1968 training" in one and "bootstrap" in one
    several = " ".join(common.captions([make_run(common, 0), make_run(common, 2)]))
    assert "standard deviation over the seeds 0, 2" in several
    assert "Student's t" in several


def test_write_summary__one_line_per_run_model_and_protocol(
    common: ModuleType, tmp_path: Path
) -> None:
    runs = [make_run(common, seed) for seed in (0, 1)]
    common.write_summary(runs, "python x.py, --seeds 0 1", tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2
    common.write_summary(
        runs, "x", tmp_path / "own.csv", lambda run: {"twice": 2 * run.seed}
    )
    with (tmp_path / "own.csv").open(newline="") as file:
        own = list(csv.DictReader(file))
    assert list(own[0]) == ["twice", *list(rows[0])[1:]]
    assert [row["twice"] for row in own] == ["0"] * 6 + ["2"] * 6
    for row in rows:
        expected = TOP1[row["model"], row["protocol"]][int(row["seed"])]
        assert float(row["top1"]) == expected
    assert rows[0] | {"top1": "", "top1_low": "", "top1_high": ""} == {
        "method": "SimMIM",
        "encoder": "vit",
        "encoder_options": '{"depth": 8}',
        "img_size": "96x64",
        "seed": "0",
        "model": "pretrained",
        "protocol": "knn",
        "layer": "5",
        "pooling": "mean",
        "hyperparameters": '{"k": 10}',
        "top1": "",
        "top1_low": "",
        "top1_high": "",
        "num_train": "1968",
        "num_test": "656",
        "pretraining_seconds": "100.0",
        "images_per_second": "160.0",
        "evaluation_seconds": "3.8",
        "versions": '{"torch": "2.14"}',
        "run": "a-0",
        "command": "python x.py, --seeds 0 1",
    }
