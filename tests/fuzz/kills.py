"""Kills work at random moments, goes on with it, and compares with what never was cut.

    python tests/fuzz/kills.py FOLDER_OF_PHOTOS EMPTY_FOLDER [TRIALS]
    python tests/fuzz/kills.py FOLDER_OF_PHOTOS EMPTY_FOLDER KILLS study

A start of Python takes seconds, so children are forked from this process, which has
imported everything and computes nothing: PyTorch cannot be forked after it has.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import importlib
import os
import random
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightly_mim import MAE, evaluate, pretrain
from lightly_mim.evaluation import KNN, FineTune, Linear
from lightly_mim.files import read_sealed

TIMED = {"images_per_second", "seconds", "feature_seconds", "command", "out"}
SHORT_RUN: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 8,
    "precision": "32-true",
    "accelerator": "cpu",
    "devices": 1,
    "num_workers": 0,
    "tensorboard": False,
    "log_every": 1,
    "save_every_minutes": 1e-6,
}


def build() -> MAE:
    return MAE(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=1,
        decoder_dim=16,
        decoder_depth=1,
        decoder_num_heads=1,
        drop_path_rate=0.1,
    )


def pretraining(photos: Path, out: Path, _: Path) -> None:
    pretrain(out, photos, build, resume=True, **SHORT_RUN)


def evaluation(photos: Path, out: Path, run: Path) -> None:
    evaluate(
        run,
        photos,
        (KNN(ks=[1, 3]), Linear(epochs=3, num_folds=2), "logistic"),
        baselines=["random"],
        out=out,
        overwrite=True,
        num_workers=0,
        device="cpu",
        batch_size=4,
    )


def finetuning(photos: Path, out: Path, run: Path) -> None:
    evaluate(
        run,
        photos,
        [FineTune(epochs=3, batch_size=8)],
        out=out,
        overwrite=True,
        num_workers=0,
        device="cpu",
    )


def of_run(out: Path) -> Any:
    """Returns what a run has left, without what tells the time."""
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    with (out / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in TIMED}
            for row in csv.DictReader(file)
        ]
    weights = {name: tensor.tolist() for name, tensor in state["state_dict"].items()}
    return weights, rows, (out / "encoder.safetensors").read_bytes()


def of_evaluation(out: Path) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in TIMED}
        return [strip(each) for each in value] if isinstance(value, list) else value

    # Its seal is checked; it is of the times, too.
    return strip(read_sealed(out / "results.json", "None."))


def difference(found: Any, expected: Any) -> str:
    """Returns where two results differ first, "" if they are equal."""
    if found == expected:
        return ""
    if isinstance(found, list | tuple) and len(found) == len(expected):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(found, dict) and found.keys() == expected.keys():
        name = next(name for name in found if found[name] != expected[name])
        return f"[{name}] {difference(found[name], expected[name])}"
    return f"is {found!r:.100}, not {expected!r:.100}"


KINDS: dict[str, tuple[Callable[[Path, Path, Path], None], Callable[[Path], Any]]] = {
    "pretraining": (pretraining, of_run),
    "evaluation": (evaluation, of_evaluation),
    "fine-tuning": (finetuning, of_evaluation),
}


def fork(work: Callable[[], None], log: Path) -> int:
    """Returns the number of a process that does some work and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        with log.open("a") as file, contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 2)
            warnings.simplefilter("ignore")
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(photos: Path, root: Path, trials: int) -> int:
    """Returns the number of trials that ended otherwise."""
    rng = random.Random(14)
    torch.set_num_threads(1)
    run, log = root / "pretraining", root / "log.txt"
    expected, seconds = {}, {}
    for kind, (work, read) in KINDS.items():
        out = root / kind
        start = time.perf_counter()
        if not finish(fork(partial(work, photos, out, run), log)):
            print(f"{kind} fails without a kill:\n{log.read_text()}")
            return 1
        seconds[kind] = time.perf_counter() - start
        expected[kind] = read(out)
    counts: collections.Counter[str] = collections.Counter()
    for trial in range(trials):
        kind = list(KINDS)[trial % 4 % 3]  # pretraining twice as often
        work, read = KINDS[kind]
        out = root / f"{kind}-{trial}"
        log = root / f"log-{trial}.txt"

        def begin(work: Any = work, out: Path = out, log: Path = log) -> int:
            return fork(lambda: work(photos, out, run), log)

        for _ in range(rng.choice([1, 1, 2])):
            child = begin()
            time.sleep(rng.uniform(0.02, seconds[kind]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            ended = finish(child)
            counts[f"{kind} {'had ended' if ended else 'killed'}"] += 1
        went_on = finish(begin())
        try:
            found = read(out) if went_on else None
            other = difference(found, expected[kind]) if went_on else "it fails"
        except Exception as error:
            other = repr(error)
        counts["WRONG" if other else "ended the same"] += 1
        if other:
            print(f"trial {trial}, {kind}: {other}\n{log.read_text()[-3000:]}")
    print(f"{trials} trials: {dict(counts)}")
    return counts["WRONG"]


# A study: one that is killed again and again, and one that never is.

TRAIN = """--cluster local --parallel 2 --sweep seed=0,1
-- lightly-mim pretrain --data {photos} --method MAE
--method.encoder vit_tiny_patch16_224 --method.img_size 16 --method.patch_size 4
--method.embed_dim 16 --method.depth 1 --method.num_heads 1 --method.decoder_dim 16
--method.decoder_depth 1 --method.decoder_num_heads 1 --epochs 3 --batch_size 8
--precision 32-true --accelerator cpu --num_workers 0 --tensorboard false
--log_every 1 --save_every_minutes 1e-6"""
# A job starts for seconds and trains for one: kills come after one of these is written.
EVENTS = [
    None,
    "tasks/*/state.json",
    "tasks/*/run/config.yaml",
    "tasks/*/run/checkpoints/last.ckpt",
]
OF_THE_TASK = {"images/s", "requeues", "host", "gpus", "commit", "modified", "error"}


def submit(words: list[str]) -> None:
    """Does what slurm/submit.py does."""
    from slurm import submit as script

    try:
        script.main(words)
    except SystemExit as error:
        print(f"submit.py: exit code {error.code}", flush=True)


def of_study(path: Path) -> Any:
    """Returns the numbers of a study and the weights of its runs."""
    with (path / "study.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in TIMED | OF_THE_TASK}
            for row in csv.DictReader(file)
        ]
    runs = sorted((path / "tasks").glob("*/run"))
    return rows, [of_run(run) for run in runs]


def descendants(parent: int) -> list[int]:
    """Returns the processes that a process has started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(
                stat.read_text().rpartition(")")[2].split()[1]
            )
    found = [parent]
    for process in found:
        found += [child for child, its in parents.items() if its == process]
    return found[1:]


def kill_study(photos: Path, root: Path, kills: int) -> int:
    """Returns whether a study that was killed ends otherwise."""
    rng = random.Random(14)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from slurm import report, status
    from slurm import study as studies

    importlib.import_module("slurm.submit")  # what each child would import
    new = shlex.split(TRAIN.format(photos=photos))
    start, log = time.perf_counter(), root / "log.txt"
    whole, path = root / "whole", root / "killed"
    finish(fork(lambda: submit(["--study", str(whole), *new]), log))
    seconds = time.perf_counter() - start
    expected = of_study(whole)
    print(f"The study takes {seconds:.0f} seconds.", flush=True)

    def go_on() -> int:
        begun = path.exists()
        words = ["--resume", str(path)] if begun else ["--study", str(path), *new]
        return fork(lambda: submit(words), log)

    counts: collections.Counter[str] = collections.Counter()
    for number in range(kills):
        start, child = time.time(), go_on()
        event = rng.choice(EVENTS)
        while event is not None and not any(
            each.stat().st_mtime > start for each in path.glob(event)
        ):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0 if event else seconds / 4))
        jobs = descendants(child)
        rng.shuffle(jobs)
        whom = rng.choice(["a job first", "everything", "submit.py first"])
        order = [child, *jobs] if whom == "submit.py first" else [*jobs, child]
        if number == kills - 1:  # its jobs run on, and end unseen
            whom, order = "submit.py", [child]
        for process in order:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            if whom.endswith("first") and process == order[0]:
                time.sleep(rng.uniform(0, 1))
        counts[f"{whom} after {event}"] += 1
        os.waitpid(child, 0)
    for _ in range(5):
        while path.exists() and any(
            status.is_running_here(studies.Study.load(path), task)
            for task in studies.Study.load(path).tasks
        ):
            time.sleep(0.2)  # what outlived its submit.py
        finish(go_on())
        study = studies.Study.load(path)
        if not any(study.open_stages(task) for task in study.tasks):
            break
    finish(fork(lambda: print(report.write_report(study)), log))
    same = of_study(path) == expected
    attempts = sum(len(study.state(task)["attempts"]) for task in study.tasks)
    print(f"{kills} kills: {dict(counts)}, {attempts} attempts, the same: {same}")
    if not same:
        print(log.read_text()[-3000:])
    return int(not same)


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:3]]
    number = int(sys.argv[3]) if len(sys.argv) > 3 else 60
    act = kill_study if sys.argv[4:] == ["study"] else main
    sys.exit(min(act(folders[0], folders[1], number), 1))
