"""Damaged files of a study: named with what to do, and the other tasks are shown."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slurm.report
import slurm.study
from lightly_mim import files

from .test_status import FAILED, attempt, status, study, write_run

__all__ = ["status", "study"]  # fixtures

CONFIG = "recipe:\n  epochs: 12\n"
METRICS = "epoch,step,train_loss_step\n0,9,0.75\n"


@pytest.fixture
def two_tasks(status: Any, study: Any) -> Any:
    """A study with a run in its first task, and a failed second one."""
    states: list[dict[str, Any]] = [{"status": "running"}, FAILED]
    for task, state in zip(study.tasks, states, strict=True):
        study.update_state(task, attempts=[attempt("train", "7_0")], **state)
    write_run(study, study.tasks[0], METRICS)
    run = study.run(study.tasks[0]) / "SimMIM-seed0"
    (run / "config.yaml").write_text(files.sealed_text(CONFIG))
    return study


def as_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path, _: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: rng.randrange(1, len(content))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(200))


def linked_to_itself(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES = [as_folder, as_fifo, empty, cut, flip, noise, linked_to_itself]


def shown(status: Any, study: Any, capsys: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        status.main([str(study.path)])
    out, err = capsys.readouterr()
    return int(str(exit_.value.code)), out, err


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["state.json", "config.yaml", "metrics.csv"])
def test_files_of_a_task(
    status: Any,
    two_tasks: Any,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path, random.Random], None],
    tmp_path: Path,
) -> None:
    _, whole, _ = shown(status, two_tasks, capsys)
    for seed in range(8 if damage in (cut, flip, noise) else 1):
        copy = tmp_path / f"{seed}"
        shutil.copytree(two_tasks.path, copy)
        damaged = type(two_tasks).load(copy)
        (path,) = (copy / "tasks" / two_tasks.tasks[0].name).rglob(name)
        damage(path, random.Random(seed))
        code, out, err = shown(status, damaged, capsys)
        assert code == 1 and not err
        assert "01-seed=1 failed" in out.replace("  ", " ") and "ValueError: no" in out
        assert "Traceback" not in out
        told = "".join(out.split())
        if f"{path}isdamaged" in told:
            assert "Deleteit" in told or "Restoreit" in told
        elif damage is linked_to_itself and name == "state.json":
            assert f"{path}cannotberead" in told
        elif name != "metrics.csv" and damage is not linked_to_itself:
            # Of the checksum itself, its name has changed, or there is none yet.
            assert out.split("\n")[1:4] == whole.split("\n")[1:4]
        else:  # a number is another, or there is none yet
            assert "00-seed=0" in out
        said = slurm.report.write_report(damaged)
        assert "01-seed=1`: failed. ValueError: no" in said


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_study_json(
    status: Any,
    two_tasks: Any,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, random.Random], None],
) -> None:
    path = two_tasks.path / "study.json"
    content = path.read_bytes()
    for seed in range(20 if damage in (cut, flip, noise) else 1):
        damage(path, random.Random(seed))
        code, out, err = shown(status, two_tasks, capsys)
        if code == 2:
            assert not out and err.startswith("status.py: error: ")
            assert str(path.parent) in err and "Traceback" not in err
            assert len(err.splitlines()) == 1
            assert "is not a study" in err or "Copy it back" in err
        else:  # the name of the checksum has changed
            assert "01-seed=1" in out
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": [1]},
        {"tasks": {}},
        {"tasks": [{"name": "../x", "sweep": {}, "stages": {"run": []}}]},
        {"tasks": [{"name": "x", "sweep": {}, "stages": []}]},
        {"tasks": [{"name": "x", "sweep": {}, "stages": {}}]},
        {"tasks": [{"name": 3, "sweep": {}, "stages": {"run": []}}]},
        {"submissions": [3]},
        {"submissions": [{}]},
        {"submissions": None},
        {"cluster": []},
        {"other": 1},
    ],
)
def test_study_json__of_other_kinds(two_tasks: Any, change: dict[str, Any]) -> None:
    path = two_tasks.path / "study.json"
    stored = json.loads(path.read_text()) | change
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="its checksum is another"):
        type(two_tasks).load(two_tasks.path)
    del stored["sha256"]  # as one who changes it by hand does
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"study\.json is damaged"):
        type(two_tasks).load(two_tasks.path)


def test_study_json__of_an_earlier_version_stays_readable_for_it(
    two_tasks: Any,
) -> None:
    path = two_tasks.path / "study.json"
    stored = json.loads(path.read_text())
    assert len(stored.pop("sha256")) == 64
    path.write_text(json.dumps(stored))
    study = type(two_tasks).load(two_tasks.path)
    study.save()
    assert json.loads(path.read_text()) == stored


@pytest.mark.parametrize("state", [[], {"attempts": 3}, {"attempts": [{"job": "1"}]},
                                   {"done": "train"}])  # fmt: skip
def test_state__of_other_kinds(status: Any, two_tasks: Any, state: Any) -> None:
    task = two_tasks.tasks[0]
    (two_tasks.path / "tasks" / task.name / "state.json").write_text(json.dumps(state))
    first, second = status.rows(two_tasks, {})
    assert first.state == "damaged" and "Delete it" in first.detail
    assert second.state == "failed"


@pytest.mark.parametrize("damage", DAMAGES[:-1], ids=lambda each: each.__name__)
def test_log_and_lock(
    status: Any, two_tasks: Any, damage: Callable[[Path, random.Random], None]
) -> None:
    task = two_tasks.tasks[0]
    log, lock = status.log_file(two_tasks, "7_0"), two_tasks.path / ".lock"
    log.parent.mkdir(parents=True)
    for path in (log, lock):
        path.write_text("x" * 100)
        damage(path, random.Random(0))
    assert "ended without a word" in status.rows(two_tasks, {})[0].detail
    if lock.is_file():
        with slurm.study.alone(two_tasks):
            pass
    else:
        with (
            pytest.raises(ValueError, match=r"\.lock is no file"),
            slurm.study.alone(two_tasks),
        ):
            pass
    assert two_tasks.state(task)["status"] == "running"


def test_log__only_its_end_is_read(status: Any, two_tasks: Any) -> None:
    log = status.log_file(two_tasks, "7_0")
    log.parent.mkdir(parents=True)
    with log.open("wb") as file:
        file.truncate(2**40)  # a hole
        file.seek(0, os.SEEK_END)
        file.write(b"\nKilled\n")
    assert status.rows(two_tasks, {})[0].detail.endswith("log: Killed")


# Without anything whole there is no page, and that is said.
@pytest.mark.filterwarnings("ignore:The report could not be written")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", ["summary.csv", "results.json"])
def test_report__numbers_of_a_task(
    status: Any,
    two_tasks: Any,
    name: str,
    damage: Callable[[Path, random.Random], None],
) -> None:
    task = two_tasks.tasks[0]
    two_tasks.update_state(task, status="done", done=["train", "evaluate"])
    path = two_tasks.run(task) / name
    row = {"model": "x", "protocol": "knn", "top1": 0.5}
    for seed in range(6 if damage in (cut, flip, noise) else 1):
        path.unlink(missing_ok=True)
        if name == "results.json":
            path.write_text(json.dumps(files.sealed({"rows": [row]})))
        else:
            path.write_text("model,protocol,top1\nx,knn,0.5\n")
        assert "50.0 (1)" in slurm.report.write_report(two_tasks)
        damage(path, random.Random(seed))
        said = slurm.report.write_report(two_tasks)
        assert "01-seed=1`: failed. ValueError: no" in said
        if "## Damaged" in said or "`: damaged" in said:
            assert f"{path} is damaged" in said
        else:
            with (two_tasks.path / "study.csv").open(newline="") as file:
                assert len(list(csv.DictReader(file))) == 2
            assert damage is linked_to_itself or name == "summary.csv" or (
                "50.0 (1)" in said
            )  # fmt: skip
        if path.is_dir():
            path.rmdir()
