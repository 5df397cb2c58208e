from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import slurm.report
import slurm.status
import slurm.study

ROOT = Path(__file__).parents[2]
ENDED_PID = 2**22 + 1  # larger than any process number


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("PATH", "")  # no SLURM
    return slurm.status


@pytest.fixture
def study(status: ModuleType, tmp_path: Path) -> Any:
    module = slurm.study
    tasks = [
        module.TaskSpec(
            f"0{seed}-seed={seed}", {"seed": str(seed)}, {"train": [], "evaluate": []}
        )
        for seed in range(2)
    ]
    made = module.Study(
        tmp_path / "s",
        ["benchmarks/x.py"],
        tasks,
        str(tmp_path),
        {},
        module.origin(),
    )
    made.path.mkdir()
    made.submissions.append(
        {
            "date": "",
            "cluster": "slurm",
            "jobs": {
                task.name: {"train": f"7_{i}", "evaluate": f"8_{i}"}
                for i, task in enumerate(tasks)
            },
        }
    )
    made.save()
    return made


def attempt(stage: str, job: str, pid: int = ENDED_PID) -> dict[str, Any]:
    return {
        "stage": stage,
        "job": job,
        "restart": 0,
        "host": platform.node(),
        "pid": pid,
        "gpus": ["A100"],
        "started": 100.0,
        "ended": None,
    }


def write_run(study: Any, task: Any, text: str) -> None:
    run = study.run(task) / "SimMIM-seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("recipe:\n  epochs: 12\n")
    (run / "metrics.csv").write_text(text)


TRAINING = {"stage": "train", "status": "running"}
FAILED = {
    "stage": "train",
    "status": "failed",
    "error": {"stage": "train", "line": "ValueError: no", "traceback": "T"},
}


@pytest.mark.parametrize(
    ("state", "queue", "expected", "detail"),
    [
        ({}, {"7_0": ("PENDING", "Priority")}, "queued", "Priority"),
        ({}, {"7_0": ("RUNNING", "None")}, "starting", "RUNNING"),
        (TRAINING, {"7_0": ("RUNNING", "None")}, "running", ""),
        (TRAINING, {"7_0": ("COMPLETING", "None")}, "running", "COMPLETING"),
        (TRAINING, {"7_0": ("PENDING", "BeginTime")}, "requeued", "BeginTime"),
        (
            {"stage": "train", "status": "requeued"},
            {"7_0": ("RUNNING", "None")},
            "starting",
            "RUNNING",
        ),
        (
            TRAINING,
            {"7_0": ("PENDING", "launch failed requeued held")},
            "held",
            "launch failed requeued held: it stays so until you say scontrol release "
            "7_0",
        ),
        (TRAINING, {"7_0": ("PENDING", "launch_failed_requeued_held")}, "held", "7_0"),
        ({}, {"7_0": ("PENDING", "JobHeldUser")}, "held", "scontrol release 7_0"),
        ({}, {"7_0": ("PENDING", "JobHeldAdmin")}, "held", "JobHeldAdmin"),
        ({}, {"7_0": ("PENDING", "JobHoldMaxRequeue")}, "held", "release 7_0"),
        (TRAINING, {"7_0": ("REQUEUE_HOLD", "None")}, "held", "release 7_0"),
        ({"status": "done", "done": ["train"]}, {"8_0": ("PENDING", "JobHeldUser")},
         "held", "release 8_0"),
        ({}, {"7_0": ("PENDING", "QOSUsageThreshold")}, "queued", "Threshold"),
        (TRAINING, {}, "lost", "job 7_0 ended without a word"),
        (TRAINING, None, "running", "SLURM cannot be asked here"),
        ({}, {}, "lost", "There is no log"),
        (FAILED, {}, "failed", "ValueError: no"),
        (FAILED | {"status": "interrupted"}, {}, "interrupted", "ValueError: no"),
        (FAILED, None, "failed", "ValueError: no"),
        ({"status": "done", "done": ["train"]}, {"8_0": ("PENDING", "Dependency")},
         "trained", "Dependency"),
        ({"status": "done", "done": ["train"]}, {}, "lost", "job 8_0"),
        ({"status": "done", "done": ["train", "evaluate"]}, {}, "done", ""),
    ],
)  # fmt: skip
def test_state(
    status: ModuleType,
    study: Any,
    state: dict[str, Any],
    queue: dict[str, tuple[str, str]] | None,
    expected: str,
    detail: str,
) -> None:
    task = study.tasks[0]
    if state:
        study.update_state(task, attempts=[attempt("train", "7_0")], **state)
    row = status.rows(study, queue)[0]
    assert row.state == expected
    assert detail in row.detail and bool(detail) == bool(row.detail)


def test_state__failed_before_and_sent_again(status: ModuleType, study: Any) -> None:
    task = study.tasks[0]
    study.update_state(task, attempts=[attempt("train", "7_0")], **FAILED)
    study.submissions.append(
        {"date": "", "cluster": "slurm", "jobs": {task.name: {"train": "9"}}}
    )
    for queued, state in (("PENDING", "queued"), ("RUNNING", "starting")):
        assert status.rows(study, {"9": (queued, "")})[0].state == state


def test_state__lost_shows_the_log(status: ModuleType, study: Any) -> None:
    study.update_state(study.tasks[0], attempts=[attempt("train", "7_0")], **TRAINING)
    log = status.log_file(study, "7_0")
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\nsrun: error: Killed\n\n")
    detail = status.rows(study, {})[0].detail
    assert detail.endswith("Last line of its log: srun: error: Killed")


def test_state__on_this_machine(status: ModuleType, study: Any) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    study.submissions[-1]["cluster"] = "local"
    task = study.tasks[0]
    mine = attempt("train", "7_0", sleeper.pid)
    study.update_state(task, attempts=[mine], **TRAINING)
    assert status.rows(study, None)[0].state == "running"
    assert status.rows(study, None)[1].state == "lost"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert status.rows(study, None)[0].state == "lost"
    sleeper.communicate()
    assert status.rows(study, None)[0].state == "lost"


def test_requeues_and_progress(status: ModuleType, study: Any) -> None:
    task = study.tasks[0]
    attempts = [attempt("train", job) for job in ("3", "7_0", "7_0", "7_0")]
    study.update_state(task, attempts=attempts, **TRAINING)
    write_run(
        study,
        task,
        "epoch,step,train_loss_step,train_loss,images_per_second\n"
        "0,9,0.75,,\n0,9,,0.8,123.4\n1,19,0.5,,\n1,2",
    )
    row = status.rows(study, {"7_0": ("RUNNING", "None")})[0]
    assert row.requeues == 2
    assert row.progress == {"epoch": "2/12", "loss": "0.5000", "images/s": "123"}


def test_main(
    status: ModuleType, study: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study.update_state(study.tasks[0], attempts=[attempt("train", "7_0")], **FAILED)
    with pytest.raises(SystemExit) as exit_:
        status.main([str(study.path)])
    assert exit_.value.code == 1
    output = capsys.readouterr().out
    assert "s: 1 failed, 1 queued" in output and "ValueError: no" in output
    assert f"python slurm/submit.py --resume {study.path}" in output
    with pytest.raises(SystemExit) as exit_:
        status.main([str(tmp_path)])
    assert exit_.value.code == 2
    assert "is not a study" in capsys.readouterr().err


def test_starts_without_torch(study: Any) -> None:
    code = "import sys, slurm.status; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


# The report.


def test_report(status: ModuleType, study: Any) -> None:
    top1 = [0.75, 0.8]
    for task, value in zip(study.tasks, top1, strict=True):
        done = ["train", "evaluate"]
        study.update_state(
            task, status="done", done=done, attempts=[attempt("train", "7_0")]
        )
        study.run(task).mkdir()
        (study.run(task) / "summary.csv").write_text(
            f"method,seed,model,protocol,top1\nMAE,0,pretrained,knn,{value}\n"
            "MAE,0,raw pixels,knn,0.5\n"
        )
    said = slurm.report.write_report(study)
    assert "| MAE | pretrained | 77.5 ± 3.5 (2) |" in said
    assert "| MAE | raw pixels | 50.0 ± 0.0 (2) |" in said
    assert "Not finished" not in said
    with (study.path / "study.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["task"] for line in lines] == ["00-seed=0"] * 2 + ["01-seed=1"] * 2
    assert [line["top1"] for line in lines] == ["0.75", "0.5", "0.8", "0.5"]
    assert {line["commit"] for line in lines} == {study.origin["commit"]}
    assert lines[0]["gpus"] == '["A100"]'
    assert not (study.path / "report.html").exists()  # there is no run


def test_report__page_of_all_runs(status: ModuleType, study: Any) -> None:
    for task, lr in zip(study.tasks, (0.1, 0.01), strict=True):
        run = study.run(task) / "MAE-seed0"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"recipe: {{lr: {lr}}}\n")
        (run / "metrics.csv").write_text(f"epoch,step,train_loss\n0,1,{lr}\n")
    said = slurm.report.write_report(study)
    assert said.endswith(f"; open {study.path / 'report.html'} with a browser.")
    page = (study.path / "report.html").read_text()
    for task in study.tasks:
        assert f"</i> {task.name}" in page
    assert '"title": "training loss over lr"' in page
    assert (study.path / "figures" / "multiple_0.png").exists()


def test_report__lists_what_failed(status: ModuleType, study: Any) -> None:
    study.update_state(study.tasks[0], attempts=[attempt("train", "7_0")], **FAILED)
    said = slurm.report.write_report(study)
    assert "- `00-seed=0`: failed. ValueError: no" in said
    assert study.resume_command() in (study.path / "study.md").read_text()
    with (study.path / "study.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["error"] == "ValueError: no"


def test_is_running_here(status: ModuleType, study: Any) -> None:
    task = study.tasks[0]
    assert not status.is_running_here(study, task)
    words = [sys.executable, "-c", "import time; time.sleep(60)  # submitit"]
    with subprocess.Popen(words) as process:
        for host, expected in ((platform.node(), True), ("elsewhere", False)):
            ran = attempt("train", "7_0") | {"host": host, "pid": process.pid}
            study.update_state(task, attempts=[ran], status="running")
            assert status.is_running_here(study, task) == expected
        process.kill()
    ran["host"] = platform.node()
    study.update_state(task, attempts=[ran], status="running")
    assert not status.is_running_here(study, task)
    # The number belongs to another program now: to this one.
    study.update_state(task, attempts=[ran | {"pid": os.getppid()}])
    if Path("/proc").exists():
        assert not status.is_running_here(study, task)
