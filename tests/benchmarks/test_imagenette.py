from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torchvision
import yaml

from lightly_mim.losses import SmoothL1
from lightly_mim.methods import SimMIM

# 8 steps of a recipe of 500,000 are worth a warning, which has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore:This run takes")

FOLDER = Path(__file__).parents[2] / "benchmarks"

# The recipe's Beit, small enough for a second.
TINY = (
    "--encoder-option depth=2 embed_dim=32 num_heads=2 --img-size 64 --epochs 2 "
    "--batch-size 8 --size 160px --num-workers 0 --accelerator cpu "
    "--precision 32-true"
).split()


@pytest.fixture(scope="module")
def script(on_path: None) -> Any:
    return importlib.import_module("imagenette")


@pytest.fixture(scope="module")
def data_dir(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imagenette's layout, with two of its class names."""
    root = tmp_path_factory.mktemp("datasets")
    for split in ("train", "val"):
        for name, source in (("n01440764", "temple"), ("n02102040", "flower")):
            target = root / "imagenette2-160" / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(photos / split / source)
    return root


@pytest.fixture(scope="module")
def finished(
    script: ModuleType, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A study of one seed."""
    out = tmp_path_factory.mktemp("studies") / "a"
    script.main([*TINY, "--data-dir", str(data_dir), "--out", str(out)])
    return out


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refusal(script: ModuleType, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs the script, which has to end with 2, and returns what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([*TINY, *words])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("imagenette.py: error:") == 1
    return message


def test_main__takes_the_recipe(finished: Path) -> None:
    config = yaml.safe_load((finished / "SimMIM-seed0" / "config.yaml").read_text())
    assert config["recipe"]["source"].endswith("vit_base__800ep")
    init = config["method"]["init_args"]
    assert init["encoder"] == "beit_base_patch16_224"
    assert init["masking"] == {
        "class_path": "lightly_mim.masking.RandomMasking",
        "init_args": {"mask_patch_size": 32, "ratio": 0.6},
    }
    options = config["method"]["dict_kwargs"]
    assert options["use_shared_rel_pos_bias"] is True
    assert options["depth"] == 2


def test_main__writes_the_study(finished: Path, data_dir: Path) -> None:
    results = json.loads((finished / "SimMIM-seed0" / "results.json").read_text())
    rows = rows_of(finished)
    assert [(row["model"], row["protocol"]) for row in rows] == [
        (model, protocol)
        for model in ("pretrained", "random initialisation", "raw pixels")
        for protocol in ("knn", "linear")
    ]
    for row, result in zip(rows, results["rows"], strict=True):
        assert float(row["top1"]) == result["top1"]
        assert row["num_test"] == "12"
    assert float(rows[0]["images_per_second"]) > 0
    table = (finished / "table.md").read_text()
    assert table.startswith("**imagenette2-160: 32 training and 12 test images**")
    assert "| SimMIM, pretrained |" in table
    command = f"python benchmarks/imagenette.py {' '.join(TINY)} --data-dir {data_dir}"
    assert f"`{command} --out {finished}`" in table
    page = (finished / "report.html").read_text()
    for row in rows:
        assert f'data-value="{row["top1"]}"' in page
    assert (finished / "figures" / "loss.json").exists()


def test_main__stages_give_what_one_command_gives(
    script: ModuleType,
    finished: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = ["--data-dir", str(data_dir), "--out", str(out), "--stage"]
    message = refusal(script, capsys, *words, "evaluate")
    assert "There is no finished run" in message and not out.exists()
    script.main([*TINY, *words, "train"])
    assert (out / "SimMIM-seed0" / "finished.json").exists()
    assert not (out / "SimMIM-seed0" / "results.json").exists()
    assert not (out / "summary.csv").exists()
    message = refusal(script, capsys, *words, "evaluate", "--epochs", "3")
    assert "epochs: 2 in the run, 3 now" in message
    # As in a job of its own, which has one process whatever trained.
    script.main([*TINY, *words, "evaluate", "--devices", "8", "--num-nodes", "4"])
    assert [row["top1"] for row in rows_of(out)] == [
        row["top1"] for row in rows_of(finished)
    ]


def test_main__begins_with_weights(
    script: ModuleType,
    finished: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a run at another size, by both methods, in stages."""
    out, init = tmp_path / "out", str(finished / "SimMIM-seed0")
    words = ["--data-dir", str(data_dir), "--out", str(out), "--img-size", "96"]
    words += ["--stage", "train", "--init"]
    message = refusal(script, capsys, *words, str(tmp_path / "nowhere"))
    assert "There are no weights" in message and not out.exists()
    script.main([*TINY, *words, init])
    said = capsys.readouterr().out
    assert f"SimMIM from {init} (the run {init}): takes the encoder, its mask" in said
    assert "img_size (64, 64) -> (96, 96)" in said
    words[words.index("train")] = "evaluate"
    message = refusal(script, capsys, *words, "vit_base_patch16_224.mae")
    assert f"init: {init!r} in the run, 'vit_base_patch16_224.mae' now" in message
    script.main([*TINY, *words, init])
    config = yaml.safe_load((out / "SimMIM-seed0" / "config.yaml").read_text())
    assert config["init"] == init
    table = (out / "table.md").read_text()
    assert "| SimMIM, pretrained |" in table and f"--init {init}`" in table


def test_main__resumes_with_more_seeds(
    script: ModuleType,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    words = [*TINY, "--data-dir", str(data_dir), "--out", str(out)]
    script.main(words)
    before = rows_of(out)
    marker = (out / "SimMIM-seed0" / "finished.json").stat().st_mtime_ns
    evaluated: list[str] = []
    study: Any = importlib.import_module("studies.study")
    evaluate = study.evaluate

    def spy(path: Path, *args: Any, **options: Any) -> Any:
        evaluated.append(path.name)
        return evaluate(path, *args, **options)

    monkeypatch.setattr(study, "evaluate", spy)
    words.append("--resume")
    script.main([*words, "--seeds", "0", "1"])
    assert evaluated == ["SimMIM-seed1"]
    assert (out / "SimMIM-seed0" / "finished.json").stat().st_mtime_ns == marker
    rows = rows_of(out)
    assert len(rows) == 12
    changing = {"command": ""}
    assert [row | changing for row in rows[:6]] == [row | changing for row in before]
    output = capsys.readouterr().out
    assert "±" in output
    assert "SimMIM - raw pixels" in output
    assert "on every seed" in output or "does not beat" in output
    assert "SimMIM-seed0/reconstructions/epoch_0002.png" in output

    # Results of other settings are not what was asked for.
    monkeypatch.setattr(script, "LAST_LAYERS", 1)
    script.main([*words, "--seeds", "0"])
    assert evaluated == ["SimMIM-seed1", "SimMIM-seed0"]
    assert "Evaluating again" in capsys.readouterr().out
    assert {row["layer"] for row in rows_of(out)} == {"1", ""}


def test_main__goes_on_with_an_interrupted_study(
    script: ModuleType,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any folder with train/ and val/ serves; the cut comes before the evaluation."""
    study: Any = importlib.import_module("studies.study")
    words = [*TINY, "--data-dir", str(photos), "--out", str(tmp_path / "cut")]
    words += ["--reconstruct-every", "0"]  # no picture to name at the end

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(study, "evaluate", interrupt)
        script.main(words)
    assert exit_.value.code == 130
    hint = capsys.readouterr().err
    assert hint.rstrip().endswith("--resume")
    script.main([*words, "--resume"])
    assert len(rows_of(tmp_path / "cut")) == 6


def test_main__two_methods_in_one_table(
    script: ModuleType,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Smooth(SimMIM):
        """A method that the scripts have never heard of."""

        def __init__(self, encoder: str, beta: float = 1.0, **options: Any) -> None:
            super().__init__(encoder, loss=SmoothL1(beta), **options)

    monkeypatch.setitem(script.METHODS, "Smooth", Smooth)
    # A seed with which a random class token differs from the mean on twelve images.
    words = [*TINY, "--data-dir", str(data_dir), "--seeds", "4"]
    words += ["--method", "SimMIM", "Smooth"]
    out = tmp_path / "out"
    script.main([*words, "--out", str(out), "--recipe", "vit_base_800ep"])
    assert {row["method"] for row in rows_of(out)} == {"SimMIM", "Smooth"}
    losses = [
        (out / f"{method}-seed4" / "metrics.csv").read_text()
        for method in ("SimMIM", "Smooth")
    ]
    assert losses[0] != losses[1]
    table = (out / "table.md").read_text()
    labels = [line.split("|")[1].strip() for line in table.splitlines() if "|" in line]
    assert labels[2:] == [
        "SimMIM, pretrained",
        "Smooth, pretrained",
        # SimMIM's are means; of an unknown method the class token is tried, too.
        "random initialisation (SimMIM)",
        "random initialisation (Smooth)",
        "raw pixels",
    ]


@pytest.mark.slow
def test_script__two_processes_and_two_seeds(data_dir: Path, tmp_path: Path) -> None:
    words = [*TINY, "--data-dir", str(data_dir), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, FOLDER / "imagenette.py", *words, "--devices", "2",
         "--seeds", "0", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("SimMIM - raw pixels") == 1
    assert len(rows_of(tmp_path / "out")) == 12


def test_main__refuses_a_study_that_is_there(
    script: ModuleType,
    finished: Path,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--data-dir", str(data_dir), "--out", str(finished)]
    assert "--overwrite" in refusal(script, capsys, *words, "--seed", "7")
    assert not (finished / "SimMIM-seed7").exists()
    (finished / "summary.csv").rename(finished / "moved.csv")
    try:
        message = refusal(script, capsys, *words, "--seeds", "7", "0")
    finally:
        (finished / "moved.csv").rename(finished / "summary.csv")
    assert "a finished run in" in message
    assert not (finished / "SimMIM-seed7").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1", "1"], "--seed names each one once"),
        (["--recipe", "vit_giant"], "vit_base_800ep"),
        (["--encoder", "vit_tinny"], "timm has no model 'vit_tinny'"),
        (["--encoder-option", "colour=red"], "unexpected keyword argument 'colour'"),
        (["--method-option", "mask_patch_size=48"], "mask_patch_size 48 x 48"),
        (
            ["--method-option", "mask_ratio=much"],
            "between 0 and 1, got mask_ratio='much'",
        ),
        (["--img-size", "80"], "80 x 80 pixels does not divide"),
        (["--batch-size", "64"], "has 32 training images"),
    ],
)
def test_main__refuses_before_anything_is_written(
    script: ModuleType,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    told = refusal(
        script, capsys, "--data-dir", str(data_dir), "--out", str(out), *words
    )
    assert message in told
    assert not out.exists()


def test_main__refuses_a_file_as_out(
    script: ModuleType,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "file"
    out.touch()
    words = ["--data-dir", str(data_dir), "--out", str(out)]
    assert f"{out} is a file" in refusal(script, capsys, *words)


def test_script__without_images(tmp_path: Path) -> None:
    """As a user starts it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, FOLDER / "imagenette.py", "--data-dir", tmp_path / "none"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("imagenette.py: error: Cannot read Imagenette")
    assert "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320" in done.stderr
    assert "--data-dir" in done.stderr
    assert "python benchmarks/solar_cells.py" in done.stderr
    assert not any(tmp_path.iterdir())


def test_main__download_without_network(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", offline)
    out = str(tmp_path / "out")
    message = refusal(
        script, capsys, "--download", "--data-dir", str(tmp_path / "d"), "--out", out
    )
    assert "Name or service not known" in message
    assert "--data-dir" in message and "solar_cells.py" in message


def test_plan__another_encoder_takes_the_recipe_without_its_options(
    script: ModuleType,
) -> None:
    words = "--encoder vit_tiny_patch16_224 --img-size 64 --encoder-option depth=2"
    arguments = script.parser().parse_args(words.split())
    plan = script.plan("SimMIM", arguments)
    encoder = plan.build().encoder
    assert encoder.name == "vit_tiny_patch16_224"
    assert encoder.img_size == (64, 64)
    assert encoder.options == {"depth": 2, "drop_path_rate": 0.0}
    assert plan.pretraining == {
        "recipe": "vit_base_800ep",
        "epochs": 800,
        "batch_size": 256,
        "lr": None,
    }


def test_parser__help_says_what_a_new_user_asks(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--method --encoder --epochs --batch-size --data-dir --download --devices "
        "--precision --seed --out --recipe"
    ).split():
        assert f"  {option}" in text
    assert "default: 800" in text
    assert "solar_cells.py" in text
