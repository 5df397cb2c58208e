"""Pretrains an encoder on Imagenette, ten classes of ImageNet, and evaluates it.

Encoder, masking and optimiser are those of the method's published recipe; the batch is
one that fits on one GPU, with the learning rate in proportion.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from studies.options import METHODS, study_parser
from studies.script import script
from studies.study import Plan, Study

from lightly_mim.data.named import imagenette
from lightly_mim.methods.base import published_parts

# The recipe that sets encoder, image size, masking, optimiser and augmentation. A
# method that is not listed takes its first one.
RECIPES = {"SimMIM": "vit_base_800ep"}
EPOCHS = 800  # as SimMIM's ViT-B, and as far as lightly's table of Imagenette goes
BATCH_SIZE = 256  # the recipes have 2048 or more; the rate is scaled down with it
SIZE = "320px"  # large enough for crops of 224 pixels, a fifth of the full download

# The evaluation, whose choices are made on training images.
LAST_LAYERS = 6  # half of a ViT-B; SimMIM's authors probe its eighth block of twelve

EPILOG = """\
examples:
  # fetch the images (330 MB) into datasets/ and train for 100 epochs
  python benchmarks/imagenette.py --download --epochs 100

  # images that are here already: the folder that holds imagenette2-320/, or any
  # folder with train/ and val/ and one folder per class in each
  python benchmarks/imagenette.py --data-dir /data

  # the paper's Swin-B at 192 pixels, three seeds, four GPUs
  python benchmarks/imagenette.py --recipe swin_base_100ep --epochs 100 \\
      --seeds 0 1 2 --devices 4

  # a small encoder, to try things out
  python benchmarks/imagenette.py --encoder vit_small_patch16_224 --img-size 128 \\
      --epochs 20

For comparison: lightly's own table of Imagenette has SimMIM at 31.5 % (200 epochs) and
34.3 % (800 epochs) kNN. It uses a ViT-B/32, other augmentations, the class token and
test images of 128 pixels, so the difference is not that of one thing.

Without a GPU and without a download: python benchmarks/solar_cells.py
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    parser = study_parser(
        "imagenette.py",
        "Pretrain an encoder on Imagenette and compare it with the same encoder at "
        "random\ninitialisation and with raw pixels, by kNN and a linear probe. "
        "Everything that is\nnot given is that of the method's published recipe.",
        EPILOG,
        {
            "out": "runs/imagenette",
            "encoder": "the recipe's",
            "img_size": "the recipe's",
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "lr": "the recipe's",
        },
    )
    images = parser.add_argument_group("the images")
    images.add_argument(
        "--data-dir",
        type=Path,
        default=Path("datasets"),
        metavar="DIR",
        help="folder that holds imagenette2-320/ (imagenette2-160/ or imagenette2/ for "
        "other sizes), or any folder with train/ and val/ and class folders in them "
        "(default: %(default)s)",
    )
    images.add_argument(
        "--size",
        choices=["160px", "320px", "full"],
        default=SIZE,
        help="shorter side of Imagenette's photographs (default: %(default)s); without "
        "meaning for other folders",
    )
    images.add_argument(
        "--download",
        action="store_true",
        help="fetch Imagenette into DIR if it is not there (95 MB, 330 MB or 1.5 GB)",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="published recipe of the method ("
        + "; ".join(f"{name}: {', '.join(m.recipes)}" for name, m in METHODS.items())
        + "; default: "
        + ", ".join(f"{recipe} for {name}" for name, recipe in RECIPES.items())
        + ", the first one of others)",
    )
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Trains and evaluates."""
    plans = {name: plan(name, arguments) for name in arguments.method}
    data, num_train, num_test = _find_images(arguments)
    study = Study(arguments, str(data), plans, LAST_LAYERS, evaluation={})
    name = data.resolve().name
    study.report(
        f"{name}: {num_train} training and {num_test} test images", [], command
    )


def _find_images(arguments: argparse.Namespace) -> tuple[Path, int, int]:
    """Returns the folder with train/ and val/, and how many images are in them."""
    try:
        train, val = (
            imagenette(
                split,
                size=arguments.size,
                data_dir=arguments.data_dir,
                download=arguments.download,
            )
            for split in ("train", "val")
        )
    except ValueError as error:
        raise ValueError(
            f"{error} Or start with: python benchmarks/solar_cells.py"
        ) from error
    return train.root.parent, len(train), len(val)


def images(arguments: argparse.Namespace) -> str | None:
    """Returns the folder of the images, None if they are not there."""
    there = argparse.Namespace(**{**vars(arguments), "download": False})
    try:
        return str(_find_images(there)[0])
    except ValueError:
        return None


def plan(name: str, arguments: argparse.Namespace) -> Plan:
    """Returns how to build and train a method: the recipe, and what was given.

    Args:
        name:
            Name of the method, one of `METHODS`.
        arguments:
            What `parser` has read.

    Raises:
        ValueError: If the method has no such recipe.
    """
    method = METHODS[name]
    recipe_name = arguments.recipe or RECIPES.get(name, next(iter(method.recipes)))
    recipe = method.recipe(recipe_name)
    options: dict[str, Any] = dict(arguments.encoder_option)
    options |= dict(arguments.method_option)
    if arguments.img_size is not None:
        options["img_size"] = arguments.img_size
    if arguments.encoder in (None, recipe.encoder):
        build = partial(method.from_recipe, recipe_name, **options)
    else:  # another encoder takes the recipe without the options of its encoder
        parts = published_parts(recipe, options)
        options = {"img_size": recipe.img_size, **parts, **options}
        build = partial(method, arguments.encoder, **options)
    return Plan(
        build,
        {
            "recipe": recipe_name,
            "epochs": arguments.epochs or EPOCHS,
            "batch_size": arguments.batch_size or BATCH_SIZE,
            "lr": arguments.lr,
        },
    )


if __name__ == "__main__":
    main()
