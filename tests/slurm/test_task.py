from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from submitit.core.utils import UncompletedJobError

import slurm.study
import slurm.task

FINISH = """
import pathlib, sys
run = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "a"
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text("")
(run / "finished.json").write_text("{}")
(run / "cwd").write_text(str(pathlib.Path.cwd()))
"""


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "5")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(Path.cwd())
    return slurm.task


def make_study(tmp_path: Path, script: str) -> Any:
    words = ["benchmarks/x.py", "--out", "{out}"]
    spec = slurm.study.TaskSpec("00", {}, {"train": words, "evaluate": words})
    study = slurm.study.Study(tmp_path / "s", words, [spec], str(tmp_path), {}, {})
    (study.code / "benchmarks").mkdir(parents=True)
    (study.code / "benchmarks" / "x.py").write_text(script)
    study.save()
    return study


def run(task: ModuleType, study: Any, stage: str = "train", bound: int = 2) -> None:
    task.Task(str(study.path), "00", stage, bound, 1)()


def test_runs_the_stages_in_order(task: ModuleType, tmp_path: Path) -> None:
    study = make_study(tmp_path, FINISH)
    spec = study.tasks[0]
    path = list(sys.path)
    run(task, study)
    assert (study.run(spec) / "a" / "cwd").read_text() == str(tmp_path)
    assert study.open_stages(spec) == ["evaluate"]
    run(task, study, "evaluate")
    state = study.state(spec)
    assert state["done"] == ["train", "evaluate"] and state["error"] is None
    assert [a["outcome"] for a in state["attempts"]] == ["done", "done"]
    assert state["attempts"][0]["host"] and state["attempts"][0]["versions"]["torch"]
    assert sys.argv == ["pytest"] and sys.path == path
    run(task, study)  # queued again after its end
    assert study.state(spec) == state


def test_evaluation_waits_for_the_marker(task: ModuleType, tmp_path: Path) -> None:
    study = make_study(tmp_path, "raise SystemExit('never run')")
    run(task, study, "evaluate")
    state = study.state(study.tasks[0])
    assert state["status"] == "failed" and not state["done"]
    assert "train has no finished marker" in state["error"]["line"]
    assert state["error"]["stage"] == "train"


@pytest.mark.parametrize(
    ("script", "error", "line"),
    [
        ("1 / 0", ZeroDivisionError, "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", RuntimeError, "ended with exit code 3"),
        # As the scripts make messages of errors.
        ("try:\n    raise OSError('full')\nexcept OSError:\n    raise SystemExit(1)",
         OSError, "OSError: full"),
        # An exit code of 0 is no marker.
        ("raise SystemExit(0)", RuntimeError, "without the finished marker"),
        (FINISH + "(run / 'finished.json').unlink()", RuntimeError,
         "without the finished marker"),
    ],
)  # fmt: skip
def test_failure(
    task: ModuleType, tmp_path: Path, script: str, error: type[Exception], line: str
) -> None:
    study = make_study(tmp_path, script)
    with pytest.raises(error):
        run(task, study)
    state = study.state(study.tasks[0])
    assert state["status"] == "failed" and not state["done"]
    assert line in state["error"]["line"]
    assert "Traceback" in state["error"]["traceback"] or "marker" in line
    assert state["attempts"][-1]["outcome"] == "failed"


@pytest.mark.parametrize(
    ("gpus", "words", "seen", "refused"),
    [
        (2, [], False, True),
        (2, ["--accelerator", "auto", "--device", "cuda"], False, True),
        (2, ["--accelerator", "cpu", "--accelerator=auto"], False, True),
        (2, ["--accelerator=CPU"], False, False),
        (2, ["--device", "cpu:0", "--epochs", "3"], False, False),
        (2, [], True, False),
        (0, [], False, False),
    ],
)
def test_gpus_that_pytorch_does_not_see(
    task: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    words: list[str],
    seen: bool,
    refused: bool,
) -> None:
    # A shell within a job of somebody's own has it, too.
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: seen)
    study = make_study(tmp_path, FINISH)
    study.tasks[0].stages["train"].extend(words)
    study.save()
    work = task.Task(str(study.path), "00", "train", 2, 1, gpus)
    if not refused:
        work()
        assert study.state(study.tasks[0])["done"] == ["train"]
        return
    with pytest.raises(RuntimeError, match=r"asked for 2 GPU\(s\) .* sees none"):
        work()
    state = study.state(study.tasks[0])
    assert state["status"] == "failed" and "sees none" in state["error"]["line"]
    assert not study.run(study.tasks[0]).exists()


def test_interrupted(task: ModuleType, tmp_path: Path) -> None:
    study = make_study(tmp_path, "raise SystemExit(130)")  # as after Ctrl-C
    with pytest.raises(RuntimeError, match="was interrupted"):
        run(task, study)
    state = study.state(study.tasks[0])
    assert (state["status"], state["done"]) == ("interrupted", [])
    assert state["attempts"][-1]["outcome"] == "interrupted"


def test_requeues_are_bounded(task: ModuleType, tmp_path: Path) -> None:
    study = make_study(tmp_path, "1 / 0")
    spec = study.tasks[0]
    work = task.Task(str(study.path), "00", "train", 2, 1)
    for number in range(3):
        with pytest.raises(ZeroDivisionError):
            work()
        again = work.checkpoint()
        if number < 2:
            assert again is not None
            assert study.state(spec)["status"] == "requeued"
    assert again is None  # submitit does not requeue then
    state = study.state(spec)
    assert state["status"] == "failed"
    assert "requeued 2 times and not once more" in state["error"]["line"]
    with pytest.raises(RuntimeError, match="not once more"):  # SLURM did it by itself
        work()


def test_requeues_by_slurm_count(
    task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, FINISH)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(RuntimeError, match="not once more"):
        run(task, study)
    assert not (study.run(study.tasks[0]) / "a").exists()


@pytest.mark.parametrize("reaches", [True, False])
def test_preempted__submitit_requeues(
    task: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reaches: bool,
) -> None:
    """USR2 during the command reaches submitit's handler, once the command is out."""
    script = "import os, signal, time\nos.kill(os.getpid(), 12)\ntime.sleep(60)"
    study = make_study(tmp_path, script)
    work = task.Task(str(study.path), "00", "train", 2, 1)
    calls: list[int] = []

    def handler(signum: int, frame: Any) -> None:  # as submitit's
        calls.append(signum)
        if work.checkpoint() is None:
            raise UncompletedJobError("Job not requeued because: x.")
        sys.exit(-1)

    monkeypatch.delenv("SUBMITIT_DEBUG_JOB_ID")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    if not reaches:
        work.max_requeues = 0
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit if reaches else UncompletedJobError):
            work()
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert calls == [signal.SIGUSR2]
    state = study.state(study.tasks[0])
    assert state["status"] == ("requeued" if reaches else "failed")
    if not reaches:
        assert "requeued 0 times" in state["error"]["line"]


def test_fence__ends_the_older_process(
    task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, FINISH)
    spec = study.tasks[0]
    ended = threading.Event()

    def leave(code: int) -> None:
        assert code == task.SUPERSEDED
        ended.set()

    monkeypatch.setattr(task, "FENCE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    work = task.Task(str(study.path), "00", "train", 2, 1)
    own = {"job": "5", "restart": 0, "started": 1.0, "stage": "train"}
    own |= {"host": "a", "pid": 1, "ended": None, "gpus": []}
    study.update_state(spec, attempts=[own])
    work._fence(study, spec)
    assert not ended.wait(0.3)
    newer = {**own, "restart": 1, "started": 2**40}
    study.update_state(spec, attempts=[own, newer])
    assert ended.wait(10)
