from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightly_mim
from lightly_mim import __main__, cli
from lightly_mim.cli import main
from lightly_mim.optim import Recipe
from lightly_mim.shorthand import spell_out
from lightly_mim.spelling import as_options
from lightly_mim.training.signals import Preempted

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
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"lightly-mim evaluate --encoder {out} --data {photos}" in last
    main(["pretrain", *where, *VIT, *RUN, "--resume"])
    evaluation = ["--encoder", str(out), "--data", str(photos), "--num_workers", "0"]
    layers = ["--layers", "0", "-1", "--protocols", "knn", "--knn.ks", "1", "5"]
    main(["evaluate", *evaluation, *layers, "--out", str(out)])
    shown = capsys.readouterr().out
    assert "knn" in shown
    last = f"Everything is in {out}; open {out}/report.html with a browser."
    assert shown.splitlines()[-1] == last
    main(["evaluate", *evaluation, *layers])
    assert "Nothing was written: add --out" in capsys.readouterr().out.splitlines()[-1]
    results = json.loads((out / "results.json").read_text())
    assert [row["protocol"] for row in results["rows"]] == ["knn"]
    assert results["arguments"]["layers"] == [0, -1]
    assert results["rows"][0]["hyperparameters"]["k"] in (1, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere", *VIT, *RUN], "nowhere does not exist"),
        (["--data", "PHOTOS", *VIT, *RUN, "--epochs", "0"], "got --epochs 0"),
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
        raise lightly_mim.optim.NonFiniteLossError("the loss became NaN")

    monkeypatch.setattr(cli, "COMMANDS", {"pretrain": fail, "evaluate": fail})
    with pytest.raises(SystemExit) as error:
        main(["pretrain"])
    assert error.value.code == 1
    assert capsys.readouterr().err == "lightly-mim: error: the loss became NaN\n"


def test_memory_that_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for act in (lambda: bytearray(2**62), lambda: torch.empty(2**60)):
        monkeypatch.setattr(cli, "COMMANDS", {"pretrain": act, "evaluate": act})
        with pytest.raises(SystemExit) as error:
            main(["pretrain"])
        assert error.value.code == 1
        assert "error: There is not enough memory: " in capsys.readouterr().err

    def fail() -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(cli, "COMMANDS", {"pretrain": fail, "evaluate": fail})
    with pytest.raises(RuntimeError, match="something else"):
        main(["pretrain"])


ENCODER = "--method.encoder vit_tiny_patch16_224"
MISTAKES = {
    f"--method SimMIM {ENCODER} --method.masking BlokMasking":
        "There is no masking 'BlokMasking'. Did you mean BlockMasking? There are: Blo",
    f"--method MAE {ENCODER} --method.target pixels":
        "There is no target 'pixels'. Did you mean Pixels? There are: ",
    f"--method SimMIM {ENCODER} --method.loss x.Y":
        "x.Y cannot be imported: ModuleNotFoundError",
    f"--method SimMIM {ENCODER} --method.masking.ratio 0.5":
        "--method.masking.ratio is an argument of a masking, which is named before ",
    f"--method SimMIM {ENCODER} --method.head.depth 1":
        "--method.head.depth is an argument of a head, which is named before ",
    f"--method SimMIM {ENCODER} "
    "--method.masking BlockMasking --method.masking.ratoi 1":
        "BlockMasking has no option --method.masking.ratoi. Did you mean ratio? It has",
    f"{ENCODER} --method SimMIM":
        "--method stands before --method.encoder",
    "--epochs 1 --method.depth 3 --method MAE": "--method stands before --method.depth",
    "--method.img_size 32": "--method.img_size needs a method: --method and its name",
    "--method SimMIM": "--method SimMIM needs an encoder: --method.encoder and",
    "--method CrossMAE --method.img_size 64": "--method CrossMAE needs an encoder",
    "--method DINOv3": "no method 'DINOv3'. There are: MAE, ",
    "--method simmim": "no method 'simmim'. Did you mean SimMIM?",
    "": "y does not exist. Give a folder of images",
    "--recipe swin_base_100ep": "--recipe swin_base_100ep is a method's: pass the meth",
    f"--method SimMIM {ENCODER} --epochs 3 --minutes 3":
        "Pass --epochs or --minutes, not both",
    "--bach-size 8": "no option --bach_size. Did you mean --batch_size? lightly-mim p",
    "--epochs many": "--epochs takes a whole number, got many.",
    "--precision half": "--precision takes one of 32-true, bf16-mixed, 16-mixed, got h",
    "--recipe.lr x": "--recipe.lr takes a number, got x.",
    f"--method MAE {ENCODER} --method.img-size big":
        "--method.img_size takes a whole number or two numbers, got big.",
    "--lr": "--lr has no value.",
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_in_short(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["pretrain", "--out", "x", "--data", "y", *words.split()])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert MISTAKES[words] in said
    assert said.startswith("lightly-mim: error: ") and said.count("\n") == 1
    assert len(said) < 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train", "There is no command 'train'. There are: 'pretrain', 'evaluate'"),
        ("evaluate --encoder x", "--data is missing. lightly-mim evaluate --help"),
        ("evaluate", "--encoder and --data are missing."),
        (
            "evaluate --encoder x --data y --protocols knn --finetune.epochs 5",
            "--finetune.epochs does nothing: --protocols is knn. Add finetune to it",
        ),
        (
            "evaluate --encoder x --data y --linear_mae.lr 5",
            "--linear_mae.lr does nothing: --protocols is knn linear.",
        ),
        (
            "evaluate --encoder x --data y --pixel-size 8 --baselines random",
            "--pixel_size does nothing: --baselines is random. Add pixels to it",
        ),
        (
            "evaluate_dense --encoder x --data y --protocols knn --linear.epochs 1",
            "--linear.epochs does nothing: --protocols is knn.",
        ),
        ("evaluate --encoder x --data y --protocols linear --linear.epochs 0",
         "epochs of Linear is a whole number of at least 1, got epochs=0"),
        ("evaluate --encoder x --data y --holdout 1.5 --config no.yaml",
         "--config: File does not exist"),
    ],
)  # fmt: skip
def test_evaluate__mistakes(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(words.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("got batch_size=0.", "got --batch_size 0."),
        ('Give data="a b", or val="..."', "Give --data 'a b', or --val ..."),
        ("on_error='skip', img_size=(64, 96)",
         "--on_error skip, --method.img_size 64 96"),
        ("window_size=7 and validate=False", "window_size=7 and --validate false"),
        ("pass resume to go on with it, overwrite to replace it, or another folder as "
         "out.",
         "pass --resume to go on with it, --overwrite to replace it, or another folder "
         "as --out."),
        ("resume goes on. Leave init out to go on; or leave resume out and pass out.",
         "--resume goes on. Leave --init out to go on; or leave --resume out and pass "
         "--out."),
        ("Begin data anew: pass resume to go on with the run in out.",
         "Begin data anew: pass --resume to go on with the run in --out."),
        ("It ran out to go on, as data in val", "It ran out to go on, as data in val"),
        ("such as val/a.jpg in out/b", "such as val/a.jpg in out/b"),
        ("pass --resume to go on with it, --overwrite to replace it",
         "pass --resume to go on with it, --overwrite to replace it"),
        ("precision=None: pass Pretraining(..., batch_size=...)",
         "precision=None: pass Pretraining(..., batch_size=...)"),
        ("the batch_size is the epochs", "the batch_size is the epochs"),
    ],
)  # fmt: skip
def test_messages_have_the_spelling_of_the_command_line(
    message: str, said: str
) -> None:
    words = ["pretrain", "--method", "SimMIM"]
    assert as_options(message, lightly_mim.pretrain, words) == said


def options(
    a: int,
    layers: list[int] | None = None,
    devices: int | str | list[int] = "auto",
    size: int | tuple[int, int] | None = None,
    words: list[str] | None = None,
    parts: list[Recipe] | None = None,
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
        ("--layers 0,-1 --a 3", "--layers [0,-1] --a 3"),
        ("--layers 0,1 -1", "--layers [0,1,-1]"),
        ("--layers 0, 1,", "--layers [0,1]"),
        ("--parts {a:1,b:2}", "--parts [{a:1,b:2}]"),
        ("--words a,b", '--words ["a,b"]'),
        ("--words a,b c", '--words ["a,b",c]'),
        ("--devices 0,1", "--devices 0,1"),
        ("--devices 1", "--devices 1"),
        ("--devices auto --a 3", "--devices auto --a 3"),
        ("--devices 0 1", "--devices [0,1]"),
        ("--size 32", "--size 32"),
        ("--size 32 64", "--size [32,64]"),
        ("--a=3", "--a 3"),
        ("--resume --a 3", "--resume true --a 3"),
        ("--resume false --a 3", "--resume false --a 3"),
        ("--a 3 --resume", "--a 3 --resume true"),
        ("--linear.rates 2 2 6 2", "--linear.rates [2,2,6,2]"),
        ("--linear.img-size 64 96 --a 1", "--linear.img_size [64,96] --a 1"),
        ("--names a,b c: d.e", '--names ["a,b","c:",d.e]'),
        ("--windows [1,2] [3,4]", "--windows [[1,2],[3,4]]"),
        (
            "--batch-size=8 --save-every_minutes 3",
            "--batch_size 8 --save_every_minutes 3",
        ),
        ("--data a-b --lr=-1", "--data a-b --lr -1"),
    ],
)
def test_words(given: str, read: str) -> None:
    words = spell_out(["evaluate", *given.split()], {"evaluate": options})
    assert " ".join(words[1:]) == read


MINE = """
from lightly_mim.methods import SimMIM
from lightly_mim.targets import Pixels


class Mine(SimMIM):
    def __init__(self, encoder: str, strength: int = 1, **options):
        super().__init__(encoder, **options)
        self.strength = strength


class Closed(SimMIM):
    def __init__(self, encoder: str) -> None:
        super().__init__(encoder)


class MyPixels(Pixels):
    pass


def other() -> int:
    return 1
"""


def test_pretrain__method_of_ones_own(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own_method.py").write_text(MINE)
    (tmp_path / "docstring_parser.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    before = list(sys.path)
    method = ["--method", "own_method.Mine", *VIT[2:], "--method.strength", "3"]
    made = cli.check(["pretrain", "--out", "x", "--data", "x", *method, *RUN])
    assert sys.path == [*before, str(tmp_path)]  # last
    assert made is not None and len(made.encoder.vit.blocks) == 2
    assert made.strength == 3
    target = ["--method.target", "own_method.MyPixels"]
    made = cli.check(["pretrain", "--out", "x", "--data", "x", *VIT, *target])
    assert type(made.target).__name__ == "MyPixels"  # type: ignore[union-attr]
    for name, message in {
        "own_method.Closed": "Closed has no option --method.img_size. It has: --m",
        "own_method.Nothing": "own_method.Nothing cannot be imported: AttributeError",
        "own_method.MyPixels": "There is no method 'own_method.MyPixels'",
        "os.system": "There is no method 'os.system'",
    }.items():
        with pytest.raises(SystemExit):
            main(["pretrain", "--out", "x", "--data", "x", "--method", name, *VIT[2:]])
        assert message in capsys.readouterr().err


ROOT = Path(lightly_mim.__file__).parents[1]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(
            "-P;-c;from lightly_mim.cli import main\nmain()",  # as the console script
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11), reason="has no option -P"
            ),
        ),
        "-m;lightly_mim",
        "-m;lightly_mim;pretrain",
        "{root}/benchmarks/solar_cells.py",
        "{root}/slurm/submit.py",
    ],
)
def test_files_where_one_stands_are_not_executed(start: str, tmp_path: Path) -> None:
    for name in ("docstring_parser", "jsonargparse", "yaml", "rich", "timm", "torch"):
        (tmp_path / f"{name}.py").write_text("print('executed')\nraise SystemExit(9)")
    done = subprocess.run(
        [sys.executable, *start.format(root=ROOT).split(";"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "executed" not in done.stdout
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--batch_size 2048", True),
        ("--recipe swin_base_100ep", True),  # its batches have 2048 images
        ("", False),  # chosen for the images
        ("--batch_size {more}", True),
        ("--batch_size {all}", False),
        ("--batch_size 2048 --data nowhere", False),
    ],
)
def test_check__batch_of_more_images_than_there_are(
    words: str, refused: bool, photos: Path
) -> None:
    images = len(lightly_mim.data.open_data(photos)[0])  # type: ignore[arg-type]
    words = words.format(more=images + 1, all=images)
    full = ["pretrain", "--out", "x", "--data", str(photos), *VIT, *words.split()]
    if refused:
        with pytest.raises(ValueError, match=rf"has {images} training images.*--batch"):
            cli.check(full)
    else:
        cli.check(full)


@pytest.mark.parametrize("val", ["abbey", "a b"])
def test_check__batch_whatever_the_classes_are(
    photos: Path, tmp_path: Path, val: str
) -> None:
    data = Path(shutil.copytree(photos, tmp_path / "photos"))
    (data / "val" / "temple").rename(data / "val" / val)
    words = ["pretrain", "--out", "x", "--data", str(data), *VIT, "--batch_size"]
    cli.check([*words, "32"])
    with pytest.raises(ValueError, match="has 32 training images.*--batch_size 33"):
        cli.check([*words, "33"])


def test_check__batch_of_a_run_that_goes_on() -> None:
    cli.check(["pretrain", "--out", "x", "--resume", "--batch_size", "8"])


def program(*words: str) -> str:
    command = [sys.executable, "-m", "lightly_mim", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help__names_every_command() -> None:
    told = program("--help")
    assert told == program() == __main__.HELP
    named = re.findall(r"^  ([\w-]+)  ", told, re.MULTILINE)
    assert sorted(named) == sorted(cli.COMMANDS)


def test_help__leaves_pytorch_alone() -> None:
    code = (
        "import sys; from lightly_mim import __main__\n"
        "for words in ['--help'], ['pretrain', '-h'], ['evaluate-dense', '--help']:\n"
        "    sys.argv[1:] = words; __main__.main()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_help__is_what_the_parser_says() -> None:
    """`make help` writes it anew."""
    code = (
        "import contextlib, io, json; from lightly_mim import cli; told = {}\n"
        "for name in cli.COMMANDS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, \\\n"
        "            contextlib.suppress(SystemExit):\n"
        "        cli.main([name, '--help'])\n"
        "    told[name] = out.getvalue()\n"
        "print(json.dumps(told))"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"COLUMNS": "88"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    folder = Path(__main__.__file__).parent / "help"
    if "WRITE_HELP" in os.environ:
        for name, text in told.items():
            (folder / f"{name}.txt").write_text(text)
    kept = {file.stem: file.read_text() for file in folder.iterdir()}
    assert kept.keys() == told.keys()
    for name, text in told.items():
        # Where argparse breaks its lines changes from one Python to the next.
        assert kept[name].split() == text.split(), f"{name}: run make help"


def test_version() -> None:
    assert program("--version") == f"lightly-mim {lightly_mim.__version__}\n"


def test_completion__in_a_real_bash() -> None:
    script = program("--completion", "bash")
    ask = """
    COMP_WORDS=(lightly-mim pretrain --save_every_mi); COMP_CWORD=2
    $(complete -p lightly-mim | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2>/dev/null
    echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["--save_every_minutes"], done.stderr


def test_completion__of_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--completion", "fish"])
    assert "takes one of bash, zsh, tcsh, got fish" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["pretrain small a", "convert a.pth --to timm"])
def test_main__words_without_an_option(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2
    said = f"{words.split()[1]!r} stands behind no option, such as --out."
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error", "code", "said"),
    [
        (["pretrain", "--out", "begun"], KeyboardInterrupt(), 130, "go on with it by"),
        (["pretrain", "--out", "x"], KeyboardInterrupt(), 130, "there is no run yet"),
        (["pretrain", "--data", "x"], KeyboardInterrupt(), 130, "interrupted.\n"),
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
    tmp_path: Path,
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "auto_cli", fail)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == code
    assert said in capsys.readouterr().err.lower()
