"""A study: every method with every seed, beside random initialisation and raw pixels.

OUT/SimMIM-seed0/   a run directory, see `lightly_mim.runs`, with its results.json
OUT/summary.csv     one line per run, model and protocol
OUT/table.md        the table that is printed at the end
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities import rank_zero_only

from lightly_mim.encoders import Pool
from lightly_mim.evaluation import PIXELS, RANDOM, evaluate
from lightly_mim.files import atomic_write, printable, read_sealed
from lightly_mim.methods import MaskedImageModel
from lightly_mim.pretraining import check_pretraining, default_precision, pretrain
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.reporting.study import (
    PROTOCOLS,
    RESULTS_FILE,
    Run,
    by_method,
    captions,
    duration,
    markdown_table,
    print_table,
    table_lines,
    verdict,
    write_summary,
)
from lightly_mim.runs import RunDirectory
from lightly_mim.settings import check_batch

# The poolings to choose from, by method; of others what the encoder has. SimMIM does
# not train the class token, MAE's own probe reads it.
POOLS: dict[str, tuple[Pool, ...]] = {
    "SimMIM": ("mean",),
    "MAE": ("mean", "cls", "cls+mean"),
}

_say = rank_zero_only(print)


@dataclass(frozen=True)
class Plan:
    """How a study builds and trains one method.

    Attributes:
        build:
            Makes the method, with weights from torch's random state.
        pretraining:
            Arguments of `pretrain`. Those of the machine are added to them.
        evaluation:
            Arguments of `evaluate` that are this method's own.
    """

    build: Callable[[], MaskedImageModel]
    pretraining: Mapping[str, Any]
    evaluation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Pretrains and evaluates each method with each seed.

    Attributes:
        arguments:
            What `study_parser` gave.
        data:
            Name or folder of the labelled images.
        plans:
            The methods by name.
        last_layers:
            The layer that is evaluated is chosen from this number of last ones, or from
            all if the encoder has fewer.
        evaluation:
            Further arguments of `evaluate`.
    """

    arguments: argparse.Namespace
    data: str
    plans: Mapping[str, Plan]
    last_layers: int
    evaluation: Mapping[str, Any]

    def report(self, title: str, notes: Sequence[str], command: str) -> list[Run]:
        """Trains, evaluates, and prints one table with all that belongs to it.

        Args:
            title:
                What stands above the table.
            notes:
                What a reader should know about the images.
            command:
                The command that runs the study again.

        Returns:
            The runs, see `runs`.

        Raises:
            ValueError: See `runs`.
        """
        start = time.perf_counter()
        runs = list(self.runs())
        if not runs:
            return []
        table = Table(title, *table_lines(runs))
        methods = by_method(runs).values()
        verdicts = [
            verdict(own, baseline) for own in methods for baseline in (RANDOM, PIXELS)
        ]
        found = dict.fromkeys(note for run in runs for note in run.results["notes"])
        said, notes = captions(runs), [*found, *notes]
        print_table(*table[:3])
        print("\n".join([*said, *notes, "", *verdicts, ""]))
        for own in methods:
            pictures = sorted(RunDirectory(own[0].path).reconstructions.glob("*.png"))
            for picture in pictures[-1:]:  # --reconstruct-every 0 draws none
                print(f"{own[0].method}'s reconstructions: {picture}")
        print(f"The command took {duration(time.perf_counter() - start)}.")
        texts = [*said, *verdicts, *notes]
        write_files([table], texts, runs, command, [self.arguments.out])
        return runs

    def runs(self) -> Iterator[Run]:
        """Yields each run as soon as it is evaluated.

        Yields none of them in processes that only help to train, and none if training
        is all that was asked for.

        Raises:
            ValueError: If an argument is wrong, or if `out` may not be written, or if
                there is nothing to evaluate. Unless it is found in the images
                themselves, nothing has been written then.
        """
        arguments = self.arguments
        if is_main_process():
            choices = self.check()
            if arguments.overwrite:
                for name in ("summary.csv", "table.md"):
                    (arguments.out / name).unlink(missing_ok=True)
        for seed in arguments.seed:
            for name, plan in self.plans.items():
                directory = RunDirectory(arguments.out / f"{name}-seed{seed}")
                _say(f"\n{name}, seed {seed}: {directory.path}", flush=True)
                if arguments.stage != "evaluate":
                    pretrain(
                        directory.path,
                        self.data,
                        plan.build,
                        seed=seed,
                        resume=arguments.resume,
                        overwrite=arguments.overwrite,
                        **{**plan.pretraining, **arguments.given},
                    )
                if arguments.stage == "train" or not is_main_process():
                    continue
                settings = {**choices[name], **self.evaluation, **plan.evaluation}
                self._evaluate(directory, seed, settings)
                yield Run.read(directory.path, name, seed)

    def check(self) -> dict[str, dict[str, Any]]:
        """Finds what is wrong before the first run, not hours later before the last.

        Returns:
            The layers and poolings that the evaluation of each method chooses from.

        Raises:
            ValueError: See `runs`.
        """
        arguments, out = self.arguments, self.arguments.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file: pass another folder as --out.")
        existing = arguments.resume or arguments.overwrite
        if (out / "summary.csv").exists() and not existing:
            raise ValueError(
                f"There is a study in {out} already: pass --resume to go on with it, "
                "--overwrite to replace it, or another folder as --out."
            )
        for name in ("seed", "method"):
            given = getattr(arguments, name, [])
            if len(set(given)) < len(given):
                raise ValueError(f"--{name} names each one once, got {given}.")
        choices: dict[str, dict[str, Any]] = {}
        for name, plan in self.plans.items():
            settings = dict(plan.pretraining)
            for option, value in arguments.given.items():
                # An evaluation asks nothing of the machine that trained.
                if arguments.stage != "evaluate" or option in settings:
                    settings[option] = value
            try:
                method = check_pretraining({"method": plan.build, **settings})
                check_batch(self.data, method, settings)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            method = method or plan.build()  # where it cannot be built without memory
            encoder, kind = method.encoder, type(method).__name__
            pools = POOLS.get(kind) if encoder.has_class_token else ("mean",)
            count = min(self.last_layers, encoder.num_layers)
            choices[name] = {"layers": list(range(-count, 0)), "pools": pools}
            for seed in arguments.seed:
                directory = RunDirectory(out / f"{name}-seed{seed}")
                if arguments.stage == "evaluate":
                    own = {name: settings[name] for name in plan.pretraining}
                    own |= {"data": self.data, "seed": seed, "init": arguments.init}
                    _check_trained(directory, own)
                elif not arguments.resume:
                    directory.check({}, resume=False, overwrite=arguments.overwrite)
        return choices

    def _evaluate(
        self, directory: RunDirectory, seed: int, settings: Mapping[str, Any]
    ) -> None:
        """Evaluates a run and its baselines, unless that was done before a resume."""
        arguments = self.arguments
        file = directory.path / RESULTS_FILE
        precision = arguments.precision or default_precision(arguments.accelerator)
        settings = {
            "protocols": list(PROTOCOLS),
            "baselines": ["random", "pixels"],
            "precision": "bf16" if precision.startswith("bf16") else "32",
            **settings,
        }
        if arguments.resume and file.exists():
            results = read_sealed(file, "Delete it: the run is then evaluated again.")
            wanted = json.loads(json.dumps(settings, default=vars))
            if all(results["arguments"].get(name) == wanted[name] for name in wanted):
                print(f"Evaluated before: {file}")
                return
            print(f"Evaluating again: {file} was made with other settings.")
        # `results.json` has settings under the names of their protocols.
        protocols = [settings.pop(name, name) for name in settings.pop("protocols")]
        evaluate(
            directory.path,
            self.data,
            protocols,
            out=directory.path,
            overwrite=True,
            seed=seed,
            num_workers=arguments.num_workers,
            device=evaluation_device(arguments),
            **settings,
        )


def is_main_process() -> bool:
    """Returns whether this process is the one that evaluates and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


def evaluation_device(arguments: argparse.Namespace) -> str | None:
    """Returns the first device that trained; None leaves the choice to `evaluate`."""
    if arguments.accelerator == "cpu":
        return "cpu"
    named = re.match(r"\[(\d+)|(\d+),", str(arguments.devices))
    if named and torch.cuda.is_available():
        return f"cuda:{named[1] or named[2]}"
    return None


def _check_trained(directory: RunDirectory, settings: Mapping[str, Any]) -> None:
    """Refuses to evaluate a run that has not ended or that has other settings."""
    if not directory.finished:
        raise ValueError(
            f"There is no finished run in {directory.path}: begin with --stage train, "
            "or go on with --stage train --resume."
        )
    stored = directory.stored_config() or {}
    differences = [
        f"{name}: {stored.get(name)!r} in the run, {value!r} now"
        for name, value in settings.items()
        # What was recorded of a recipe is not its name.
        if name != "recipe" and stored.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"The run in {directory.path} was trained with other arguments:\n  "
            + "\n  ".join(differences)
        )


class Table(NamedTuple):
    """A table, and what is to be said below it."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: Sequence[str] = ()


def write_files(
    tables: Sequence[Table],
    texts: Sequence[str],
    runs: Sequence[Run],
    command: str,
    folders: Sequence[Path],
    **about: Callable[[Run], Mapping[str, Any]],
) -> None:
    """Writes table.md, summary.csv and the page of a study, and says where they are.

    Args:
        tables:
            The tables.
        texts:
            What is to be said of all of them, one paragraph each.
        runs:
            The runs.
        command:
            The command that made them.
        folders:
            The folders that they are in. What is written is written into the first one.
        **about:
            Arguments of `write_summary`.
    """
    paragraphs = []
    for title, header, lines, notes in tables:
        cells = markdown_table(header, lines).rstrip("\n")
        paragraphs += [f"**{title}**", cells, *notes]
    paragraphs += [*texts, f"Made with `{printable(command)}`\n"]
    table, summary = folders[0] / "table.md", folders[0] / "summary.csv"
    with atomic_write(table) as temporary:
        temporary.write_text("\n\n".join(paragraphs))
    write_summary(runs, command, summary, **about)
    page = write_page_or_warn(*folders)
    shown = "" if page is None else f"; open {page} with a browser"
    print(f"The table: {table}; every number: {summary}{shown}.", flush=True)
