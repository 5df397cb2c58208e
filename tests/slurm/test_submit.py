from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from jsonargparse import auto_parser

import slurm.cluster
import slurm.report
import slurm.status
import slurm.study
import slurm.submit
from lightly_mim.cli import COMMANDS
from lightly_mim.shorthand import spell_out

from ..conftest import TINY_VIT
from .cluster import Cluster

ROOT = Path(__file__).parents[2]
SWEEP = "--sweep method=SimMIM,MAE seed=0,1,2"
SOLAR = "-- benchmarks/solar_cells.py"
STUDY = "-- benchmarks/simmim_study.py"
PRETRAIN = (
    "-- lightly-mim pretrain --data x "
    "--method SimMIM --method.encoder vit_tiny_patch16_224"
)


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # submit adds folders
    monkeypatch.chdir(tmp_path)
    return slurm.submit


def scripts(output: str) -> dict[str, str]:
    """Returns the sbatch scripts of a dry run by stage."""
    parts = output.split("### ")[1:]
    return {part.partition("\n")[0]: part.partition("#!")[2] for part in parts}


# Dry run.


def test_dry_run(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", "")  # no SLURM, no git
    submit.main(
        shlex.split(
            "--dry-run --partition gpu --account me --qos low --constraint a100 "
            "--nodes 2 --gpus-per-node 4 --cpus-per-gpu 8 --mem 400G --time 1-12:30:10 "
            "--exclude n1,n2 --nodelist n3 --comment 'a b' --dependency afterok:7 "
            "--mail-user a@b.c --parallel 3 --signal-delay 60 --study s "
            f"--setup 'module load cuda' --begin='now + 1 hour' --env 'A=b c' {SWEEP} "
            f"{SOLAR} --epochs 3"
        )
    )
    output = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    found = scripts(output)
    assert list(found) == ["train", "evaluate", "report"]
    for line in (
        "#SBATCH --array=0-5%3\n",
        "#SBATCH --partition=gpu\n#SBATCH --qos=low\n#SBATCH --requeue\n",
        "#SBATCH --account=me\n",
        "#SBATCH --constraint=a100\n",
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n",
        "#SBATCH --gpus-per-node=4\n",
        "#SBATCH --cpus-per-task=8\n",
        "#SBATCH --mem=400G\n",
        "#SBATCH --time=1-12:30:10\n",
        "#SBATCH --exclude=n1,n2\n",
        "#SBATCH --nodelist=n3\n",
        "#SBATCH --comment='a b'\n",
        "#SBATCH --begin='now + 1 hour'\n",
        "#SBATCH --dependency=afterok:7\n",
        "#SBATCH --mail-user=a@b.c\n",
        "#SBATCH --signal=USR2@60\n",
        "\nexport A='b c'\nmodule load cuda\n",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n",
        f"\ncd {tmp_path}/s/code\n",
        " --kill-on-bad-exit=1 ",
    ):
        assert line in found["train"]
    assert "wckey" not in output
    for line in (
        "#SBATCH --array=0-5%3\n",
        "#SBATCH --dependency='aftercorr:<job of train>'\n",
        "#SBATCH --gpus-per-node=1\n",
        "#SBATCH --kill-on-invalid-dep=yes\n",
        "#SBATCH --mem=102400M\n",  # a quarter, as of the GPUs
        "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n",
    ):
        assert line in found["evaluate"]
    assert "--dependency='afterany:<job of evaluate>:<job of train>'" in found["report"]
    assert "--array" not in found["report"] and "gpus" not in found["report"]
    assert "SRUN_CPUS" not in found["report"]
    for number, (method, seed) in enumerate(
        (method, seed) for method in ("SimMIM", "MAE") for seed in range(3)
    ):
        assert f"tasks/{number:02d}-method={method}-seed={seed}/run" in output
    assert (
        "benchmarks/solar_cells.py --epochs 3 --method SimMIM --seed 0 --out "
        f"{tmp_path}/s/tasks/00-method=SimMIM-seed=0/run "
        "--devices 4 --num-nodes 2 --resume --stage train\n" in output
    )


def test_dry_run__what_sites_ask_for(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--gpus-per-node a100:2 --licenses=a:1 --reservation day --sbatch "
    words += "reservation=night exclusive --nice"
    submit.main(shlex.split(f"--dry-run {words} {SOLAR}"))
    found = scripts(capsys.readouterr().out)
    for line in (
        *("#SBATCH --reservation=night\n", "#SBATCH --exclusive\n"),
        *("#SBATCH --licenses=a:1\n", "#SBATCH --nice\n"),
    ):
        assert line in found["train"] and line in found["evaluate"]
        assert line not in found["report"]
    assert "#SBATCH --gpus-per-node=a100:2\n#" in found["train"]
    assert "--ntasks-per-node=2\n" in found["train"]
    assert "#SBATCH --gpus-per-node=a100:1\n" in found["evaluate"]
    # A site's file has the CPUs of each GPU, also for a study without any.
    submit.main(shlex.split(f"--dry-run --cpus-per-gpu 8 --cpus-per-task 3 {SOLAR}"))
    captured = capsys.readouterr()
    assert "--cpus-per-gpu is left out" in captured.err
    assert captured.out.count("#SBATCH --cpus-per-task=3\n") == 2


def test_dry_run__takes_hyphens_and_underscores(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dry_run --gpus_per_node=2 --cpus_per_gpu 3"
    submit.main(shlex.split(f"{words} {SOLAR} --batch_size 64 --num_workers=0"))
    output = capsys.readouterr().out
    assert "--gpus-per-node=2\n" in output and "--cpus-per-task=3\n" in output
    assert "solar_cells.py --batch-size 64 --num-workers=0 --out" in output
    submit.main(shlex.split(f"--dry-run --sweep batch-size=8,16 {PRETRAIN}"))
    assert "--batch_size 8 --out" in capsys.readouterr().out


def test_dry_run__one_task_is_no_array(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    submit.main(shlex.split(f"--dry-run {SOLAR}"))
    output = capsys.readouterr().out
    assert "--array" not in output
    assert "afterok:<job of train>" in output


def test_dry_run__pretrain(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vit = "--method.encoder vit_tiny_patch16_224"
    command = f"-- lightly-mim pretrain --data photos {vit} --epochs 3"
    words = "--dry-run --sweep method=SimMIM,MAE epochs=1,2 --evaluate '--data photos'"
    with pytest.raises(SystemExit):  # epochs twice
        submit.main(shlex.split(f"{words} {command}"))
    capsys.readouterr()
    words = "--dry-run --study s --sweep method=SimMIM,MAE --evaluate '--data photos'"
    submit.main(shlex.split(f"{words} {command}"))
    output = capsys.readouterr().out
    out = f"{tmp_path}/s/tasks/00-method=SimMIM/run"
    assert (
        f"lightly-mim pretrain --data photos --method SimMIM {vit} "
        f"--epochs 3 --out {out} --devices 1 --num_nodes 1 --resume\n" in output
    )
    assert (
        f"lightly-mim evaluate --encoder {out} --out {out} --overwrite "
        "--data photos\n" in output
    )
    submit.main(shlex.split(f"--dry-run {PRETRAIN} --epochs 3"))
    assert list(scripts(capsys.readouterr().out)) == ["train", "report"]


def test_dry_run__fine_tuning_over_nodes(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = "lightly-mim evaluate --data x --protocols finetune"
    words = "--dry-run --partition gpu --nodes 4 --gpus-per-node 8 --study s"
    submit.main(shlex.split(f"{words} --sweep encoder=runs/a,runs/b -- {command}"))
    output = capsys.readouterr().out
    assert list(scripts(output)) == ["run", "report"]
    for line in (
        "#SBATCH --array=0-1%2\n",
        "#SBATCH --gpus-per-node=8\n",
        "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n",
    ):
        assert line in scripts(output)["run"]
    assert (
        f"{command} --encoder runs/a --out {tmp_path}/s/tasks/00-encoder=runs_a/run "
        "--devices 8 --num_nodes 4 --overwrite\n" in output
    )


def test_dry_run__evaluation_has_the_seed_of_its_run(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--dry-run --cluster local --evaluate '--data x{}' --sweep seed=7,8"
    submit.main(shlex.split(f"{words.format('')} {PRETRAIN}"))
    output = capsys.readouterr().out
    assert "--overwrite --seed 7 --data x\n" in output
    assert "#SBATCH" not in output  # there is no sbatch to send it to
    words = words.replace("--data x", "--data=x").format(" --seed 1")
    submit.main(shlex.split(f"{words} {PRETRAIN}"))
    assert "--overwrite --data=x --seed 1\n" in capsys.readouterr().out


def test_resume__with_another_evaluation(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "run_local", lambda *_: 0)

    def send(words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            submit.main(shlex.split(words))
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    sweep = "--sweep seed=7,8"
    evaluate = "--evaluate '--data x --protocols {}'"
    begin = f"--cluster local --study s {sweep} {evaluate.format('knn')} {PRETRAIN}"
    assert send(begin) == (0, "")
    study = submit.Study.load("s")
    first, second = study.tasks
    before = second.stages["evaluate"]
    study.update_state(first, done=["train", "evaluate"])
    code, said = send(f"--resume s {evaluate.format('knn --layers 12')}")
    assert code == 2 and "0 to 11" in said
    assert submit.Study.load("s").tasks[1].stages["evaluate"] == before
    assert send(f"--resume s {evaluate.format('linear')}") == (0, "")
    first, second = submit.Study.load("s").tasks
    assert first.stages["evaluate"][-1] == "knn"
    assert second.stages["evaluate"] == [*before[:-1], "linear"]
    assert second.stages["evaluate"][-6:-4] == ["--seed", "8"]
    study.update_state(second, done=["train", "evaluate"])
    code, said = send(f"--resume s {evaluate.format('knn')}")
    assert code == 2 and "is evaluated: leave --evaluate out" in said


def test_resume__drops_and_changes_tasks(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(submit, "run_local", lambda *_: 0)

    def send(words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            submit.main(shlex.split(words))
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    sweep = "--sweep batch_size=8,16,32 seed=7 --evaluate '--data x --protocols knn'"
    assert send(f"--cluster local --study s {sweep} {PRETRAIN}") == (0, "")
    study = submit.Study.load("s")
    study.update_state(study.tasks[2], done=["train", "evaluate"])
    before = [task.name for task in study.tasks]
    for words, message in {
        "--drop 7": "has no task '7'. It has: 00-batch_size=8-seed=7, 01-",
        "--drop 0 1 2": "leaves no task",
        "--change 0": "one value for each KEY=VALUE",
        "--change 0 lr=1,2": "one value for each KEY=VALUE",
        "--change 0 lr=fast": "--lr takes a number",
        "--change 0 devices=2": "'devices' cannot be swept",
        "--change 0 batch_size=16": f"{before[1]} has these values",
        "--change 2 lr=0.1": "is finished",
    }.items():
        code, said = send(f"--resume s {words}")
        assert code == 2 and message in said, said
        assert [task.name for task in submit.Study.load("s").tasks] == before
    changes = (
        "--drop 00 --change 01 batch_size=4 lr=0.5 --change 01-batch_size=4-seed=7"
    )
    code, said = send(f"--resume s {changes} seed=8 --drop 02")
    assert code == 2 and "has no task '01-batch_size=4-seed=7'" in said
    submit.main(shlex.split("--resume s --drop 00 --change 1 seed=8 lr=0.5 --dry-run"))
    assert "01-batch_size=16-seed=8-lr=0.5/run" in capsys.readouterr().out
    assert [task.name for task in submit.Study.load("s").tasks] == before
    assert send("--resume s --drop 00 --change 1 seed=8 lr=0.5") == (0, "")
    changed, last = submit.Study.load("s").tasks
    assert changed.name == "01-batch_size=16-seed=8-lr=0.5" and last.name == before[2]
    train, evaluate = changed.stages.values()
    assert " ".join(train).endswith(
        "--batch_size 16 --seed 8 --lr 0.5 --out {out} --devices 1 --num_nodes 1 "
        "--resume"
    )
    assert evaluate[-6:] == ["--seed", "8", "--data", "x", "--protocols", "knn"]
    assert submit.Study.load("s").swept() == ["batch_size", "seed", "lr"]
    page = slurm.report.write_report(submit.Study.load("s"))
    assert "2 task(s), 1 done" in page


def test_resume__changes_no_task_in_the_queue(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sweep = shlex.split("--study s --sweep seed=0,1")
    study = submit._plan(submit.parser()[0].parse_args(sweep), SOLAR.split()[1:], [])
    jobs = {study.tasks[0].name: {"train": "7_0", "evaluate": "8_0"}}
    study.submissions.append({"date": "", "cluster": "slurm", "jobs": jobs})
    study.path.mkdir()
    study.save()
    programs = dict.fromkeys(("sbatch", "srun"), "")
    queue = "8_0|PENDING|Dependency\n"
    monkeypatch.setenv("PATH", answering(tmp_path / "a", squeue=queue, **programs))
    for words in ("--drop 0", "--change 0 seed=3"):
        with pytest.raises(SystemExit):
            submit.main(shlex.split(f"--resume s {words}"))
        said = capsys.readouterr().err
        assert "00-seed=0 runs or is in the queue: end it first, scancel 8_0" in said
    assert len(submit.Study.load("s").tasks) == 2


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        ("--gpus-per-node 2", True),
        ("--gpus-per-node a100:1 --mem 8G", True),
        ("--gpus-per-node 2 --cpus-per-gpu 8", False),
        ("--gpus-per-node 2 --cpus-per-task 8", False),
        ("--tasks-per-node 2", False),
    ],
)
def test_dry_run__says_that_cpus_are_missing(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], words: str, warned: bool
) -> None:
    submit.main(shlex.split(f"--dry-run {words} {SOLAR}"))
    said = capsys.readouterr().err
    assert ("Neither --cpus-per-gpu nor --cpus-per-task" in said) == warned


def answering(folder: Path, **programs: str) -> str:
    """Writes programs that print a text and note what they were asked for."""
    folder.mkdir()
    for name, text in programs.items():
        program = folder / name
        note = shlex.quote(str(folder / "asked"))
        tell = f"printf '%s' {shlex.quote(text)}"
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {note}\n{tell}\n')
        program.chmod(0o755)
    return str(folder)


def test_resume__releases_what_slurm_holds(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sweep = shlex.split("--study s --sweep seed=0,1,2,3")
    study = submit._plan(submit.parser()[0].parse_args(sweep), SOLAR.split()[1:], [])
    names = [task.name for task in study.tasks]
    jobs = {n: {"train": f"7_{i}", "evaluate": f"8_{i}"} for i, n in enumerate(names)}
    study.submissions.append({"date": "", "cluster": "slurm", "jobs": jobs})
    study.path.mkdir()
    study.save()
    study.update_state(study.tasks[1], done=["train"])
    queue = (
        "7_0|PENDING|launch failed requeued held\n7_1|PENDING|JobHeldUser\n"
        "8_1|PENDING|JobHeldAdmin\n7_2|RUNNING|None\n7_3|PENDING|QOSUsageThreshold\n"
        "99|PENDING|JobHeldUser\n"
    )
    programs = dict.fromkeys(("sbatch", "srun"), "") | {"squeue": queue}
    monkeypatch.setenv("PATH", answering(tmp_path / "a", scontrol="", **programs))
    submit.main(["--resume", "s"])
    said = capsys.readouterr().out
    assert "4 task(s) are running or in the queue" in said
    assert "holds 2 of their jobs (launch failed requeued held, JobHeldAdmin)" in said
    assert "scontrol release 7_0,8_1, which " in said
    assert f"--resume {tmp_path}/s --release" in said
    assert "scontrol" not in (tmp_path / "a" / "asked").read_text()
    submit.main(["--resume", "s", "--release"])
    assert "Released: 7_0, 8_1" in capsys.readouterr().out
    assert "scontrol release 7_0,8_1\n" in (tmp_path / "a" / "asked").read_text()
    monkeypatch.setenv("PATH", answering(tmp_path / "b", **programs))  # no scontrol
    with pytest.raises(SystemExit):
        submit.main(["--resume", "s", "--release"])
    assert "scontrol release 7_0,8_1 failed" in capsys.readouterr().err


def test_dry_run__rows_of_a_study(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = "--sweep row=default,mae-block-50,loss-smooth-l1-0.1 seed=0,1"
    command = "-- benchmarks/simmim_study.py --data photos"
    small = "--img-size 64 --encoder-option embed_dim=24 depth=1 num_heads=2"
    words = f"--dry-run --partition gpu --gpus-per-node 1 --study s {sweep} {command}"
    submit.main(shlex.split(f"{words} {small}"))
    output = capsys.readouterr().out
    found = scripts(output)
    assert list(found) == ["train", "evaluate", "report"]
    assert "#SBATCH --array=0-5%6\n" in found["train"]
    out = f"{tmp_path}/s/tasks/00-row=default-seed=0/run"
    for stage in ("train", "evaluate"):
        assert (
            f"benchmarks/simmim_study.py --data photos {small} --row default --seed 0 "
            f"--out {out} --devices 1 --num-nodes 1 --resume --stage {stage}\n"
        ) in output
    assert "tasks/05-row=loss-smooth-l1-0.1-seed=1/run" in output
    # Without a row in the sweep, a task has all rows of an axis.
    submit.main(shlex.split(f"--dry-run {command} {small} --axis region --seed 0"))
    assert "--axis region --seed 0 --out" in capsys.readouterr().out


def test_dry_run__swept_words_win(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 5\nlr: 0.5\n")
    sweep = "--sweep epochs=2,1 method.img_size=64,96 weight_decay=-0.0"
    submit.main(shlex.split(f"--dry-run {sweep} {PRETRAIN} --config c.yaml"))
    output = capsys.readouterr().out
    words = "--config c.yaml --epochs 2 --method.img_size 64 --weight_decay=-0.0 --out"
    assert words in output
    line = next(line for line in output.splitlines() if words in line)
    parser = auto_parser(COMMANDS, as_positional=False)
    read = parser.parse_args(spell_out(shlex.split(line)[1:], COMMANDS)).pretrain
    assert (read.epochs, read.lr, read.method.init_args.img_size) == (2, 0.5, 64)


def test_dry_run__makes_nothing_but_the_method(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    words = "--sweep seed=0,1 -- lightly-mim pretrain --data x --method mine.Reads "
    words += "--method.encoder vit_tiny_patch16_224 --callbacks+=mine.Writes"
    submit.main(shlex.split(f"--dry-run {words}"))
    assert "mine.Writes" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}
    with pytest.raises(SystemExit):
        submit.main(shlex.split(f"--dry-run {words} --method.mask_ratio 2"))
    assert "strictly between 0 and 1" in capsys.readouterr().err


OWN = """
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

from lightly_mim.methods import SimMIM


class Reads(SimMIM):
    # What may be looked at where the weights are.
    def __init__(self, encoder: str, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.encoder.vit.norm.weight.detach().numpy()


class Writes(Callback):
    def __init__(self) -> None:
        Path("made").mkdir()
"""


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Say what to run behind --"),
        ("-- benchmarks/nothing.py", "There is no command 'benchmarks/nothing.py'"),
        ("-- rm -rf x", "There is no command 'rm'"),
        ("-- benchmarks/defaults.py", "trains nothing that a study could collect"),
        ("-- benchmarks/throughput.py mae", "trains nothing"),
        ("-- lightly-mim train", "has the commands pretrain, evaluate"),
        (f"{SOLAR} --epoch 3", "unrecognized arguments: --epoch 3"),
        (f"{SOLAR} --epochs 0", "got --epochs 0"),
        (f"{SOLAR} --out x", "Leave --out to the study"),
        (f"{SOLAR} --devices 2", "Leave --devices to the study"),
        (f"{SOLAR} --stage train", "Leave --stage to the study"),
        (f"{PRETRAIN} --out x", "Leave --out to the study"),
        (f"{PRETRAIN} --num_nodes 2", "Leave --num-nodes to the study"),
        (f"{PRETRAIN} --num-nodes 2", "Leave --num-nodes to the study"),
        (f"{SOLAR} --num_nodes 2", "Leave --num-nodes to the study"),
        (f"{PRETRAIN} --colour red", "--colour"),
        (f"{PRETRAIN} --epochs three", "--epochs takes a whole number, got three"),
        (f"{PRETRAIN} --epochs 0", "got --epochs 0"),
        (f"{PRETRAIN} --recipe best", "no recipe 'best'"),
        (f"{PRETRAIN} --method.mask_ratio 2", "strictly between 0 and 1"),
        (f"{SOLAR} --method-option mask_ratio=2", "strictly between 0 and 1"),
        (
            f"{SOLAR} --method-option mask_ratio=half",
            "a number strictly between 0 and 1, got mask_ratio='half'",
        ),
        (f"{SOLAR} --encoder vit_smal_patch16_224", "Did you mean vit_small"),
        (f"--sweep img-size=64,65 {SOLAR}", "with img-size=65 refuses its words"),
        ("-- benchmarks/imagenette.py --recipe best", "no recipe 'best'"),
        ("-- benchmarks/gpu_check.py", "trains nothing"),
        (f"--sweep row=mea {STUDY}", "with row=mea refuses its words. There is no row"),
        (f"--sweep row=mae {STUDY} --axis loss", "--row: not allowed with"),
        (f"{STUDY} --axis region --img-size 56", "mask_patch_size 16 x 16"),
        (f"--sweep method=MAE {STUDY}", "does not take the sweep key 'method'"),
        (f"--evaluate '--laiers 3' {PRETRAIN}", "laiers"),
        (f"--evaluate '--data x --layers 8 12' {PRETRAIN}", "0 to 11"),
        (f"--evaluate '--data x --holdout 1.5' {PRETRAIN}", "strictly between 0 and 1"),
        (f"--evaluate '--data x --img_size 50' {PRETRAIN}", "does not divide"),
        (f"--evaluate '--data x --knn.ks 0' {PRETRAIN}", "ks of KNN is"),
        (f"--gpus-per-node 8 {PRETRAIN} --batch_size 100", "8 device(s) x 1"),
        (f"--nodes 3 {SOLAR} --batch-size 64", "3 device(s) x 1"),
        (
            "--nodes 2 -- lightly-mim convert --encoder x --to safetensors",
            "lightly-mim convert runs in one process, got 2 node(s) with 1 each",
        ),
        (f"--evaluate '--data x' {SOLAR}", "goes with lightly-mim pretrain alone"),
        (f"--sweep colour=red {SOLAR}", "does not take the sweep key 'colour'"),
        (f"--sweep sed=0,1 {SOLAR}", "Did you mean 'seed'?"),
        (f"--sweep colour=red {PRETRAIN}", "with colour=red refuses"),
        (f"--sweep method=SimMIM,DINO {SOLAR}", "choose from"),
        (f"--sweep seed=0,x {SOLAR}", "with seed=x refuses its words"),
        (
            f"--sweep batch-size=64,2048 {SOLAR}",
            "with batch-size=2048 refuses its words. solar-cells has 1968 training "
            "images, and a batch has that many at most, got --batch-size 2048.",
        ),
        (f"{SOLAR} --batch_size 1969", "most, got --batch-size 1969."),
        (f"{STUDY} --row mae --batch-size 4096", "got --batch-size 4096."),
        (f"--sweep seed=0,0 {SOLAR}", "each value once"),
        (f"--sweep seed=0 seed=1 {SOLAR}", "each key once"),
        (f"--sweep seed {SOLAR}", "KEY=VALUE,VALUE"),
        (f"--sweep seed=0, {SOLAR}", "KEY=VALUE,VALUE"),
        (f"--sweep quick=true {SOLAR}", "takes no value"),
        (f"--sweep out=a,b {SOLAR}", "'out' cannot be swept"),
        (f"--sweep num-nodes=1,2 {SOLAR}", "'num-nodes' cannot be swept"),
        (f"--sweep seed=0,1 {SOLAR} --seeds 1", "say it once"),
        (f"--gpus-per-node a100: {SOLAR}", "a type and a number such as a100:8"),
        (f"--sbatch 'x y' {SOLAR}", "'--x y' stands behind no option"),
        (f"--sbatch array=0-3 {SOLAR}", "--array of sbatch is the study's to choose"),
        (f"--gpus-per-task 1 {SOLAR}", "--gpus-per-task of sbatch is the study's"),
        (f"--dryrun {SOLAR}", "There is no --dryrun. Did you mean --dry-run?"),
        (f"gpu {SOLAR}", "'gpu' stands behind no option"),
        (f"--nice=1 2 {SOLAR}", "'2' stands behind no option"),
        (f"--gpus-per-node 2 --tasks-per-node 3 {SOLAR}", "process of its own"),
        (f"--cluster local --nodes 2 {SOLAR}", "has one node"),
        (f"--config none.yaml {SOLAR}", "cannot be read"),
        (f"--partitions x {SOLAR}", "no --partitions. Did you mean --partition?"),
        (f"--study . {SOLAR}", "is there already"),
        ("--resume nothing", "is not a study"),
        (f"--release {SOLAR}", "--release goes with --resume"),
        (f"--drop 00 {SOLAR}", "--drop goes with --resume"),
        (f"--change 00 seed=1 {SOLAR}", "--change goes with --resume"),
        (f"--resume x {SOLAR}", "takes command and sweep from the study"),
        (f"--cluster local --study {__file__}/s {SOLAR}", "cannot be written"),
    ],
)
def test_refused(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        submit.main(shlex.split(words))
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("error:") == 1
    assert not said.out and not list(tmp_path.iterdir())


def test_refused__no_slurm(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        submit.main(shlex.split(SOLAR))
    assert exit_.value.code == 2
    assert "There is no sbatch on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Options.


def test_config__command_line_wins(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text(
        "partition: gpu\naccount: me\ntime: '2:00:00'\nsetup:\n- module load a\n"
        "- module load b\nenv: {A: 1, B: x y}\ngpus_per_node: 2\n"
        "sbatch: {exclusive: true, reservation: night}\n"
    )
    submit.main(shlex.split(f"--dry-run --config site.yaml --partition cpu {SOLAR}"))
    script = scripts(capsys.readouterr().out)["train"]
    assert "--partition=cpu\n" in script and "--account=me\n" in script
    assert "--time=2:00:00\n" in script and "--gpus-per-node=2\n" in script
    assert "--exclusive\n" in script and "--reservation=night\n" in script
    assert "export A=1\nexport B='x y'\nmodule load a\nmodule load b\n" in script


def test_config__values_are_taken_as_they_are_written(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "site.yaml").write_text(
        "account: 0123\ntime: 1:30:00\nqos: 1e3\ncomment: 2026-11-25\n"
        "exclude: no\nnodelist: 0x1F\nmail-user: 1_000\nspread-job:\nnice: true\n"
        "env: {X: 010, Y: 1.50, Z: yes, W: 12:30, off: }\nsetup: [007, true]\n"
        "sbatch: {exclusive: , hold: ~, licenses: 08, reservation: 1_0}\n"
    )
    submit.main(shlex.split(f"--dry-run --config site.yaml {SOLAR}"))
    script = scripts(capsys.readouterr().out)["train"]
    for name, value in {
        **{"account": "0123", "time": "1:30:00", "qos": "1e3", "exclude": "no"},
        **{"comment": "2026-11-25", "nodelist": "0x1F", "mail-user": "1_000"},
        **{"licenses": "08", "reservation": "1_0"},
    }.items():
        assert f"#SBATCH --{name}={value}\n" in script
    for name in ("exclusive", "hold", "spread-job", "nice"):
        assert f"#SBATCH --{name}\n" in script
    env = "X=010\nexport Y=1.50\nexport Z=yes\nexport W=12:30\nexport off=''\n"
    assert f"\nexport {env}007\ntrue\n" in script


def test_paths__of_the_home_directory(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "site.yaml").write_text("account: a\n")
    words = "--dry-run --config=~/site.yaml --study=~/s"
    submit.main(shlex.split(f"{words} {SOLAR}"))
    output = capsys.readouterr().out
    assert f"{tmp_path}/home/s/tasks/" in output and "--account=a\n" in output
    study = submit._plan(
        submit.parser()[0].parse_args(["--study=~/s"]), SOLAR.split()[1:], []
    )
    study.path.mkdir()
    study.save()
    assert submit.Study.load("~/s") == submit.Study.load(Path("~/s")) == study
    (tmp_path / "home" / "a b").mkdir()
    with pytest.raises(SystemExit):
        submit.main(shlex.split(f"--study='~/a b' {SOLAR}"))
    assert f"--resume '{tmp_path}/home/a b' to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "There is no --partitoin. Did you mean --partition?"),
        ("sweep: x=1", "'sweep', which is an option of a study"),
        ("setup: [export A: b]", "YAML reads a dict here"),
        ("[1, 2]", "no mapping"),
        ("a: [", "cannot be read"),
        ("a: &a [1]\nb: *a", "repeats *a"),
        (f"a: {'[' * 2000}", "levels deep"),
    ],
)
def test_config__refused(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    message: str,
) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        submit.main(shlex.split(f"--dry-run --config site.yaml {SOLAR}"))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# The snapshot.


def test_snapshot__has_new_files_and_no_caches(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm.study.snapshot(tmp_path / "code")
    names = {str(f.relative_to(tmp_path / "code")) for f in tmp_path.rglob("*.*")}
    assert {"lightly_mim/pretraining/entry.py", "benchmarks/studies/study.py"} <= names
    assert {"slurm/task.py", "lightly_mim/methods/simmim.py"} <= names
    assert not any(".git" in name or "__pycache__" in name for name in names)
    for name in ("lightly_mim/cli.py", "slurm/study.py"):
        assert (tmp_path / "code" / name).read_text() == (ROOT / name).read_text()


def test_snapshot__is_what_jobs_import(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = slurm.study.Study(tmp_path, [], [], "", {}, {})
    for name in ("lightly_mim", "benchmarks", "slurm"):
        (study.code / name).mkdir(parents=True)
    (study.code / "lightly_mim" / "__init__.py").touch()
    for name in ("__init__", "task"):
        (study.code / "slurm" / f"{name}.py").touch()
    (tmp_path / "find.py").write_text(
        "import importlib.util as u\n"
        "print(*(u.find_spec(name).origin for name in ('lightly_mim', 'slurm.task')))\n"
    )
    # As submitit starts it: `python -m` puts the working directory first of all.
    lines = [
        f"cd {shlex.quote(str(ROOT))}",
        *slurm.cluster.snapshot_lines(study),
        f"cp {shlex.quote(str(tmp_path))}/find.py .",
        f"{shlex.quote(sys.executable)} -m find",
    ]
    done = subprocess.run(
        "\n".join(lines), shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        f"{study.code}/lightly_mim/__init__.py",
        f"{study.code}/slurm/task.py",
    ]


def test_snapshot__of_an_earlier_version(tmp_path: Path) -> None:
    study = slurm.study.Study(tmp_path, [], [], "", {}, {})
    (study.code / "slurm").mkdir(parents=True)
    (study.code / "slurm" / "task.py").write_text("import study\n")
    (study.code / "slurm" / "study.py").write_text("print(__name__, __file__)\n")
    slurm.study.mend_snapshot(study)
    lines = [*slurm.cluster.snapshot_lines(study), "%s -m slurm.task"]
    done = subprocess.run(
        "\n".join(lines) % shlex.quote(sys.executable),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"study {study.code}/slurm/study.py\n"


# A whole study, on this machine.


def tiny(photos: Path) -> list[str]:
    """The words of a run of a second: 32 photographs, 2 epochs, a ViT of 2 blocks."""
    options = ["patch_size", "embed_dim", "depth", "num_heads"]
    return [
        str(ROOT / "benchmarks" / "imagenette.py"),
        *("--data-dir", str(photos), "--encoder", TINY_VIT["encoder"]),
        *("--img-size", "32", "--encoder-option"),
        *(f"{name}={TINY_VIT[name]}" for name in options),
        *("--epochs", "2", "--batch-size", "16", "--accelerator", "cpu"),
        *("--num-workers", "0", "--precision", "32-true"),
    ]


@pytest.mark.slow
def test_local_study__failure_is_listed_and_rerun_alone(
    submit: ModuleType,
    capsys: pytest.CaptureFixture[str],
    photos: Path,
    tmp_path: Path,
) -> None:
    words = ["--cluster", "local", "--parallel", "2", "--study", "s", "--sweep"]
    words += ["lr=1e-3,1e30", "--"]
    with pytest.raises(SystemExit) as exit_:
        submit.main([*words, *tiny(photos), "--method-option", "mask_patch_size=8"])
    assert exit_.value.code == 1
    output = capsys.readouterr().out
    assert f"status.py {tmp_path / 's'} --watch" in output
    for line in (
        r"^00-\S+, train: done$",
        r"^01-\S+, train: failed, \S*NonFiniteLossError: ",
    ):
        assert re.search(line, output, flags=re.MULTILINE)
    assert not (tmp_path / "s" / "jobs" / "%j").exists()
    study = submit.Study.load("s")
    good, bad = study.tasks
    assert study.open_stages(good) == []
    assert study.open_stages(bad) == ["train", "evaluate"]
    state = study.state(bad)
    assert state["status"] == "failed" and state["error"]["line"] in output
    assert "Traceback" in state["error"]["traceback"]
    assert [a["outcome"] for a in state["attempts"]] == ["failed"]
    assert f"--resume {tmp_path / 's'}" in output
    page = (tmp_path / "s" / "study.md").read_text()
    assert "2 task(s), 1 done" in page and "| pretrained |" in page
    table = (tmp_path / "s" / "study.csv").read_text().splitlines()
    # three models with two protocols each, and the task that failed
    assert len(table) == 1 + 3 * 2 + 1
    attempt = study.state(good)["attempts"][0]
    assert attempt["host"] and attempt["versions"]["torch"] and attempt["job"]
    log = tmp_path / "s" / "jobs" / attempt["job"] / f"{attempt['job']}_0_log.out"
    assert f"{tmp_path}/s/code" in log.read_text() or "train:" in log.read_text()

    with submit.alone(study), pytest.raises(SystemExit) as exit_:
        submit.main(["--resume", "s"])
    assert exit_.value.code == 2
    assert "Another submit.py is at work" in capsys.readouterr().err
    submit.main(["--resume", "s", "--dry-run"])
    assert "Of 2 task(s)" in capsys.readouterr().out

    marker = study.run(good) / "SimMIM-seed0" / "finished.json"
    before = marker.stat().st_mtime_ns
    with pytest.raises(SystemExit) as exit_:
        submit.main(["--resume", "s"])
    assert exit_.value.code == 1  # it is still wrong
    study = submit.Study.load("s")
    assert len(study.state(bad)["attempts"]) == 2
    assert len(study.state(good)["attempts"]) == 2  # train and evaluate, once each
    assert marker.stat().st_mtime_ns == before
    assert list(study.submissions[-1]["jobs"]) == [bad.name]


@pytest.mark.slow
def test_local_study__kill_leaves_nothing_running(photos: Path, tmp_path: Path) -> None:
    words = ["--cluster", "local", "--study", str(tmp_path / "s"), "--"]
    words += [*tiny(photos), "--method-option", "mask_patch_size=8"]
    words[words.index("--epochs") + 1] = "100000"
    process = subprocess.Popen(
        [sys.executable, ROOT / "slurm" / "submit.py", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Not a terminal's group, whose every process gets Ctrl-C.
        start_new_session=True,
        # As a shell starts what stands before &.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    metrics = tmp_path / "s/tasks/00-imagenette/run/SimMIM-seed0/metrics.csv"
    # The first row is from before the first step.
    wait(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 120)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted. Go on with: " in output
    study = tmp_path.joinpath("s", "tasks", "00-imagenette", "state.json")
    state = json.loads(study.read_text())
    assert state["status"] == "interrupted"
    job = str(state["attempts"][-1]["pid"])
    found = subprocess.run(["ps", "-o", "stat=", "-p", job], stdout=subprocess.PIPE)
    assert found.stdout.strip() in (b"", b"Z", b"Zs"), "it runs on"


# On a cluster.


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


@pytest.mark.slurm
def test_slurm__unknown_partition(
    submit: ModuleType,
    on_cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = set(on_cluster.jobs())  # by number: those of earlier tests still end
    for option in ("--partition", "--cpu-partition"):
        with pytest.raises(SystemExit) as exit_:
            submit.main(shlex.split(f"{option} gpus {SOLAR}"))
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert "There is no partition 'gpus'. There are: main, prio." in said
    assert set(on_cluster.jobs()) == before and not list(tmp_path.iterdir())


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--constraint none-such", "Invalid feature"),
        ("--mem lots", "Invalid --mem"),
        ("--time 1:2:3:4", "Invalid --time"),
        ("--bananas 3", "unrecognized option '--bananas=3'"),
    ],
)
def test_slurm__what_sbatch_refuses_leaves_nothing(
    submit: ModuleType,
    on_cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: str,
    message: str,
) -> None:
    before = set(on_cluster.jobs())  # by number: those of earlier tests still end
    with pytest.raises(SystemExit) as exit_:
        submit.main(shlex.split(f"{words} --study s {SWEEP} {SOLAR}"))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert set(on_cluster.jobs()) == before and not list(tmp_path.iterdir())


@pytest.mark.slurm
def test_slurm__array_evaluation_report_and_rerun(
    submit: ModuleType,
    on_cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shared: Path,
) -> None:
    path = shared / "six"
    command = (
        f"--partition main --parallel 2 --mem 3G --study {path} {SWEEP} "
        "--env OMP_NUM_THREADS=1 "
        f"{SOLAR} --quick --accelerator cpu --num-workers 0 --img-size 32 "
        "--encoder-option depth=1 embed_dim=32 num_heads=2"
    )
    submit.main(shlex.split(f"--dry-run {command}"))
    promised = scripts(capsys.readouterr().out)
    submit.main(shlex.split(command))
    study = submit.Study.load(path)
    jobs = study.submissions[-1]["jobs"]
    array = jobs[study.tasks[0].name]["train"].partition("_")[0]
    written = (study.jobs / array / f"{array}_submission.sh").read_text()
    assert "#!" + promised["train"].strip() == written.strip()

    victim = study.tasks[4]
    job = jobs[victim.name]["train"]
    wait(lambda: study.state(victim).get("status") == "running", 900)
    running = [j for j, state in on_cluster.jobs().items() if state == "RUNNING"]
    assert sum(j.startswith(f"{array}_") for j in running) <= 2
    on_cluster.run("scancel", "--signal=KILL", job, check=True)
    report = study.submissions[-1]["report"]
    wait(lambda: on_cluster.jobs()[report] == "COMPLETED", 1800)

    page = (path / "study.md").read_text()
    assert "6 task(s), 5 done" in page
    assert f"`{victim.name}`: lost. job {job} ended without a word" in page
    assert study.resume_command() in page
    rows = slurm.status.rows(study, slurm.status.queue())
    assert [row.state for row in rows].count("done") == 5
    assert rows[4].state == "lost"
    evaluation = jobs[victim.name]["evaluate"]
    assert on_cluster.jobs()[evaluation] == "CANCELLED"

    # What sbatch refuses changes nothing, so that it can be said again.
    stored = (path / "study.json").read_text()
    with pytest.raises(SystemExit):
        words = ["--resume", str(path), "--change", victim.name[:2], "seed=7"]
        submit.main([*words, "--mem", "lots"])
    assert (path / "study.json").read_text() == stored

    submit.main(["--resume", str(path)])
    study = submit.Study.load(path)
    again = study.submissions[-1]
    assert list(again["jobs"]) == [victim.name]
    wait(lambda: on_cluster.jobs()[again["report"]] == "COMPLETED", 900)
    page = (path / "study.md").read_text()
    assert "6 task(s), 6 done" in page and "Not finished" not in page
    assert " (3) |" in page  # the mean over three seeds
    lines = (path / "study.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * 3 * 2


def wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(1)


def test_study_json__is_plain(
    submit: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study = submit._plan(
        submit.parser()[0].parse_args(shlex.split(SWEEP)),
        ["benchmarks/solar_cells.py"],
        [],
    )
    study.path.mkdir(parents=True)
    study.save()
    assert submit.Study.load(study.path) == study
    stored = json.loads((study.path / "study.json").read_text())
    assert stored["origin"]["versions"]["submitit"]
    assert stored["tasks"][5]["sweep"] == {"method": "MAE", "seed": "2"}
