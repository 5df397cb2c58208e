"""Measures the defaults of `lightly_mim.defaults` against lightly's blocks and chance.

`python benchmarks/defaults.py` pretrains SimMIM and MAE with nothing but our defaults,
and the same encoder with lightly's blocks, on data sets that come in packages, at equal
images seen, and prints kNN and linear probes before and after. `--choice target` puts
the alternatives of one choice side by side instead, scored on held-out training images.
`--pictures 50 300 1968 --images 4000 16000 64000` pretrains on so many of the training
images for so long, and `--plot FILE` draws what came of it. Each row is a file: what is
there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from studies.script import script  # isort: skip  # before PyTorch
import torch
from matplotlib.figure import Figure
from peers.lightly_methods import train_lightly
from studies.small_sets import SETS, Images, Set

from lightly_mim import MAE, MaskedImageModel, SimMIM, evaluate, pretrain
from lightly_mim.data import keyed_random_state
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.evaluation import Linear
from lightly_mim.files import atomic_write
from lightly_mim.reporting.study import markdown_table
from lightly_mim.targets import PatchNormalizedPixels, Pixels

IMAGES = 16_000  # seen by every run
ENCODER: dict[str, Any] = {"embed_dim": 128, "depth": 4, "num_heads": 4}
PROTOCOLS = ("knn", "linear")
# A short grid: the differences that count here are those between encoders.
LINEAR = Linear(learning_rates=(1e-3, 1e-2, 1e-1), epochs=30)


# Ours: nothing is said but the encoder.


def ours(of: Set, name: str, options: dict[str, Any]) -> partial[MaskedImageModel]:
    """Returns what builds a method of ours."""
    method: type[MaskedImageModel] = {"SimMIM": SimMIM, "MAE": MAE}[name]
    encoder = {"encoder": "vit_tiny_patch16_224", **of.options, **ENCODER}
    return partial(method, **(encoder | options))


def train_ours(
    build: partial[MaskedImageModel],
    train: Images,
    epochs: int,
    seed: int,
    pretraining: dict[str, Any],
) -> tuple[MaskedEncoder, MaskedEncoder]:
    """Returns the encoder before and after `pretrain`."""
    with keyed_random_state(seed, "weights"):  # as pretrain draws them
        start = build().encoder
    with tempfile.TemporaryDirectory() as out:
        trained = pretrain(
            out=out,
            data=train,
            method=build,
            epochs=epochs,
            seed=seed,
            rank_every=0,
            reconstruct_every=0,
            tensorboard=False,
            report=False,
            progress=False,
            overwrite=True,
            **pretraining,
        ).encoder
    start.mean, start.std = trained.mean, trained.std
    return start, trained


# Rows.


def score(
    encoder: MaskedEncoder, train: Images, test: Images | None, seed: int
) -> dict[str, float]:
    """Returns kNN and linear accuracy in percent, of the mean of the patch tokens.

    Args:
        encoder:
            The encoder.
        train:
            The training images.
        test:
            The test images. None scores a fifth of the training images.
        seed:
            Seed of the probes.
    """
    results = evaluate(
        encoder,
        data=train,
        val=test,
        holdout=0.2 if test is None else None,
        protocols=["knn", LINEAR],
        layers=range(ENCODER["depth"]),
        pools=("mean",),
        seed=seed,
        progress=False,
    )
    return {row.protocol: round(100 * row.top1, 2) for row in results.rows}


# Alternatives of each choice: (of which method, its options, those of pretrain).
Change = tuple[str, Callable[[Set], dict[str, Any]], dict[str, Any]]


def _say(method: str, **options: Any) -> Change:
    return method, lambda of: options, {}


def _train(method: str, **pretraining: Any) -> Change:
    return method, lambda of: {}, pretraining


CHOICES: dict[str, dict[str, Change]] = {
    "init": {"timm": _say("SimMIM", init="timm")},
    "target": {
        "pixels": _say("SimMIM", target=Pixels()),
        "patch": _say("SimMIM", target=PatchNormalizedPixels()),
    },
    "unit": {
        "2 x 2 patches": (
            "SimMIM",
            lambda of: {"mask_patch_size": 2 * of.patch_size},
            {},
        )
    },
    "decoder": {
        "half as large": _say("MAE", decoder_dim=32, decoder_depth=1),
        "the paper's": _say("MAE", decoder_dim=512, decoder_depth=8),
    },
    "rate": {
        f"{method} {rate}": _train(method, lr=rate)
        for method in ("SimMIM", "MAE")
        for rate in (5e-4, 2e-3)
    },
    "batch": {
        f"{method} {size}": _train(method, batch_size=size)
        for method in ("SimMIM", "MAE")
        for size in (16, 64, 128)
    },
    "crops": {
        "SimMIM from 0.2": _train("SimMIM", min_scale=0.2),
        "MAE from 0.67": _train("MAE", min_scale=0.67),
    },
    "decay": {"SimMIM 0.2": _train("SimMIM", weight_decay=0.2)},
    "statistics": {"ImageNet's": ("SimMIM", lambda of: {}, {"normalize": None})},
}
PEERS = ("SimMIM", "MAE", "lightly's SimMIM", "lightly's MAE")


def measure(
    name: str,
    model: str,
    seed: int,
    images: int,
    change: Change | None,
    pictures: int | None = None,
) -> dict[str, Any]:
    """Trains and scores one row.

    Args:
        name:
            The data set, one of `SETS`.
        model:
            One of `PEERS`.
        seed:
            Seed of everything.
        images:
            How many images the run sees, about: whole epochs are trained.
        change:
            What is done otherwise than by default. The row is then scored on held-out
            training images.
        pictures:
            How many of the training images to pretrain on. The probes take all.

    Returns:
        The scores before and after, and how long it took.
    """
    of = SETS[name]
    labelled, test = of.read()
    train = labelled.take(pictures)
    epochs = max(round(images / len(train)), 1)
    method = model.removeprefix("lightly's ")
    options, pretraining = (change[1](of), dict(change[2])) if change else ({}, {})
    if "normalize" in pretraining:
        mean, std = imagenet_statistics(of.in_chans)
        pretraining["normalize"] = {"mean": list(mean), "std": list(std)}
    start_time = time.process_time()
    if method == model:
        build = ours(of, method, options)
        start, trained = train_ours(build, train, epochs, seed, pretraining)
    else:
        like = ours(of, method, {})()
        encoder = {**of.options, **ENCODER}
        start, trained = train_lightly(method, encoder, train, epochs, seed, like)
    seconds = time.process_time() - start_time
    shown = None if change else test
    return {
        "set": name,
        "model": model,
        "seed": seed,
        "epochs": epochs,
        "pictures": len(train),
        "images": epochs * len(train),
        "cpu_seconds": round(seconds),
        "before": score(start, labelled, shown, seed),
        "after": score(trained, labelled, shown, seed),
    }


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    parser = argparse.ArgumentParser(
        prog="defaults.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS)[:-1])
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--pictures",
        nargs="+",
        type=int,
        default=[None],
        metavar="N",
        help="pretrain on so many of the training images; the probes take all of them",
    )
    parser.add_argument("--choice", choices=CHOICES, help="a choice of the defaults")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[IMAGES],
        metavar="N",
        help="seen by each run",
    )
    parser.add_argument("--plot", type=Path, help="draw learning curves into this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Measures what has no file yet, and prints the table."""
    torch.set_num_threads(arguments.threads)
    rows = []
    runs = itertools.product(
        arguments.seeds,
        arguments.sets,
        _rows(arguments.choice),
        arguments.pictures,
        arguments.images,
    )
    for seed, name, (label, model, change), pictures, images in runs:
        if model not in arguments.models:
            continue
        label += "" if pictures is None else f", {pictures} pictures"
        label += "" if images == IMAGES else f", {images} images"
        words = [arguments.choice or "peers", name, label, f"seed{seed}"]
        file = arguments.out / ("-".join(words).replace(" ", "_") + ".json")
        if not file.exists():
            row = measure(name, model, seed, images, change, pictures)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                Path(temporary).write_text(json.dumps({"label": label, **row}))
        rows.append(json.loads(file.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    table = markdown_table(*tabulate(rows))
    print(f"\n{table}")
    if arguments.plot is not None:
        learning_curves(rows).savefig(arguments.plot, dpi=120)


def _rows(choice: str | None) -> list[tuple[str, str, Change | None]]:
    if choice is None:
        return [(model, model, None) for model in PEERS]
    changes = CHOICES[choice]
    methods = dict.fromkeys(method for method, *_ in changes.values())
    compared = {f"{method} as it is": _say(method) for method in methods} | changes
    return [(label, change[0], change) for label, change in compared.items()]


def tabulate(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines: means and deviations over seeds, before and after.

    Args:
        rows:
            What `measure` returned, with a `label`.
    """
    header = ["set", "", *(f"{p}, {w}" for w in ("before", "after") for p in PROTOCOLS)]
    lines = []
    for name, label in dict.fromkeys((row["set"], row["label"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["label"]) == (name, label)]
        cells = [
            _mean_and_spread([row[when][protocol] for row in mine])
            for when in ("before", "after")
            for protocol in PROTOCOLS
        ]
        lines.append([name, label, *cells])
    return header, lines


def learning_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns a figure of accuracy against images seen, a line per number of pictures.

    Args:
        rows:
            What `measure` returned, of one data set. Means over seeds are drawn.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 6.4), layout="constrained")
    panels = figure.subplots(
        len(PROTOCOLS), len(models), sharex=True, sharey="row", squeeze=False
    )
    for (protocol, model), panel in zip(
        itertools.product(PROTOCOLS, models), panels.flat, strict=True
    ):
        mine = [row for row in rows if row["model"] == model]
        untrained = statistics.mean(row["before"][protocol] for row in mine)
        panel.axhline(untrained, color="grey", linestyle="--", label="random")
        for pictures in sorted({row["pictures"] for row in mine}):
            scores: dict[int, list[float]] = {}
            for row in mine:
                if row["pictures"] == pictures:
                    scores.setdefault(row["images"], []).append(row["after"][protocol])
            images = sorted(scores)
            means = [statistics.mean(scores[number]) for number in images]
            panel.plot(images, means, marker="o", label=f"{pictures:,} pictures")
        panel.set(title=f"{model}, {protocol}", xscale="log", ylabel="top-1 %")
        panel.minorticks_off()
        panel.set_xticks(images, labels=[f"{number:,}" for number in images])
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("images seen in pretraining")
    panels[0, 0].legend()
    return figure


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
