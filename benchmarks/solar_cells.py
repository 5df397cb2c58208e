"""Pretrains an encoder on photographs of solar cells and evaluates it.

`python benchmarks/solar_cells.py` needs neither a GPU nor a download: the images come
with the package elpv-dataset. See `lightly_mim.data.named.solar_cells` for the split.
"""

from __future__ import annotations

import argparse
import math
import shlex
from functools import partial
from typing import Any

from studies.options import METHODS, study_parser
from studies.script import resuming, script
from studies.study import Plan, Study

from lightly_mim.data.named import solar_cells
from lightly_mim.evaluation import Linear
from lightly_mim.reporting.study import PRETRAINED, Run

DATA = "solar-cells"

# The encoder, small enough for two cores: what `lightly_mim.defaults.method` chooses
# for photographs of 300 pixels without a GPU. All else that is not listed here is left
# to the defaults, too.
ENCODER = "vit_tiny_patch16_224"
ENCODER_OPTIONS: dict[str, Any] = {
    "embed_dim": 192,  # ViT-Ti's
    "depth": 6,  # ViT-Ti has 12
    "num_heads": 6,  # 32 values each
}
IN_CHANS = 1  # electroluminescence is grey
IMG_SIZE = 128  # of the 300 pixels of a photograph
PATCH_SIZE = 16  # 8 x 8 patches

EPOCHS = 24  # half the default, for a main job of minutes

# The evaluation, whose choices are made on training images.
LAST_LAYERS = 6  # all blocks to choose from: not the last is best
CROP_RATIO = 1.0  # the whole cell: defects lie at the margin, too
LINEAR = Linear()

# --quick shows that everything runs, in about a minute.
QUICK_EPOCHS = 1
QUICK_IMG_SIZE = 96
QUICK_ENCODER_OPTIONS: dict[str, Any] = {"embed_dim": 96, "depth": 4, "num_heads": 3}
QUICK_LINEAR = Linear(learning_rates=(0.01, 0.1), epochs=10)
QUICK_NOTE = (
    "These are the numbers of --quick, which trains too little to mean a thing."
)

CREDIT = (
    "The photographs are those of the elpv-dataset, from the Bavarian Center for "
    "Applied Energy Research (ZAE Bayern): Buerhop-Lutz et al., A Benchmark for Visual "
    "Identification of Defective Solar Cells in Electroluminescence Imagery, EU PVSEC "
    "2018; Deitsch et al., Solar Energy 185, 2019; Deitsch et al., Machine Vision and "
    "Applications 32, 2021. Licence CC-BY-NC-SA-4.0, also for pictures made from them: "
    "credit, no commercial use, the same licence for what is derived."
)
MODULES = (
    "The labels come without the module that a cell was cut from, so cells of one "
    "module may lie on both sides of the split."
)

EPILOG = """\
examples:
  python benchmarks/solar_cells.py --quick              does it run? about a minute
  python benchmarks/solar_cells.py                      one seed, in minutes
  python benchmarks/solar_cells.py --seeds 0 1 2        the table of the README
  python benchmarks/solar_cells.py --encoder swin_tiny_patch4_window7_224 \\
      --img-size 224 --method-option mask_patch_size=32
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    parser = study_parser(
        "solar_cells.py",
        "Pretrain an encoder on photographs of solar cells and compare it with the "
        "same\nencoder at random initialisation and with raw pixels, by kNN and a "
        "linear probe.\nNo download: the images come with the package elpv-dataset.",
        EPILOG,
        {
            "out": "runs/solar-cells",
            "encoder": f"{ENCODER} with {_words(ENCODER_OPTIONS)}",
            "img_size": IMG_SIZE,
            "epochs": EPOCHS,
            "batch_size": "by the number of images, 32",
            "lr": "by the width of the encoder, 1e-3",
        },
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the shortest setting, about a minute: shows that everything runs, its "
        "numbers mean nothing",
    )
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Trains, evaluates, and says what to do next."""
    num_train, num_test = len(solar_cells("train")), len(solar_cells("val"))
    study = Study(
        arguments,
        DATA,
        {name: plan(name, arguments) for name in arguments.method},
        last_layers=LAST_LAYERS,
        evaluation={
            "crop_ratio": CROP_RATIO,
            "linear": QUICK_LINEAR if arguments.quick else LINEAR,
        },
    )
    runs = study.report(
        f"Solar cells: {num_train} training and {num_test} test images",
        [*([QUICK_NOTE] if arguments.quick else []), MODULES, CREDIT],
        command,
    )
    if runs:
        _say_interval(runs[0])
        _say_next(arguments, command)


def images(arguments: argparse.Namespace) -> str:
    """Returns the name of the images."""
    return DATA


def plan(name: str, arguments: argparse.Namespace) -> Plan:
    """Returns how to build and train a method, with what the options leave open.

    Args:
        name:
            Name of the method, one of `METHODS`.
        arguments:
            What `parser` has read.
    """
    quick = arguments.quick
    img_size = QUICK_IMG_SIZE if quick else IMG_SIZE
    options: dict[str, Any] = {
        "encoder": arguments.encoder or ENCODER,
        "img_size": arguments.img_size or img_size,
        "in_chans": IN_CHANS,
    }
    if options["encoder"] == ENCODER:
        options |= {"patch_size": PATCH_SIZE} | ENCODER_OPTIONS
        options |= QUICK_ENCODER_OPTIONS if quick else {}
    options |= dict(arguments.encoder_option) | dict(arguments.method_option)
    said = {"batch_size": arguments.batch_size, "lr": arguments.lr}
    return Plan(
        partial(METHODS[name], **options),
        {
            "epochs": arguments.epochs or (QUICK_EPOCHS if quick else EPOCHS),
            **{word: value for word, value in said.items() if value is not None},
            # The images that are not for training are the test images.
            "validate": False,
        },
    )


def _say_interval(run: Run) -> None:
    """Says how much of an accuracy is the draw of the test images."""
    row = run.scores(PRETRAINED)["linear"]
    deviation = math.sqrt(row["top1"] * (1 - row["top1"]) / row["num_test"])
    half = (row["top1_high"] - row["top1_low"]) / 2
    print(
        f"\nWith {row['num_test']} test images, a single accuracy is uncertain by "
        f"{100 * deviation:.1f} points (one standard deviation) or ±{100 * half:.1f} "
        "points (95 %)."
    )


def _say_next(arguments: argparse.Namespace, command: str) -> None:
    seed = arguments.seed[0]
    if arguments.quick:
        # In the place of this study, unless that has a folder of its own.
        then = "python benchmarks/solar_cells.py --overwrite"
        what = "the real thing, in minutes"
    elif len(arguments.seed) == 1:
        what = "two more seeds, for mean and spread"
        seeds = [str(seed), str(seed + 1), str(seed + 2)]
        then = resuming(command, "--seeds", *seeds)
    else:
        what = "the encoder in your own code or on your own images"
        run = arguments.out / f"{arguments.method[0]}-seed{seed}"
        words = ["--encoder", str(run), "--data", DATA, "--layers", "0", "2", "4", "6"]
        then = shlex.join(["lightly-mim", "evaluate", *words])
    print(f"Next, {what}:\n  {then}")


def _words(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    main()
