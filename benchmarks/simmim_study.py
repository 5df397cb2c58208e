"""Walks through the space that SimMIM's paper studies, one axis after the other.

Each of its rows, see `simmim_paper.rows`, is a pretraining run, evaluated by kNN and
linear probe:

OUT/default-seed0/  a run directory, see `lightly_mim.runs`, with results.json and with
                    row.json, see `simmim_paper.tables`
OUT/summary.csv     one line per run, model and protocol
OUT/table.md        the tables that are printed at the end, one per axis
OUT/avgdist.png     how far masked pixels are from visible ones
OUT/masks.png       eight draws of each way to mask
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from studies.script import script  # isort: skip  # before PyTorch
from simmim_paper.figures import distance_curves, draw_distances, draw_masks
from simmim_paper.forms import FULL, QUICK, SMALL, Form
from simmim_paper.rows import AXES, DEFAULT, MAE_DEFAULT, Space
from simmim_paper.tables import MASK_AXES, ROW_FILE, describe, report
from solar_cells import DATA as SOLAR_CELLS
from studies.options import study_parser, whole_number
from studies.study import Plan, Study, is_main_process

from lightly_mim import MAE
from lightly_mim.data import open_data
from lightly_mim.files import atomic_write
from lightly_mim.reporting.study import PRETRAINED, PROTOCOLS, duration
from lightly_mim.spelling import meant

IMAGENETTE = "imagenette"

EPILOG = """\
examples:
  # does it run? two rows, a minute
  python benchmarks/simmim_study.py --quick

  # every axis in its small form, two runs side by side
  python benchmarks/simmim_study.py --axis all --workers 2

  # how far masked pixels are from visible ones: a picture, without training
  python benchmarks/simmim_study.py --plot --img-size 192 \\
      --encoder vit_base_patch16_224

  # on Imagenette (the folder that benchmarks/imagenette.py --download makes), as an
  # array of one GPU for each row and seed, and its tables
  python slurm/submit.py --partition gpu --gpus-per-node 1 --study studies/simmim \\
      --sweep row=$(python benchmarks/simmim_study.py --list --data imagenette) \\
      seed=0,1,2 -- benchmarks/simmim_study.py --data imagenette
  python benchmarks/simmim_study.py --tables studies/simmim
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    small, full = SMALL.pretraining, FULL.pretraining
    parser = study_parser(
        "simmim_study.py",
        "Walk through the space of SimMIM: masking, ratio, unit, head, target, "
        "resolution,\nloss, region and decoder. One pretraining run for each row of "
        "their tables, by kNN\nand a linear probe. The solar cells get a small form "
        "of it, other images a large one.",
        EPILOG,
        {
            "out": "runs/simmim-study",
            "encoder": f"{SMALL.encoder} with "
            + " ".join(f"{name}={v}" for name, v in SMALL.encoder_options.items())
            + f" for the solar cells, else {FULL.encoder}",
            "img_size": f"{SMALL.img_size} for the solar cells, else {FULL.img_size}",
            "epochs": f"{small['epochs']} for the solar cells, else {full['epochs']}",
            "batch_size": f"{small['batch_size']} for the solar cells, else "
            f"{full['batch_size']}",
            "lr": f"so that a batch of {small['batch_size']} has {SMALL.lr:g} for the "
            "solar cells, else the recipe's",
        },
        methods=False,
    )
    rows = parser.add_argument_group("the rows").add_mutually_exclusive_group()
    rows.add_argument(
        "--axis",
        nargs="+",
        choices=[*AXES, "all"],
        default=[],
        metavar="NAME",
        help=f"one or more of {', '.join(AXES)}; or all (default: all)",
    )
    rows.add_argument(
        "--row",
        nargs="+",
        default=[],
        metavar="NAME",
        help="these rows alone, by the names that --list prints; the baselines, random "
        f"initialisation and raw pixels, come with {DEFAULT}",
    )
    parser.add_argument(
        "--data",
        default=SOLAR_CELLS,
        metavar="DATA",
        help=f"{SOLAR_CELLS}; {IMAGENETTE}, which is looked for in datasets/; or a "
        "folder with train/ and val/ and one folder per class in each (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--finetune", action="store_true", help="fine-tune every encoder as well"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes that work on the rows side by side, on CPUs or on one GPU "
        "(default: 1)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the shortest setting, without --axis and --row of two rows: shows that "
        "everything runs, its numbers mean nothing",
    )
    instead = parser.add_argument_group(
        "instead of training"
    ).add_mutually_exclusive_group()
    instead.add_argument(
        "--list",
        action="store_true",
        help="print the names of the chosen rows, with commas between them",
    )
    instead.add_argument(
        "--plot", action="store_true", help="draw avgdist.png and masks.png into --out"
    )
    instead.add_argument(
        "--tables",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="print the tables of the runs in DIR, the --out of a study or a study of "
        "slurm/submit.py, and write them into the first one",
    )
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Trains and evaluates the chosen rows, or does what was asked for instead."""
    if arguments.tables:
        report(arguments.tables, command)
        return
    chosen = names(arguments)
    if arguments.list:
        print(",".join(chosen))
        return
    if arguments.plot:
        _plot(space(arguments), arguments.out)
        return
    _check_images(arguments)
    _run(arguments, {name: plan(name, arguments) for name in chosen}, command)


def images(arguments: argparse.Namespace) -> str:
    """Returns the folder or the name of the images."""
    # Those of benchmarks/imagenette.py.
    return f"{IMAGENETTE}-320" if arguments.data == IMAGENETTE else arguments.data


def _check_images(arguments: argparse.Namespace) -> None:
    """Raises a ValueError where the evaluation would find no labels or no images."""
    arguments.data = images(arguments)
    train, test = open_data(arguments.data)
    if not (getattr(train, "classes", None) and test):
        raise ValueError(
            f"The study needs labelled training and test images, and {arguments.data} "
            "does not have both: give a folder with train/ and val/ and one folder per "
            "class in each."
        )


# What there is to train.


def form(arguments: argparse.Namespace) -> Form:
    """Returns the form of the study that the words ask for."""
    if arguments.quick:
        return QUICK
    return SMALL if arguments.data == SOLAR_CELLS else FULL


def space(arguments: argparse.Namespace) -> Space:
    """Returns the space of the rows that the words ask for."""
    of = form(arguments)
    encoder: dict[str, Any] = {
        "encoder": arguments.encoder or of.encoder,
        "img_size": arguments.img_size or of.img_size,
        "in_chans": 1 if arguments.data == SOLAR_CELLS else 3,
    }
    if encoder["encoder"] == of.encoder:
        encoder |= of.encoder_options
    return Space.of(of, encoder | dict(arguments.encoder_option))


def names(arguments: argparse.Namespace) -> list[str]:
    """Returns the names of the chosen rows, each one once.

    Args:
        arguments:
            What `parser` has read.

    Raises:
        ValueError: If there is no such row with these images and this encoder.
    """
    of = space(arguments)
    rows, given = of.rows(), arguments.row
    if arguments.quick and not (arguments.axis or given):
        given = [DEFAULT, MAE_DEFAULT]
    if given:
        for name in given:
            if name not in rows:
                raise ValueError(
                    f"There is no row {name!r} with these images and this encoder."
                    f"{meant(name, rows)} --list prints those that there are."
                )
        if len(set(given)) < len(given):
            raise ValueError(f"--row names each one once, got {given}.")
        return list(given)
    every = "all" in arguments.axis or not arguments.axis
    axes = list(AXES) if every else arguments.axis
    return list(dict.fromkeys(row.name for axis in axes for row in of.axis(axis)))


def plan(name: str, arguments: argparse.Namespace) -> Plan:
    """Returns how to build, train and evaluate a row.

    Args:
        name:
            Its name.
        arguments:
            What `parser` has read.
    """
    of = form(arguments)
    row = space(arguments).rows()[name]
    pretraining: dict[str, Any] = {**of.pretraining, "lr": arguments.lr}
    # The images that are not for training are the test images.
    pretraining["validate"] = False
    for option in ("epochs", "batch_size"):
        pretraining[option] = getattr(arguments, option) or pretraining[option]
    recipe = row.method.recipe()
    pretraining["recipe"] = recipe
    if row.method is MAE:  # the share of the paper's longest runs
        pretraining["warmup_epochs"] = pretraining["epochs"] * 0.025
    if arguments.lr is None and of.lr is not None:
        # pretrain takes the rate for as many images as the recipe counts by.
        pretraining["lr"] = of.lr * recipe.lr_batch_size / of.pretraining["batch_size"]
    baselines = ["random", "pixels"] if name == DEFAULT else []
    return Plan(row.build, pretraining, {"baselines": baselines})


# Training.


def _study(arguments: argparse.Namespace, plans: dict[str, Plan]) -> Study:
    of = form(arguments)
    protocols = [*PROTOCOLS, *(["finetune"] if arguments.finetune else [])]
    # The same features of all methods, so that rows differ in one thing.
    evaluation = {"protocols": protocols, "pools": ["mean"], **of.evaluation}
    if not arguments.finetune:
        evaluation.pop("finetune", None)
    return Study(arguments, arguments.data, plans, of.last_layers, evaluation)


def _run(arguments: argparse.Namespace, plans: dict[str, Plan], command: str) -> None:
    """Trains and evaluates what is not finished, and prints the tables."""
    start = time.perf_counter()
    if arguments.workers > 1:
        _side_by_side(arguments, plans, command)
    else:
        _train(arguments, plans, command)
    if arguments.stage == "train" or not is_main_process():
        return
    if not arguments.row and (
        not arguments.axis or {*MASK_AXES, "all"} & {*arguments.axis}
    ):
        _plot(space(arguments), arguments.out)
    print(f"The command took {duration(time.perf_counter() - start)}.")
    report([arguments.out], command)


def _train(
    arguments: argparse.Namespace,
    plans: dict[str, Plan],
    command: str,
    say: Callable[[str], None] = print,
) -> None:
    of = space(arguments)
    for run in _study(arguments, plans).runs():
        about = describe(run.method, of, plans[run.method], arguments.data)
        about["command"] = command
        with atomic_write(run.path / ROW_FILE) as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n")
        scores = run.scores(PRETRAINED).values()
        found = (f"{row['protocol']} {100 * row['top1']:.1f} %" for row in scores)
        say(f"{run.method}, seed {run.seed}: {', '.join(found)}")


def _side_by_side(
    arguments: argparse.Namespace, plans: dict[str, Plan], command: str
) -> None:
    """Lets several processes train and evaluate, each one run after the other."""
    if arguments.devices not in ("auto", 1) or (arguments.num_nodes or 1) > 1:
        raise ValueError(
            "--workers is for runs of one device each: leave --devices and --num-nodes "
            "out, or train one run after the other."
        )
    arguments.given["devices"] = 1
    _study(arguments, plans).check()
    arguments.out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    context = multiprocessing.get_context("spawn")
    tasks = context.SimpleQueue()
    for task in [(name, seed) for seed in arguments.seed for name in plans]:
        tasks.put(task)
    workers = [
        context.Process(target=_work, args=(arguments, command, tasks, number))
        for number in range(1, arguments.workers + 1)
    ]
    for worker in workers:
        tasks.put(None)  # the end of its work
        worker.start()
    logs = arguments.out / "worker-*.log"
    print(f"{len(plans)} rows, {len(workers)} workers: {logs}", flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in workers:  # if this process was told to end
            worker.terminate()
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise ChildProcessError(
            f"Not every row came to its end, see {logs}. Go on with --resume."
        )


def _work(arguments: argparse.Namespace, command: str, tasks: Any, number: int) -> None:
    """Is a worker: all that is printed goes to its log, a line per run to the user."""
    say = partial(print, file=os.fdopen(os.dup(1), "w"), flush=True)
    with (arguments.out / f"worker-{number}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    while (task := tasks.get()) is not None:
        name, arguments.seed = task[0], [task[1]]
        try:
            _train(arguments, {name: plan(name, arguments)}, command, say)
        except Exception as error:
            say(f"{name}, seed {task[1]}: {error}")
            raise


def _plot(of: Space, out: Path) -> None:
    draw_masks(of.side, of.unit, out / "masks.png")
    path = out / "avgdist.png"
    draw_distances(distance_curves(of.side, of.fine), of.side, path)
    print(f"AvgDist of every way to mask: {path}")


if __name__ == "__main__":
    main()
