"""What the file behind `--config` may say: it is data, and runs nothing.

jsonargparse imports and calls whatever a class path names. It is given no file here,
but what was read from one and checked: plain values, and methods and parts of methods,
which are those of this package or named by the command line itself.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import get_loader

from lightly_mim.checkpoints.hub import is_hub_name
from lightly_mim.config import Recorded, check_named, own_class, read_yaml
from lightly_mim.files import expanded, is_file
from lightly_mim.spelling import import_own, meant, public_classes

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None), Path)
_PART = ("class_path", "init_args", "dict_kwargs")
_WEIGHTS = ("encoder", "init", "checkpoint")  # options that say where weights are


class ConfigFile:
    """A file of options of a command.

    Attributes:
        path:
            The file.
        options:
            What it says, by the names of the options.

    Args:
        path:
            The file.
        command:
            The function whose arguments it names.
        named:
            Dotted paths that the command line names itself.
        trust:
            Whether classes of methods and their parts may be imported because the file
            names them.

    Raises:
        ValueError: If it cannot be read, or says what a file may not say.
    """

    def __init__(
        self,
        path: str,
        command: Callable[..., Any],
        named: frozenset[str] = frozenset(),
        trust: bool = False,
    ) -> None:
        self.path = path
        self._named = named
        self._trust = trust
        if not is_file(path):
            raise ValueError(f"--config: File does not exist: {path[:200]}")
        try:
            options = read_yaml(path, get_loader("yaml"))
        except OSError as error:
            raise ValueError(f"--config: {path} cannot be read: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"--config: {path} has no lines of `option: value`.")
        self.options: dict[str, Any] = options
        hints = get_type_hints(command)
        known = list(inspect.signature(command).parameters)
        for name, value in self.options.items():
            if name not in known:
                raise ValueError(
                    f"{path} has {name!r}, which is no option of the command."
                    f"{meant(str(name), known)}"
                )
            self._check(value, hints[name], name)
        for name in _WEIGHTS:
            self._told(name, partial(self._check_weights, self.options.get(name)))

    def _check_named(self, arguments: Mapping[str, Any]) -> None:
        if not self._trust and str(arguments.get("encoder")) not in self._named:
            check_named(arguments)

    def _check_weights(self, source: Any) -> None:
        with suppress(OSError):  # a path may have a colon, and be too long for one
            if expanded(str(source)).exists():
                return
        self._check_named({"encoder": source})
        if is_hub_name(str(source)) and not (self._trust or source in self._named):
            raise ValueError(
                f"{source!r} is not on this machine, and no file has weights fetched"
            )

    def _check(self, value: Any, hint: Any, place: str) -> None:
        """Refuses a value that is more than data, by the type that is expected."""
        kinds = list(dict.fromkeys(_kinds(hint)))
        bases = [each for each in kinds if issubclass(each, Recorded)]
        value = _read(value)
        if bases:
            self._check_parts(value, bases, place)
        elif any(not (each in _PLAIN or is_dataclass(each)) for each in kinds):
            if value not in (None, [], {}):
                raise ValueError(
                    f"{self.path} has {place}, which is code: no file has it run. "
                    f"Leave it out of the file, and pass {place}=... in Python."
                )
        elif isinstance(value, str) and any(map(is_dataclass, kinds)):
            if str not in kinds:
                raise ValueError(f"{place} in {self.path} has settings, not a name.")
        else:
            self._check_data(value, place)

    def _check_parts(self, value: Any, bases: list[type], place: str) -> None:
        """Refuses what is not a class of a method or a part, or several of them."""
        if isinstance(value, list):
            for each in value:
                self._check_parts(_read(each), bases, place)
        elif isinstance(value, str):
            self._find(value, bases, place)
        elif value is not None:
            if not (isinstance(value, dict) and "class_path" in value):
                raise ValueError(f"{place} in {self.path} does not say its class_path.")
            if unknown := value.keys() - {*_PART}:
                raise ValueError(
                    f"{place} in {self.path} has {', '.join(map(str, unknown))}; there "
                    f"are {', '.join(_PART)}."
                )
            cls = self._find(value["class_path"], bases, place)
            hints = _constructor_hints(cls)
            for part in _PART[1:]:
                arguments = value.get(part) or {}
                if not isinstance(arguments, dict):
                    raise ValueError(f"{place}.{part} in {self.path} has no settings.")
                self._check_names(arguments, place)
                for name, argument in arguments.items():
                    hint = hints.get(name, object) if part == "init_args" else object
                    self._check(argument, hint, f"{place}.{name}")
                encoder = partial(self._check_named, arguments)
                self._told(f"{place}.encoder", encoder)

    def _find(self, path: Any, bases: list[type], place: str) -> type:
        """Returns a class that may be named."""
        path = str(path)
        known = {each.__name__: each for base in bases for each in public_classes(base)}
        found: Any = known.get(path)
        if "." in path:
            if path in self._named or self._trust:
                found = import_own(path)
            else:
                found = self._told(place, lambda: own_class(path))
        if not (inspect.isclass(found) and issubclass(found, tuple(bases))):
            kind = " or ".join(base.__name__ for base in bases)
            raise ValueError(
                f"{place} in {self.path}: {path} is no {kind}.{meant(path, known)}"
            )
        return found

    def _told(self, place: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ValueError as error:
            raise ValueError(
                f"{place} in {self.path}: {error}. If you know what it is, name it on "
                f"the command line (--{place} ...)"
                + ("." if self._trust else ", or pass --trust as well.")
            ) from error

    def _check_data(self, value: Any, place: str) -> None:
        """Refuses what is not text, numbers, truth values, and lists and maps of them.

        Raises:
            ValueError: If a part of it is something else, or would be a class to
                jsonargparse.
        """
        value = _read(value)
        if isinstance(value, dict):
            self._check_names(value, place)
            for name, each in value.items():
                self._check_data(each, f"{place}.{name}")
        elif isinstance(value, list):
            for each in value:
                self._check_data(each, place)
        elif type(value) not in _PLAIN:
            raise ValueError(f"{place} in {self.path} is a {type(value).__name__}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place} in {self.path} is {value}, not a finite number.")

    def _check_names(self, settings: Mapping[Any, Any], place: str) -> None:
        """Refuses names that jsonargparse reads as more: `a.b`, `a+`, `__path__`."""
        for name in map(str, settings):
            if not name.isidentifier() or name.startswith("__") or name in _PART:
                raise ValueError(
                    f"{place} in {self.path} has {name!r}, which is not the name of a "
                    "setting."
                )


def _read(value: Any) -> Any:
    """Returns what jsonargparse makes of a value: of text what YAML does, and so on."""
    read, text = value, None
    while isinstance(read, str) and read != text:
        text = read
        try:
            read = get_loader("yaml")(text)
        except Exception:  # it stays text
            break
    return read if isinstance(read, (dict, list)) else value


def _kinds(hint: Any) -> Iterator[type]:
    """Yields the classes in a type, of a function those that it takes and makes."""
    if inspect.isclass(hint) and not get_args(hint) and hint not in (object, Any):
        yield hint
    for each in get_args(hint):
        for one in each if isinstance(each, list) else [each]:
            yield from _kinds(one)


def _constructor_hints(cls: type) -> Mapping[str, Any]:
    """Returns the types of the arguments of a class and of its parents."""
    hints: dict[str, Any] = {}
    for base in cls.__mro__:
        try:
            found = get_type_hints(vars(base).get("__init__", object))
        except NameError:  # of names that a type checker alone imports
            continue
        hints = found | hints
    return hints
