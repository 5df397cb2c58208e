"""The words that are easy to type, turned into those that jsonargparse reads.

`predict MODEL IMAGES`, `--layers 4 8`, `--batch-size=3`, `--resume`: jsonargparse has
none of them as we want them, nor our checks of a file behind `--config`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

import lightly_mim.methods
from lightly_mim.config_files import ConfigFile
from lightly_mim.files import is_file
from lightly_mim.methods.base import refuse_replaced
from lightly_mim.spelling import spell_method

# Commands whose first words stand for their first arguments: predict MODEL IMAGES.
_IN_ORDER = ("predict", "embed", "show", "report")


def spell_out(
    args: Sequence[str], commands: Mapping[str, Callable[..., Any]]
) -> list[str]:
    """Returns the words of a command as jsonargparse reads them.

    Args:
        args:
            The words after the program's name.
        commands:
            The functions behind the commands, by name.

    Raises:
        ValueError: If a file behind `--config`, a method or an option that does nothing
            is wrong.
    """
    words = _split(args)
    if words:
        words[0] = words[0].replace("_", "-")
    if words and words[0] == "--config":
        raise ValueError(
            "--config stands behind the command: lightly-mim pretrain --config FILE."
        )
    command = commands.get(words[0]) if words else None
    if command is None:
        return words
    words = _read_files(words, command)
    if words[0] in _IN_ORDER:
        words = _name_first(words, command)
    words = spell_method(_say_true(_join_lists(words, command), command))
    _check_unused(words, command)
    return words


def _name_first(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Turns `predict MODEL IMAGES` into `predict --model MODEL --images IMAGES`.

    A last argument that may be a list takes what is left: `report RUN RUN`.
    """
    first = list(itertools.takewhile(_is_value, words[1:]))
    parameters = inspect.signature(command).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty]
    lists = dict(_list_options(command, "--"))
    if len(first) > len(required) and f"--{required[-1]}" not in lists:
        given = " ".join(first[len(required) :])
        raise ValueError(f"{given!r} stands behind no option, such as --out.")
    named = zip(required, first, strict=False)
    pairs = [word for name, value in named for word in (f"--{name}", value)]
    left = first[len(required) :]
    return [words[0], *pairs, *left, *words[1 + len(first) :]]


def _split(words: Sequence[str]) -> list[str]:
    """Turns `--batch-size=3` into `--batch_size 3`: there is one form to read."""
    split: list[str] = []
    for word in words:
        if not word.startswith("--"):
            split.append(word)
            continue
        option, equals, value = word.partition("=")
        split.append(f"--{option[2:].replace('-', '_')}")
        if equals:
            split.append(value)
    return split


def _check_unused(words: Sequence[str], command: Callable[..., Any]) -> None:
    """Refuses settings of protocols that are not asked for, which do nothing.

    Raises:
        ValueError: If there are any.
    """
    parameters = inspect.signature(command).parameters
    if "protocols" not in parameters or "--config" in words:
        return
    given = {
        name: yaml.safe_load(words[words.index(f"--{name}") + 1])
        if f"--{name}" in words[:-1]
        else list(parameters[name].default)
        for name in ("protocols", "baselines")
        if name in parameters
    }
    hints = get_type_hints(command)
    needs = {
        name: ("protocols", name)
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    }
    needs |= {"pixel_size": ("baselines", "pixels")}
    for word in words[1:]:
        option, what = needs.get(word[2:].partition(".")[0], ("", ""))
        named = given.get(option)
        if word.startswith("--") and isinstance(named, list) and what not in named:
            names = " ".join(map(str, named)) or "none"
            raise ValueError(
                f"{word} does nothing: --{option} is {names}. Add {what} to it, or "
                f"leave {word} out."
            )


def _read_files(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Puts what a file behind `--config` says, once it is checked, in its place.

    It comes before the other options, which win wherever they stand.

    Raises:
        ValueError: If a file says what it may not say, see `ConfigFile`, or is of a
            version with other arguments; if another option names a file of settings.
    """
    trust = "--trust" in words
    if trust and "--config" not in words:
        raise ValueError("--trust does nothing without --config.")
    named = frozenset(words)
    words = [word for word in words if word != "--trust"]
    settings = {
        f"--{name}"
        for name, hint in get_type_hints(command).items()
        if dataclasses.is_dataclass(hint)
    }
    files: list[str] = []
    for place, (option, value) in enumerate(itertools.pairwise([*words])):
        if option == "--config" and not value.startswith("--"):
            file = ConfigFile(value, command, named, trust)
            _refuse_replaced(file.options)
            here = place - len(files)
            del words[here : here + 2]
            more = words[here : here + 1]
            if more and _is_value(more[0]) and not all(map(_is_value, words[:here])):
                raise ValueError(f"--config takes one file, got {more[0]!r} behind it.")
            files += [option, json.dumps(file.options)]
        elif option in settings and is_file(value):
            raise ValueError(f"{option} {value} is a file: pass one as --config alone.")
    first = [*itertools.takewhile(_is_value, words)]
    return [*first, *files, *words[len(first) :]]


def _refuse_replaced(options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a configuration is of a version with other arguments."""
    method = options.get("method")
    if isinstance(method, dict):
        package, _, last = method["class_path"].rpartition(".")
        known = getattr(lightly_mim.methods, last, None)
        if known is not None and package.partition(".")[0] in ("", "lightly_mim"):
            refuse_replaced(known, {**(method.get("init_args") or {})})


def _join_lists(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--layers 4 8 -1` into `--layers [4,8,-1]`, which jsonargparse reads.

    Several words are a list behind every option, `--method.depths 2 2` too, as none
    stands by itself. A single word becomes one only where nothing but a list is taken:
    `--layers 4`, but not `--devices 2`. Commas part numbers and the names of choices,
    too: `--protocols knn,linear`.
    """
    lists = dict(_list_options(command, "--"))
    joined: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        joined.append(word)
        position += 1
        if _is_value(word):  # the command
            continue
        values = list(itertools.takewhile(_is_value, words[position:]))
        position += len(values)
        items = lists.get(word, [])
        if items and all(i in (int, float, ...) or get_args(i) for i in items):
            values = _part(values)
        if len(values) > 1 or (values and items and not values[0].startswith("[")):
            values = [f"[{','.join(map(_quote, values))}]"]
        joined += values
    return joined


def _part(values: list[str]) -> list[str]:
    """Parts words at their commas, unless they are a list in YAML already."""
    if any(value.startswith("[") for value in values):
        return values
    items = [item.strip() for value in values for item in value.split(",")]
    return [item for item in items if item] or values


def _quote(word: str) -> str:
    """Returns a word as an element of a list in YAML."""
    plain = re.fullmatch(r"[\w.+/-]+|[\[{].*[\]}]", word)
    return word if plain else json.dumps(word)


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _say_true(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--resume` into `--resume true`, which jsonargparse reads."""
    hints = get_type_hints(command).items()
    flags = {f"--{name}" for name, hint in hints if bool in (hint, *get_args(hint))}
    said: list[str] = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        said.append(word)
        if word in flags and following.startswith("--"):
            said.append("true")
    return said


def _list_options(function: Any, prefix: str) -> Iterator[tuple[str, list[Any]]]:
    """Yields the options that take lists, and the types of their items.

    There are none for an option that takes something else as well.
    """
    for name, hint in get_type_hints(function).items():
        union = get_origin(hint) in (Union, UnionType)
        parts = [p for p in (get_args(hint) if union else (hint,)) if p is not NoneType]
        lists = [part for part in parts if get_origin(part) in (list, tuple, Sequence)]
        if lists:
            only = len(lists) == len(parts)
            yield prefix + name, [*get_args(lists[0])] if only else []
        for part in parts:
            if dataclasses.is_dataclass(part):
                yield from _list_options(part, f"{prefix}{name}.")
