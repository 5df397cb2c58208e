"""The options that scripts share, and those that lightly-mim reads for them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightly_mim.methods
from lightly_mim import cli
from lightly_mim.config import Recorded
from lightly_mim.heads import Head
from lightly_mim.losses import Loss
from lightly_mim.masking import Masking
from lightly_mim.methods import MaskedImageModel
from lightly_mim.pretraining import pretrain
from lightly_mim.spelling import public_classes
from lightly_mim.targets import Target

METHODS: dict[str, type[MaskedImageModel]] = {
    name: method
    for name in lightly_mim.methods.__all__
    if inspect.isclass(method := getattr(lightly_mim.methods, name))
    and issubclass(method, MaskedImageModel)
    and method is not MaskedImageModel
}

# What --method-option takes as a masking, a target, a head or a loss.
_KINDS: tuple[type[Recorded], ...] = (Masking, Target, Head, Loss)
PARTS = {part.__name__: part for kind in _KINDS for part in public_classes(kind)}


def whole_number(smallest: int) -> Callable[[str], int]:
    """Returns what argparse reads a whole number by.

    Args:
        smallest:
            The smallest one that is allowed.
    """

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {smallest}, got {text!r}"
            )
        return int(text)

    return integer


def key_value(text: str) -> tuple[str, Any]:
    """Reads an option of an encoder or a method, for argparse.

    Args:
        text:
            KEY=VALUE: a literal, a part of a method, or text.
    """
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    # true and True, 6, 1e-3, [6,6], RandomMasking(16, 0.5); anything else is a string.
    for read in (json.loads, _literal_or_part):
        with contextlib.suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


def _literal_or_part(text: str | ast.expr) -> Any:
    """Reads literals, and parts of a method: `RandomMasking(16, ratio=0.5)`.

    Raises:
        ArgumentTypeError: If there is no such part or it refuses its arguments.
        ValueError: If it is something else.
        SyntaxError: If it is no Python.
    """
    tree = ast.parse(text, mode="eval").body if isinstance(text, str) else text
    if isinstance(tree, ast.List):
        return [_literal_or_part(element) for element in tree.elts]
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        return ast.literal_eval(tree)
    if tree.func.id not in PARTS:
        raise argparse.ArgumentTypeError(
            f"there is no part {tree.func.id!r}; there are: {', '.join(PARTS)}"
        )
    arguments = [_literal_or_part(argument) for argument in tree.args]
    options = {str(word.arg): _literal_or_part(word.value) for word in tree.keywords}
    try:
        return PARTS[tree.func.id](*arguments, **options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# An option of an encoder or a method, which may be given more than once.
KEY_VALUES: dict[str, Any] = {
    "nargs": "+",
    "action": "extend",
    "type": key_value,
    "default": [],
    "metavar": "KEY=VALUE",
}
ENCODER_OPTION = "further options of the timm model, such as depth=2 embed_dim=32"


# Arguments of `pretrain` that are a script's or a study's own. All others are options.
_OWN = {
    *("out", "data", "method", "val", "validate", "recipe", "minutes", "seed"),
    *("loggers", "callbacks", "resume", "overwrite"),
}
_TRAINING = {
    name: parameter.default
    for name, parameter in inspect.signature(pretrain).parameters.items()
    if name not in _OWN
}


class StudyParser(argparse.ArgumentParser):
    """Reads a script's own options, and has lightly-mim read those of `pretrain`.

    The arguments get the latter by the names of `pretrain`, at its defaults where they
    are not given, and as `given` those that are.
    """

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Reads the words after the script's name, None for the process's."""
        arguments = super().parse_args(args, namespace)
        said = {name: vars(arguments)[name] for name in _TRAINING if name in arguments}
        words = [word for name in said for word in (f"--{name}", *said[name])]
        try:
            given = cli.read(["pretrain", "--out", str(arguments.out), *words])
        except ValueError as error:
            self.error(str(error))
        arguments.given = {name: given[name] for name in said}
        vars(arguments).update(_TRAINING | arguments.given)
        return arguments


def study_parser(
    prog: str,
    description: str,
    epilog: str,
    defaults: Mapping[str, Any],
    methods: bool = True,
) -> StudyParser:
    """Makes a parser with the options that all studies share.

    Args:
        prog:
            Name of the script.
        description:
            What it does.
        epilog:
            Examples.
        defaults:
            The script's default of `out`, and what its help says of those of `encoder`,
            `img_size` and arguments of `pretrain`, which may depend on other options.
        methods:
            Whether the script trains the methods that `--method` names, with the
            options of `--method-option`. One that has plans of its own has neither.
    """
    parser = StudyParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    study = parser.add_argument_group("the study")
    study.add_argument(
        "--out",
        type=Path,
        default=Path(defaults["out"]),
        metavar="DIR",
        help="folder for everything that is written (default: %(default)s)",
    )
    if methods:
        study.add_argument(
            "--method",
            nargs="+",
            choices=METHODS,
            default=["SimMIM"],
            metavar="NAME",
            help=f"one or more of {', '.join(METHODS)} (default: SimMIM)",
        )
    study.add_argument(
        "--seed",
        "--seeds",
        nargs="+",
        type=whole_number(0),
        default=[0],
        metavar="N",
        help="one or more seeds; with several, the table shows mean and standard "
        "deviation, and paired differences with their interval (default: 0)",
    )
    study.add_argument(
        "--stage",
        choices=["all", "train", "evaluate"],
        default="all",
        help="train: pretrain and end there, so that several GPUs do not wait for one; "
        "evaluate: evaluate what --stage train made in DIR, by one process whatever "
        "--devices says (default: all, one after the other)",
    )
    existing = study.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the study in DIR where it was cut; what is finished is read",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the runs of this study in DIR"
    )

    training = parser.add_argument_group("encoder and training")
    training.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"timm name of a ViT, BEiT, Swin or SwinV2 (default: "
        f"{defaults['encoder']}); the default's own options go with it alone",
    )
    training.add_argument("--encoder-option", **KEY_VALUES, help=ENCODER_OPTION)
    if methods:
        training.add_argument(
            "--method-option",
            **KEY_VALUES,
            help="further options of the method, such as mask_ratio=0.5 or "
            "'masking=BlockMasking(16, 0.5)'",
        )
    training.add_argument(
        "--img-size",
        type=whole_number(1),
        metavar="PIXELS",
        help=f"side of the images that the encoder sees (default: "
        f"{defaults['img_size']})",
    )

    others = parser.add_argument_group(
        "training and machine, as lightly-mim pretrain --help explains them"
    )
    for name in _TRAINING:
        option = f"--{name.replace('_', '-')}"
        said = f"(default: {defaults[name]})" if name in defaults else None
        others.add_argument(
            option, nargs="*", default=argparse.SUPPRESS, metavar="VALUE", help=said
        )
    return parser
