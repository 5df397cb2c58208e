"""What the study says: row.json beside each run, and a table per axis.

row.json holds all that the tables say of a run but its results, so that they can be
made anew from the run directories alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from measuring.cpu import forward_flops
from solar_cells import CREDIT, MODULES
from solar_cells import DATA as SOLAR_CELLS
from studies.study import Plan, Table, write_files
from torch import Generator, Tensor

from lightly_mim.masking import average_distance
from lightly_mim.methods import MaskedImageModel
from lightly_mim.reporting.study import (
    PIXELS,
    PRETRAINED,
    RANDOM,
    RESULTS_FILE,
    Run,
    accuracy_cell,
    print_table,
)
from lightly_mim.targets import Target
from simmim_paper.rows import AXES, DEFAULT, MAE_DEFAULT, RATIO, Space

ROW_FILE = "row.json"

# The axes whose tables have AvgDist, and the number of masks that it is the mean of.
MASK_AXES = ("masking", "ratio", "unit")
NUM_MASKS = 256

_COLUMNS = {
    "knn": "kNN top-1 %",
    "linear": "linear top-1 %",
    "finetune": "fine-tune top-1 %",
}


# What is said of a row.


class _Zeros:
    """Stands for a target where its values do not matter."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.weight = target.weight
        self.num_classes = target.num_classes

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        width = self._target.width(cell_size, images.shape[1])
        return torch.zeros(*index.shape, width, dtype=torch.long)


def measure(method: MaskedImageModel) -> dict[str, float]:
    """Measures what a method masks, and how large it is.

    Args:
        method:
            The method. It cannot be used any more.

    Returns:
        `masked`, the share of masked pixels; `avg_dist` in pixels, the mean over
        `NUM_MASKS` masks; `parameters`; and `flops`, two for a product and its sum, of
        encoder and head for one image forward.
    """
    encoder = method.encoder
    images = torch.zeros(1, encoder.in_chans, *encoder.img_size)
    mask = method.draw_mask(
        images.expand(NUM_MASKS, -1, -1, -1), Generator().manual_seed(0)
    )
    parameters = sum(parameter.numel() for parameter in method.parameters())
    # One that learns from images has not seen any.
    zeros = _Zeros(method.target)
    del method.target
    method.target = zeros  # type: ignore[assignment]
    with torch.no_grad():
        flops = forward_flops(method.eval(), lambda: method(images, mask[:1]))
    return {
        "masked": mask.count / math.prod(mask.grid),
        "avg_dist": average_distance(mask, encoder.img_size).mean().item(),
        "parameters": parameters,
        "flops": flops,
    }


def describe(name: str, of: Space, plan: Plan, data: str) -> dict[str, Any]:
    """Returns what row.json holds: all that the tables say of a row but its results.

    Args:
        name:
            Name of the row.
        of:
            The space.
        plan:
            How the row is trained.
        data:
            Name or folder of the images.
    """
    axes = {
        axis: {"place": place, "shown": row.shown, "paper": row.paper}
        for axis in AXES
        for place, row in enumerate(of.axis(axis))
        if row.name == name
    }
    training = {key: plan.pretraining[key] for key in ("epochs", "batch_size")}
    target = of.rows()[DEFAULT].arguments["target"]
    return {
        "row": name,
        "method": of.rows()[name].method.__name__,
        "axes": axes,
        "notes": {axis: of.notes(axis) for axis in axes},
        # The same in all rows of a study.
        "study": {
            "data": data,
            "encoder": dict(of.arguments),
            **training,
            "note": of.form.note,
            "default": f"SimMIM, {of.unit} px units at random, ratio {RATIO}, linear "
            f"head, L1, {target}",
        },
        **measure(plan.build()),
    }


# The tables.


class Found(NamedTuple):
    """A finished run, and what its row.json says."""

    run: Run
    about: dict[str, Any]


def read(folders: Sequence[Path]) -> list[Found]:
    """Reads the finished runs of studies.

    Args:
        folders:
            The `--out` of studies, or studies of slurm/submit.py.

    Raises:
        ValueError: If there are none, if they are of different studies, or if a row was
            trained twice with one seed.
    """
    patterns = (f"*-seed*/{ROW_FILE}", f"tasks/*/run/*-seed*/{ROW_FILE}")
    files = [file for f in folders for p in patterns for file in sorted(f.glob(p))]
    found: list[Found] = []
    for file in files:
        about = json.loads(file.read_text())
        folder = file.parent
        if not (folder / RESULTS_FILE).exists():  # it is made anew
            continue
        run = Run.read(folder, about["row"], int(folder.name.rpartition("-seed")[2]))
        for other in found[:1]:
            if other.about["study"] != about["study"]:
                raise ValueError(
                    f"{other.run.path} and {folder} are of different studies:\n  "
                    f"{other.about['study']}\n  {about['study']}\nGive the folders of "
                    "one study."
                )
        for other in found:
            if (other.run.method, other.run.seed) == (run.method, run.seed):
                raise ValueError(
                    f"{other.run.path} and {folder} are the same row with the "
                    "same seed: give one of them."
                )
        found.append(Found(run, about))
    if not found:
        where = ", ".join(map(str, folders))
        raise ValueError(f"There is no evaluated row of a study in {where}.")
    return found


def report(folders: Sequence[Path], command: str) -> None:
    """Prints the tables of finished runs, and writes table.md and summary.csv.

    Args:
        folders:
            See `read`. What is written is written into the first one.
        command:
            The command that reads the runs; if all were made by one, that is named.
    """
    found = read(folders)
    commands = {each.about["command"] for each in found}
    command = commands.pop() if len(commands) == 1 else command
    made, texts = tables(found), captions(found)
    for title, header, lines, notes in made:
        print_table(title, header, lines)
        print("".join(f"{note}\n" for note in notes), end="")
    print("\n" + "\n".join(texts))
    abouts = {each.run.path: _about(each.about) for each in found}
    runs = [each.run for each in found]
    write_files(made, texts, runs, command, folders, about=lambda r: abouts[r.path])


def _about(about: dict[str, Any]) -> dict[str, Any]:
    named = ("row", "method", "masked", "avg_dist", "parameters", "flops")
    return {"axis": " ".join(about["axes"]), **{name: about[name] for name in named}}


def tables(found: Sequence[Found]) -> list[Table]:
    """Returns a table for each axis that has rows of its own.

    Args:
        found:
            The finished runs.
    """
    rows: dict[str, list[Found]] = {}
    for each in found:
        rows.setdefault(each.run.method, []).append(each)
    seeds = sorted({each.run.seed for each in found})
    made, left = [], dict(rows)
    for axis in AXES:
        own = {
            name: runs for name, runs in rows.items() if axis in runs[0].about["axes"]
        }
        if len(own) > 1 and own.keys() - {DEFAULT, MAE_DEFAULT}:
            made.append(_table(axis, own, rows.get(DEFAULT, []), seeds))
            left = {name: runs for name, runs in left.items() if name not in own}
    if left:  # there is nothing on their axes to compare them with
        made.append(_table("", left, rows.get(DEFAULT, []), seeds))
    return made


def _table(
    axis: str,
    rows: dict[str, list[Found]],
    default: Sequence[Found],
    seeds: Sequence[int],
) -> Table:
    place = {name: runs[0].about["axes"].get(axis, {}) for name, runs in rows.items()}
    ordered = sorted(rows, key=lambda name: place[name].get("place", 0))
    scored = {p for runs in rows.values() for p in runs[0].run.scores(PRETRAINED)}
    protocols = [protocol for protocol in _COLUMNS if protocol in scored]
    distance = axis in MASK_AXES
    with_paper = any(entry.get("paper") for entry in place.values())
    header = [
        "",
        "masked %",
        *(["AvgDist px"] if distance else []),
        *("M params", "GFLOPs", "images/s"),
        *(_COLUMNS[protocol] for protocol in protocols),
        *(["paper's"] if with_paper else []),
    ]
    lines = []
    for name in ordered:
        runs, about = rows[name], rows[name][0].about
        label = place[name].get("shown", name)
        if axis and name in (DEFAULT, MAE_DEFAULT):
            label += " (default)"
        own = sorted(each.run.seed for each in runs)
        if own != list(seeds):
            label += f", seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
        speed = fmean(each.run.images_per_second for each in runs)
        scores = [each.run.scores(PRETRAINED) for each in runs]
        lines.append(
            [
                label,
                f"{100 * about['masked']:.0f}",
                *([f"{about['avg_dist']:.1f}"] if distance else []),
                f"{about['parameters'] / 1e6:.3g}",
                f"{about['flops'] / 1e9:.3g}",
                f"{speed:.0f}",
                *_score_cells(scores, protocols),
                *([place[name].get("paper", "")] if with_paper else []),
            ]
        )
    empty = [""] * (header.index("images/s"))
    for baseline in (RANDOM, PIXELS) if default else ():
        scores = [each.run.scores(baseline) for each in default]
        cells = _score_cells(scores, protocols)
        lines.append([baseline, *empty, *cells, *([""] if with_paper else [])])
    title = AXES[axis].title if axis else "Rows"
    notes = next(iter(rows.values()))[0].about["notes"].get(axis, [])
    return Table(title, header, lines, notes)


def _score_cells(
    scores: Sequence[dict[str, Any]], protocols: Sequence[str]
) -> list[str]:
    """Returns a cell per protocol; empty where it was not run."""
    return [
        accuracy_cell([by_protocol[protocol] for by_protocol in scores])
        if all(protocol in by_protocol for by_protocol in scores)
        else ""
        for protocol in protocols
    ]


def captions(found: Sequence[Found]) -> list[str]:
    """Returns how to read the tables, one paragraph each.

    Args:
        found:
            The finished runs.
    """
    study, row = found[0].about["study"], found[0].run.results["rows"][0]
    seeds = sorted({each.run.seed for each in found})
    images = f"{row['num_train']} training and {row['num_test']} test images"
    if len(seeds) == 1:
        accuracy = (
            f"Accuracy with its 95 % interval over the draw of the test images "
            f"(bootstrap). One seed, {seeds[0]}: another one gives other numbers, so "
            "take differences within an interval for nothing."
        )
    else:
        accuracy = (
            f"Accuracy: mean ± standard deviation over the seeds "
            f"{', '.join(map(str, seeds))}; with its 95 % interval over the draw of "
            "the test images (bootstrap) where a row has one seed."
        )
    said = [
        f"{study['data']}: {images}; {study['epochs']} epochs of "
        f"{study['encoder']['encoder']} at {study['encoder']['img_size']} pixels. "
        f"Default: {study['default']}. A row differs from the default of its method in "
        "what its table is about, and in nothing else.",
        accuracy,
        "Features are means of patch tokens; layer and hyper-parameters were chosen on "
        "training images. Random initialisation is that of SimMIM's encoder; MAE draws "
        "its weights in another way.",
        f"AvgDist is the mean distance of a masked pixel to the nearest visible one, "
        f"over {NUM_MASKS} masks. Parameters and GFLOPs (two operations for a product "
        "and its sum, one image forward) are those of encoder and head, images/s those "
        "of pretraining, beside whatever else the machine did.",
    ]
    if any(entry["paper"] for each in found for entry in each.about["axes"].values()):
        said.append(
            "The papers' numbers are theirs, of ImageNet-1K: top-1 % after fine-tuning "
            "in SimMIM's rows (Swin-B, 192 pixels, 100 epochs), and after fine-tuning "
            "/ of a linear probe in MAE's (ViT-L, 224 pixels, 800 epochs; decoder of 8 "
            "blocks and raw pixels as the target where the row does not say "
            "otherwise). They are for comparing trends, not values."
        )
    if study["note"]:
        said.append(study["note"])
    if study["data"] == SOLAR_CELLS:
        said += [MODULES, CREDIT]
    return said
