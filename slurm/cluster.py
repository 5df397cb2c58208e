"""The sbatch scripts that come of a cluster's options, through submitit."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from slurm.options import ALL_STAGES, FIRST, machine
from slurm.status import release_command
from slurm.study import Study, TaskSpec
from slurm.task import Task

_YEAR = 365 * 24 * 60  # minutes


def parameters(
    study: Study, options: argparse.Namespace, stage: str, num_tasks: int
) -> dict[str, Any]:
    """Returns what sbatch gets for the jobs of a stage, in submitit's words.

    A stage is `train`, `run`, `evaluate` or `report`.
    """
    nodes, devices = machine(options) if stage in ("train", "run") else (1, 1)
    cpus, mem = options.cpus_per_gpu or options.cpus_per_task, options.mem
    limit, delay = options.time, options.signal_delay
    passed = dict(options.sbatch)
    if stage in ("evaluate", "report"):
        passed = {name: value for name, value in passed.items() if name not in FIRST}
    if stage == "evaluate":
        limit, mem = options.evaluation_time or limit, _share(options)
    if stage == "report":
        cpus, mem, limit = None, None, 30
        delay = 60  # it has nothing to save
        passed = {name: value for name, value in passed.items() if name in ALL_STAGES}
        if options.cpu_partition:
            passed.pop("constraint", None)
            passed["partition"] = options.cpu_partition
    if "mail-user" in passed:
        passed.setdefault("mail-type", "END,FAIL,REQUEUE")
    gpus = _gpus(options, stage)
    found = {
        "job_name": f"{study.path.name}-{stage}",
        "nodes": nodes,
        "ntasks_per_node": devices,
        "gpus_per_node": f"{options.gpus_per_node.type}{gpus}" if gpus else None,
        "cpus_per_task": cpus,
        "mem": mem,
        "signal_delay_s": delay,
        "array_parallelism": options.parallel or num_tasks,
        "stderr_to_stdout": True,
        "setup": _setup(study, options, stage),
        # A rank that fails ends the others, which would wait for it for ever.
        "srun_args": ["--kill-on-bad-exit=1"],
        # What submitit counts by; sbatch gets its own words.
        "time": _YEAR,
        "additional_parameters": {"requeue": True, "time": limit, **passed},
    }
    found = {name: value for name, value in found.items() if value is not None}
    return found | {"wckey": None}  # clusters that track keys refuse submitit's own


def _gpus(options: argparse.Namespace, stage: str) -> int:
    """Returns how many GPUs the jobs of a stage get per node."""
    all_of_them = int(options.gpus_per_node)
    return {"report": 0, "evaluate": min(1, all_of_them)}.get(stage, all_of_them)


def _share(options: argparse.Namespace) -> str | None:
    """Returns the part of a node's memory that a single process gets."""
    mem: str | None = options.mem
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", mem or "", re.IGNORECASE)
    if size is None:
        return mem  # which sbatch refuses
    factor = {"K": 1 / 1024, "G": 1024, "T": 1024**2}.get(size[2].upper(), 1)
    share = math.ceil(int(size[1]) * factor / machine(options).devices)
    return f"{share}M" if share else None  # 0 is all of the node


def variables(options: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of `--env`."""
    return dict(variable.split("=", 1) for variable in options.env)


def _setup(study: Study, options: argparse.Namespace, stage: str) -> list[str]:
    env = variables(options)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    lines += options.setup
    if stage != "report" and (options.cpus_per_gpu or options.cpus_per_task):
        # srun of Slurm 22.05 to 23.02 does not take it from sbatch.
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return [*lines, *snapshot_lines(study)]


def snapshot_lines(study: Study) -> list[str]:
    """Returns the lines of shell that make Python import the snapshot.

    `python -m` looks where it stands first, then in PYTHONPATH, then among the
    installed packages. The task goes back to where the user stood.
    """
    code = shlex.quote(str(study.code))
    return [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}", f"cd {code}"]


class StudyExecutor(SlurmExecutor):
    """Submitit's executor, which also shows its script where there is no SLURM."""

    @classmethod
    def name(cls) -> str:
        """The name that a job finds its environment by."""
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        """Enough: `check_slurm` says what is missing."""
        return 2

    def script(self, num_tasks: int) -> str:
        """Returns the sbatch script as it is submitted for a number of tasks."""
        parameters = self.parameters
        if num_tasks > 1:
            self.parameters = {**parameters, "map_count": num_tasks}
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = parameters


def executor(
    study: Study, options: argparse.Namespace, stage: str, num_tasks: int
) -> StudyExecutor:
    """Returns the executor of a stage. Writes nothing."""
    # Submitit counts time limits alone; Task.checkpoint() counts every requeue.
    limit = options.max_requeues + 1
    made = StudyExecutor(study.jobs / "%j", limit, python=options.python)
    made.update_parameters(**parameters(study, options, stage, num_tasks))
    return made


def work(study: Study, options: argparse.Namespace, task: TaskSpec, stage: str) -> Task:
    """Returns what a job runs."""
    bounds = options.max_requeues, options.signal_delay
    return Task(str(study.path), task.name, stage, *bounds, _gpus(options, stage))


def check_slurm(options: argparse.Namespace) -> None:
    """Raises a ValueError if there is no SLURM here, or no such partition.

    Sbatch would say so of the report's only when the other jobs are sent.
    """
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise ValueError(
                f"There is no {program} on this machine: submit from a login node of "
                "the cluster, or pass --cluster local, or --dry-run to see the script."
            )
    if shutil.which("sinfo") is None:
        return
    asked = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(
            "SLURM does not answer: submit from a login node of the cluster, or pass "
            f"--cluster local. sinfo says: {asked.stderr.strip()}"
        )
    known = sorted(set(asked.stdout.split()))
    for partitions in (options.sbatch.get("partition"), options.cpu_partition):
        for name in str(partitions or "").split(","):
            if name and name not in known:
                raise ValueError(
                    f"There is no partition {name!r}. There are: {', '.join(known)}."
                )


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides the job that a submission may be made in, but not the cluster."""
    config = os.environ.get("SLURM_CONF")
    with clean_env():
        if config is not None:
            os.environ["SLURM_CONF"] = config
        yield


def cancel(jobs: Sequence[submitit.Job[Any]]) -> None:
    """Cancels jobs of a submission that could not be completed."""
    for job in {str(job.job_id).partition("_")[0] for job in jobs}:
        subprocess.run(["scancel", job], check=False)


def release(jobs: Sequence[str]) -> None:
    """Releases jobs that SLURM holds.

    Raises:
        ValueError: If SLURM refuses.
    """
    words = release_command(jobs)
    try:
        subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise ValueError(f"{shlex.join(words)} failed: {said}") from error
