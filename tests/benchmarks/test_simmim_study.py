from __future__ import annotations

import csv
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import distance_transform_edt
from torch import Generator, Tensor

from lightly_mim.files import sealed
from lightly_mim.masking import RandomMasking
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.pretraining import check_pretraining

FOLDER = Path(__file__).parents[2] / "benchmarks"

# The large form and a Swin, in their geometry and small in everything else.
LARGE = "--data x --encoder-option depth=1 embed_dim=24 num_heads=2".split()
SWIN = (
    "--data x --encoder swin_tiny_patch4_window7_224 --encoder-option window_size=6 "
    "embed_dim=24 depths=[1,1,1,1] num_heads=[1,1,2,2]"
).split()
WORDS = (
    "--quick --epochs 2 --batch-size 16 --accelerator cpu --num-workers 0 "
    "--precision 32-true --encoder-option embed_dim=24 depth=2 num_heads=2"
).split()


@pytest.fixture(scope="module")
def script(on_path: None) -> Any:
    return importlib.import_module("simmim_study")


@pytest.fixture(scope="module")
def report(script: ModuleType) -> Any:
    return importlib.import_module("simmim_paper.tables")


@pytest.fixture(scope="module")
def figures(script: ModuleType) -> Any:
    return importlib.import_module("simmim_paper.figures")


def parse(script: ModuleType, *words: str) -> Any:
    return script.parser().parse_args(list(words))


def axes_of(script: ModuleType, *words: str) -> dict[str, list[Any]]:
    of = script.space(parse(script, *words))
    return {axis: of.axis(axis) for axis in script.AXES}


# The space.


@pytest.mark.parametrize(
    "words",
    [[], LARGE, pytest.param(SWIN, marks=pytest.mark.slow)],
    ids=["small", "large", "swin"],
)
def test_rows__can_be_pretrained(script: ModuleType, words: list[str]) -> None:
    arguments = parse(script, *words)
    names = script.names(arguments)
    assert len(names) == len(set(names)) > 40
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
        plan = script.plan(name, arguments)
        assert check_pretraining({"method": plan.build, **plan.pretraining}) is not None


@pytest.mark.parametrize("words", [[], LARGE, SWIN], ids=["small", "large", "swin"])
def test_rows__of_one_name_are_one_run(script: ModuleType, words: list[str]) -> None:
    runs: dict[str, str] = {}
    for axis, rows in axes_of(script, *words).items():
        names = [row.name for row in rows]
        assert len(set(names)) == len(names) > 2
        # One default of SimMIM, and of MAE if there is one; the resolution is that of
        # pixels, which the small form does not predict by default.
        assert names.count("default") == (axis != "resolution" or bool(words))
        for row in rows:
            assert runs.setdefault(row.name, repr(row.build)) == repr(row.build)
    assert len(set(runs.values())) == len(runs)


def test_rows__differ_from_the_default_in_one_part(script: ModuleType) -> None:
    part = {
        "masking": {"masking"},
        "ratio": {"masking"},
        "unit": {"masking"},
        "head": {"head"},
        "target": {"target"},
        "resolution": {"target"},
        "loss": {"loss"},
        "region": {"region"},
        "decoder": {"head", "decoder_depth"},
    }
    defaults = {SimMIM: "default", MAE: "mae"}
    rows = script.space(parse(script)).rows()
    for axis, own in axes_of(script).items():
        for row in own:
            usual = rows[defaults[row.method]].arguments
            changed = {
                name
                for name in row.arguments.keys() | usual.keys()
                if repr(row.arguments.get(name)) != repr(usual.get(name))
            }
            assert changed <= part[axis]
            assert bool(changed) == (row.name not in ("default", "mae"))


def test_rows__all_targets_are_those_of_both_methods(script: ModuleType) -> None:
    targets: dict[Any, list[str]] = {SimMIM: [], MAE: []}
    for row in axes_of(script)["target"]:
        targets[row.method].append(repr(row.arguments["target"]))
    assert targets[SimMIM] == targets[MAE] and len(targets[MAE]) == 8


# What reference pages have without the mark "from memory", by axis and row.
SIMMIM, MAE_ABLATION = "82.8", "84.9 / 73.5"
PAPER = {
    **{(axis, "default"): SIMMIM for axis in
       ("masking", "ratio", "unit", "head", "loss", "region", "decoder")},
    ("target", "target-pixels"): SIMMIM,
    ("resolution", "target-pixels"): SIMMIM,
    ("region", "region-all"): "81.7",
    ("masking", "mae"): MAE_ABLATION,
    ("masking", "mae-block-50"): "83.9 / 72.3",
    ("masking", "mae-block-75"): "82.8 / 63.9",
    ("masking", "mae-grid"): "84.0 / 66.0",
    ("target", "mae-pixels"): MAE_ABLATION,
    ("target", "mae"): "85.4 / 73.9",
    ("decoder", "mae-decoder-1"): "84.8 / 65.5",
    ("decoder", "mae"): "84.9 / 70.0",
    ("decoder", "mae-decoder-4"): "84.9 / 71.9",
    ("decoder", "mae-decoder-8"): MAE_ABLATION,
}  # fmt: skip
FROM_MEMORY = (
    "83.0 82.2 82.6 81.9 82.4 82.7 82.5 82.3 90.9 115.2 174.8 83.2 78.2 76.7".split()
)


def test_rows__the_papers_numbers_have_been_looked_up(script: ModuleType) -> None:
    found = {
        (axis, row.name): row.paper
        for axis, rows in axes_of(script).items()
        for row in rows
        if row.paper
    }
    assert found == PAPER
    large = [row.paper for rows in axes_of(script, *LARGE).values() for row in rows]
    assert {number for paper in large for number in paper.split(" / ") if number} == {
        number for paper in PAPER.values() for number in paper.split(" / ")
    }
    assert not any(number in paper for number in FROM_MEMORY for paper in large)


@pytest.mark.parametrize(
    ("words", "units", "left_out"),
    [
        ([], [8, 8, 16, 32], ["Units of 4 pixels", "Units of 64 pixels"]),
        (LARGE, [16, 16, 32, 64], ["Units of 4 pixels", "Units of 8 pixels"]),
        (SWIN, [4, 4, 8, 8, 16, 16, 32, 64], []),
        # 6 x 6 patches of 16: four of them do not tile.
        (
            [*LARGE, "--img-size", "96"],
            [16, 16, 32],
            ["Units of 4 pixels", "Units of 8 pixels", "Units of 64 pixels"],
        ),
    ],
    ids=["small", "large", "swin", "96 pixels"],
)
def test_units__all_that_fit(
    script: ModuleType, words: list[str], units: list[int], left_out: list[str]
) -> None:
    of = script.space(parse(script, *words))
    maskings = [row.arguments["masking"] for row in of.axis("unit")]
    assert [masking.mask_patch_size[0] for masking in maskings] == units
    notes = of.notes("unit")
    assert [note.partition(" are left out")[0] for note in notes] == left_out


def test_space__without_mae_where_the_encoder_needs_all_patches(
    script: ModuleType,
) -> None:
    of = script.space(parse(script, *SWIN))
    assert not any(row.method is MAE for row in of.rows().values())
    assert of.notes("decoder") == of.notes("target")
    assert "MAE is left out" in of.notes("decoder")[0]
    assert of.notes("head") == []
    assert of.unit == 32


def test_space__refuses_what_is_not_square(script: ModuleType) -> None:
    arguments = parse(script)
    space = script.space(arguments)
    with pytest.raises(ValueError, match="squares.*64 x 32"):
        type(space).of(space.form, {**space.arguments, "img_size": (64, 32)})


# The words.


def test_names__axes_and_rows(script: ModuleType) -> None:
    every = script.names(parse(script))
    assert script.names(parse(script, "--axis", "all")) == every
    some = script.names(parse(script, "--axis", "loss", "region"))
    assert some == ["default", "loss-l2", "loss-smooth-l1-1.0", "loss-smooth-l1-0.1",
                    "region-all", "region-visible"]  # fmt: skip
    assert script.names(parse(script, "--row", "mae", "default")) == ["mae", "default"]
    assert script.names(parse(script, "--quick")) == ["default", "mae"]
    assert script.names(parse(script, "--quick", "--axis", "all")) == every


def test_main__list(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--list", "--axis", "ratio", "--data", "imagenette"])
    names = [f"ratio-{n}" for n in (10, 20, 30, 40, 50)]
    names += ["default", "ratio-70", "ratio-80", "ratio-90"]
    assert capsys.readouterr().out == ",".join(names) + "\n"


def test_plan__rates_and_baselines(script: ModuleType) -> None:
    arguments = parse(script)
    simmim, mae = (script.plan(name, arguments) for name in ("default", "mae"))
    # pretrain takes the rate of 512 images for SimMIM, of 256 for MAE.
    assert simmim.pretraining["lr"] / 512 == mae.pretraining["lr"] / 256
    assert simmim.pretraining["lr"] * 32 / 512 == pytest.approx(1e-3)
    assert simmim.pretraining["validate"] is mae.pretraining["validate"] is False
    assert simmim.evaluation == {"baselines": ["random", "pixels"]}
    assert mae.evaluation == {"baselines": []}
    own = parse(script, *"--lr 0.5 --epochs 3 --batch-size 8 --data x".split())
    pretraining = script.plan("default", own).pretraining
    assert (pretraining["lr"], pretraining["epochs"]) == (0.5, 3)
    assert pretraining["batch_size"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--row ratio-15", "no row 'ratio-15' with these images and this encoder. Did"),
        ("--row mae mae", "--row names each one once"),
        ("--row mae --axis loss", "not allowed with"),
        ("--axis colour", "invalid choice: 'colour'"),
        ("--row default --img-size 56", "default: "),
        ("--row default --encoder vit_tinny", "timm has no model 'vit_tinny'"),
        ("--row default --encoder-option colour=red", "'colour'"),
        ("--row default --lr -1", "lr of pretrain is None or a number above 0"),
        ("--row default --batch-size 64", "has 32 training images"),
        ("--seeds 1 1", "--seed names each one once"),
        ("--workers 2 --devices 2", "runs of one device each"),
        ("--workers 0", "from 1, got '0'"),
        ("--method SimMIM", "unrecognized arguments"),
        ("--tables nowhere", "no evaluated row of a study in nowhere"),
        ("--stage evaluate", "There is no finished run"),
    ],
)
def test_main__refuses_before_anything_is_written(
    script: ModuleType,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    message: str,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        script.main([*WORDS, "--data", str(photos), "--out", str(out), *words.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_main__refuses_images_without_labels(
    script: ModuleType,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for data in (photos / "train" / "temple", photos / "train"):
        with pytest.raises(SystemExit) as exit_:
            script.main([*WORDS, "--data", str(data), "--out", str(tmp_path / "out")])
        assert exit_.value.code == 2
        assert "labelled training and test images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# A study.

ROWS = ["--row", "default", "ratio-90"]


@pytest.fixture(scope="module")
def finished(
    script: ModuleType, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A study of two rows, by one thread as in each of several workers."""
    out = tmp_path_factory.mktemp("studies") / "a"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        script.main([*WORDS, *ROWS, "--data", str(photos), "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    return out


def summary_of(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_numbers(out: Path, other: Path) -> None:
    """Compares weights and accuracies of two studies, bit for bit."""
    weights = sorted(file.relative_to(out) for file in out.rglob("*.safetensors"))
    assert weights
    for file in weights:
        if file.parent.name == "classifiers":  # they name their encoder by its path
            probe, same = load_file(out / file), load_file(other / file)
            assert probe.keys() == same.keys()
            assert all(torch.equal(probe[name], same[name]) for name in probe)
        else:
            assert (out / file).read_bytes() == (other / file).read_bytes()
    keys = ("axis", "row", "seed", "model", "protocol", "top1", "hyperparameters")
    found, expected = (
        [{key: row[key] for key in keys} for row in summary_of(path)]
        for path in (out, other)
    )
    assert found == expected


def test_main__writes_the_study(finished: Path) -> None:
    rows = summary_of(finished)
    assert [(row["row"], row["model"], row["protocol"]) for row in rows] == [
        *(
            ("default", model, protocol)
            for model in ("pretrained", "random initialisation", "raw pixels")
            for protocol in ("knn", "linear")
        ),
        ("ratio-90", "pretrained", "knn"),
        ("ratio-90", "pretrained", "linear"),
    ]
    assert rows[-1]["axis"] == "ratio" and rows[-1]["method"] == "SimMIM"
    assert float(rows[-1]["masked"]) == 15 / 16
    assert "masking ratio unit head" in rows[0]["axis"]
    html = (finished / "report.html").read_text()
    assert '<table class="sort" id="study">' in html
    for name in ("default-seed0", "ratio-90-seed0"):
        assert f"</i> {name}</td>" in html
    assert '"title": "kNN over ratio"' in html
    assert (finished / "figures" / "multiple_0.png").exists()
    page = (finished / "table.md").read_text()
    assert page.startswith("**Masking ratio, random**\n\n|  | masked % | AvgDist px |")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    labels = [line.split("|")[1].strip() for line in lines]
    assert labels[2:] == [
        "0.6 (default)", "0.9", "random initialisation", "raw pixels",
    ]  # fmt: skip
    assert lines[2].rstrip().endswith("| 82.8 |")
    assert "ImageNet-1K" in page and "mean a thing" in page and "One seed, 0" in page
    assert "Made with `python benchmarks/simmim_study.py --quick" in page
    config = (finished / "ratio-90-seed0" / "config.yaml").read_text()
    assert "validate: false" in config


def test_main__goes_on_where_it_was_cut(
    script: ModuleType,
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*WORDS, *ROWS, "--data", str(photos), "--out", str(tmp_path / "cut")]
    forward, calls = SimMIM.forward, []

    def cut(self: SimMIM, images: Tensor, mask: Any = None) -> Any:
        if isinstance(self.masking, RandomMasking) and self.masking.ratio == 0.9:
            calls.append(self.training)
            if sum(calls) == 4:  # in the second epoch of two steps
                raise KeyboardInterrupt
        return forward(self, images, mask)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(SimMIM, "forward", cut)
        script.main(words)
    assert exit_.value.code == 130
    assert capsys.readouterr().err.rstrip().endswith("--resume")
    assert (tmp_path / "cut" / "ratio-90-seed0" / "checkpoints").exists()
    assert not (tmp_path / "cut" / "ratio-90-seed0" / "finished.json").exists()
    marker = tmp_path / "cut" / "default-seed0" / "finished.json"
    before = marker.stat().st_mtime_ns
    script.main([*words, "--resume"])
    output = capsys.readouterr().out
    assert "Evaluated before" in output and "going on from" in output
    assert marker.stat().st_mtime_ns == before
    same_numbers(tmp_path / "cut", finished)


def test_main__begins_with_weights(
    script: ModuleType,
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows of both methods, with the encoder of a row that is there."""
    init, rows = str(finished / "default-seed0"), ["default", "mae", "head-mlp"]
    words = [*WORDS, "--row", *rows, "--data", str(photos), "--out", str(tmp_path)]
    script.main([*words, "--init", init])
    said = capsys.readouterr().out
    assert (
        "SimMIM from" in said and "takes the encoder, its mask token, the head" in said
    )
    assert "MAE from" in said and "What MAE has besides begins anew" in said
    assert "The head begins anew" in said
    summary = [row for row in summary_of(tmp_path) if row["model"] == "pretrained"]
    assert {row["row"] for row in summary} == {*rows}
    config = yaml.safe_load((tmp_path / "head-mlp-seed0" / "config.yaml").read_text())
    assert config["init"] == init


def test_main__stages_and_tables_of_an_array(
    script: ModuleType,
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As slurm/submit.py calls it: a directory for each row and seed."""
    words = [*WORDS, "--data", str(photos), "--devices", "1", "--num-nodes", "1"]
    for number, name in enumerate(ROWS[1:]):
        out = tmp_path / "tasks" / f"{number:02d}-row={name}-seed=0" / "run"
        for stage in ("train", "evaluate"):
            own = ["--row", name, "--seed", "0", "--out", str(out), "--resume"]
            script.main([*words, *own, "--stage", stage])
            assert (out / "summary.csv").exists() == (stage == "evaluate")
    capsys.readouterr()
    script.main(["--tables", str(tmp_path)])
    output = capsys.readouterr().out
    assert "Masking ratio, random" in output and "raw pixels" in output
    expected = [row | {"run": "", "command": ""} for row in summary_of(finished)]
    for row, other in zip(summary_of(tmp_path), expected, strict=True):
        for key in ("row", "seed", "model", "protocol", "top1", "avg_dist", "axis"):
            assert row[key] == other[key]
    assert "--tables" in (tmp_path / "table.md").read_text()
    last = output.splitlines()[-1]
    assert last.endswith(f"; open {tmp_path / 'report.html'} with a browser.")
    # Not the same run twice, and not another study.
    with pytest.raises(SystemExit):
        script.main(["--tables", str(tmp_path), str(finished)])
    assert "the same row with the same seed" in capsys.readouterr().err


def test_tables__refuses_another_study(
    report: ModuleType, finished: Path, tmp_path: Path
) -> None:
    for name, epochs in (("default-seed0", 2), ("ratio-90-seed0", 3)):
        (tmp_path / name).mkdir()
        for file in (
            "config.yaml",
            "finished.json",
            "metrics.csv",
            "results.json",
            "row.json",
        ):
            text = (finished / name / file).read_text()
            text = text.replace('"epochs": 2', f'"epochs": {epochs}')
            if file in ("finished.json", "results.json"):
                record = json.loads(text)
                del record["sha256"]
                text = json.dumps(sealed(record))
            (tmp_path / name / file).write_text(text)
    with pytest.raises(ValueError, match="of different studies"):
        report.read([tmp_path])
    (tmp_path / "ratio-90-seed0" / "results.json").unlink()  # it is made anew
    assert [each.run.method for each in report.read([tmp_path])] == ["default"]


@pytest.mark.slow
def test_script__workers_and_fine_tuning(
    script: ModuleType, finished: Path, photos: Path, tmp_path: Path
) -> None:
    words = [*WORDS, *ROWS, "--data", str(photos), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, FOLDER / "simmim_study.py", *words, "--workers", "2",
         "--finetune"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ratio-90, seed 0: knn" in done.stdout
    assert "fine-tune top-1 %" in done.stdout
    assert "Finished." in (tmp_path / "out" / "worker-1.log").read_text()
    for name in ROWS[1:]:
        weights = f"{name}-seed0/encoder.safetensors"
        one, two = (tmp_path / "out" / weights, finished / weights)
        assert one.read_bytes() == two.read_bytes()
    tuned = [
        row for row in summary_of(tmp_path / "out") if row["protocol"] == "finetune"
    ]
    assert len(tuned) == 3  # two rows and random initialisation


def test_workers__one_that_fails_is_told(
    script: ModuleType,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dead(multiprocessing.get_context("spawn").Process):  # type: ignore[misc]
        exitcode = 1

        def start(self) -> None: ...
        def join(self, timeout: float | None = None) -> None: ...
        def terminate(self) -> None: ...

    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(context, "Process", Dead, raising=False)
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda _: context)
    out = tmp_path / "out"
    words = [*WORDS, "--data", str(photos), "--out", str(out), "--workers", "2"]
    with pytest.raises(SystemExit) as exit_:
        script.main(words)
    assert exit_.value.code == 1
    assert "Not every row came to its end" in capsys.readouterr().err


# What is said of a row.


def test_measure__every_row_by_a_forward_pass(
    script: ModuleType, report: ModuleType
) -> None:
    arguments = parse(script, *"--quick --encoder-option depth=1".split())
    found = {
        name: report.measure(script.plan(name, arguments).build())
        for name in script.space(arguments).rows()
    }
    default = found["default"]
    assert all(
        0 < each["masked"] < 1 and each["avg_dist"] > 1 for each in found.values()
    )
    for name in ("head-mlp", "head-transformer-1", "head-inverse-swin-small"):
        assert found[name]["parameters"] > default["parameters"]
        assert found[name]["flops"] > default["flops"]
    assert found["loss-l2"] == default
    assert found["ratio-30"]["avg_dist"] < default["avg_dist"]
    assert found["mae-decoder-8"]["flops"] > found["mae"]["flops"]
    # 4 of 4 x 4 pixels instead of 64 of them.
    assert default["parameters"] - found["resolution-2"]["parameters"] == 49 * (64 - 16)


def test_measure__counts_by_hand(script: ModuleType, report: ModuleType) -> None:
    """A ViT of 2 blocks of width 48, 8 x 8 patches of 8 x 8 grey pixels."""
    found = report.measure(script.plan("default", parse(script, "--quick")).build())
    tokens, width, masked = 64 + 1, 48, 40  # 10 of 16 units of 4 patches
    products = 64 * 64 * width  # embedding of patches
    products += 2 * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    products += masked * width * 64  # head
    assert found["flops"] == 2 * products
    linear = (64 * width + width) + (width * 64 + 64)
    block = 12 * width**2 + 9 * width + 2 * 2 * width
    positions, tokens_and_norm = 65 * width, 2 * width + 2 * width
    assert found["parameters"] == linear + 2 * block + positions + tokens_and_norm
    assert found["masked"] == 40 / 64


# Tables of numbers that somebody might have measured.


def make(
    report: ModuleType, script: ModuleType, name: str, seed: int, top1: float
) -> Any:
    study: Any = importlib.import_module("lightly_mim.reporting.study")
    of = script.space(parse(script))
    models = ["runs/a"]
    if name == "default":
        models += ["random initialisation", "raw pixels"]
    rows = [
        {
            "model": model,
            "protocol": protocol,
            "top1": top1 - number / 10 + (protocol == "linear") / 50,
            "top1_low": top1 - 0.03,
            "top1_high": top1 + 0.02,
            "num_train": 1968,
            "num_test": 656,
        }
        for number, model in enumerate(models)
        for protocol in ("knn", "linear")
    ]
    about = {
        "row": name,
        "method": of.rows()[name].method.__name__,
        "axes": {
            axis: {"place": place, "shown": row.shown, "paper": row.paper}
            for axis in script.AXES
            for place, row in enumerate(of.axis(axis))
            if row.name == name
        },
        "notes": {axis: of.notes(axis) for axis in script.AXES},
        "study": {
            "data": "solar-cells",
            "encoder": {"encoder": "vit", "img_size": 64},
            "epochs": 6,
            "batch_size": 32,
            "note": "A small form.",
            "default": "SimMIM",
        },
        "masked": 0.625,
        "avg_dist": 8.6335,
        "parameters": 355_200,
        "flops": 49_300_000,
    }
    run = study.Run(name, seed, Path(f"{name}-{seed}"), 60.0, 150.0, {"rows": rows})
    return report.Found(run, about)


def test_tables__one_seed(report: ModuleType, script: ModuleType) -> None:
    found = [
        make(report, script, name, 0, top1)
        for name, top1 in [("unit-4", 0.7), ("default", 0.72)]
    ]
    [table] = report.tables(found)  # the other axes have default rows alone
    assert table.title == "Masked unit, random"
    assert table.header == [
        "", "masked %", "AvgDist px", "M params", "GFLOPs", "images/s",
        "kNN top-1 %", "linear top-1 %", "paper's",
    ]  # fmt: skip
    sizes = ["62", "8.6", "0.355", "0.0493", "150"]
    assert table.lines == [
        ["16 px, 2 x 2 patches (default)", *sizes,
         "72.0 [69.0, 74.0]", "74.0 [69.0, 74.0]", "82.8"],
        ["32 px, 4 x 4 patches", *sizes,
         "70.0 [67.0, 72.0]", "72.0 [67.0, 72.0]", ""],
        ["random initialisation", *[""] * 5,
         "62.0 [69.0, 74.0]", "64.0 [69.0, 74.0]", ""],
        ["raw pixels", *[""] * 5, "52.0 [69.0, 74.0]", "54.0 [69.0, 74.0]", ""],
    ]  # fmt: skip
    assert [note[:16] for note in table.notes] == [
        "Units of 4 pixel",
        "Units of 64 pixe",
    ]
    said = " ".join(report.captions(found))
    assert "1968 training and 656 test images" in said and "One seed, 0" in said
    assert "ImageNet-1K" in said and "A small form." in said
    assert "CC-BY-NC-SA-4.0" in said


def test_tables__seeds_and_shared_rows(report: ModuleType, script: ModuleType) -> None:
    found = [
        make(report, script, name, seed, top1 + seed / 100)
        for name, top1, seeds in [
            ("default", 0.72, 3),
            ("head-transformer-1", 0.7, 3),
            ("target-pixels", 0.5, 1),
        ]
        for seed in range(seeds)
    ]
    made = {table.title: table for table in report.tables(found)}
    # Blocks are on two axes; pixels are alone on that of resolution.
    assert list(made) == [
        "Prediction head", "Prediction target", "Depth of the decoder",
    ]  # fmt: skip
    head, target = made["Prediction head"], made["Prediction target"]
    assert "AvgDist px" not in head.header
    assert [line[0] for line in head.lines] == [
        "linear (default)", "transformer, 1 block",
        "random initialisation", "raw pixels",
    ]  # fmt: skip
    assert head.lines[1][5:7] == ["71.0 ± 1.0", "73.0 ± 1.0"]
    assert target.lines[0][0] == "pixels, seed 0"
    assert target.lines[0][5] == "50.0 [47.0, 52.0]"
    assert made["Depth of the decoder"].lines[0][0] == "linear, 0 blocks (default)"
    assert "over the seeds 0, 1, 2" in " ".join(report.captions(found))


def test_tables__rows_without_a_default_to_compare_with(
    report: ModuleType, script: ModuleType
) -> None:
    found = [
        make(report, script, name, 0, 0.7)
        for name in ("ratio-10", "ratio-30", "head-mlp")
    ]
    ratio, rows = report.tables(found)
    assert [line[0] for line in ratio.lines] == ["0.1", "0.3"]
    assert ratio.header[-1] == "linear top-1 %"  # no number of the paper's
    assert (rows.title, [line[0] for line in rows.lines]) == ("Rows", ["head-mlp"])
    found = [make(report, script, name, 0, 0.7) for name in ("default", "mae")]
    [rows] = report.tables(found)  # --quick
    assert [line[0] for line in rows.lines] == [
        "default", "mae", "random initialisation", "raw pixels",
    ]  # fmt: skip


# The picture.


def test_distance_curves__scipy(figures: ModuleType) -> None:
    curves = figures.distance_curves(64, 8)
    assert list(curves) == [
        "random 4 px", "random 8 px", "random 16 px", "block-wise, 8 px",
        "square, 8 px", "central square, 8 px", "inverse block, 8 px", "grid, 8 px",
    ]  # fmt: skip
    for points in curves.values():
        assert points == sorted(points) and all(0 < share < 1 for share, _ in points)
    [(share, distance)] = curves["grid, 8 px"]
    assert share == 0.75
    masks = figures.GridMasking(8)(
        figures.NUM_DRAWN, (64, 64), None, Generator().manual_seed(0)
    ).pixels((64, 64))
    expected = [
        distance_transform_edt(mask[0].numpy())[mask[0].numpy()].mean()
        for mask in masks
    ]
    assert distance == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    # Larger units leave pixels farther away at every ratio that both have.
    small, large = dict(curves["random 4 px"]), dict(curves["random 16 px"])
    assert all(small[share] < large[share] for share in small.keys() & large.keys())
    assert {0.5, 0.75} <= small.keys() & large.keys()


def test_main__plot(
    script: ModuleType,
    figures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(figures, "NUM_DRAWN", 2)
    script.main(["--plot", "--img-size", "32", "--out", str(tmp_path)])
    assert f"{tmp_path}/avgdist.png" in capsys.readouterr().out
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["avgdist.png", "masks.png"]
    picture = Image.open(tmp_path / "avgdist.png")
    colours = picture.convert("RGB").getcolors(2**20)
    assert min(picture.size) > 500 and colours is not None and len(colours) > 50
