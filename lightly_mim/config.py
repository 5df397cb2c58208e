"""What `config.yaml` says of a method and its parts: class and arguments.

These are the words that jsonargparse reads, so that a run's configuration builds the
same method again. A file is data: `from_config` imports nothing but this package.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lightly_mim.arguments import checked, to_python

Own = TypeVar("Own", bound="Recorded")


class Recorded:
    """Base class of what remembers the arguments that it was made with.

    Attributes:
        init_args:
            These arguments by name, defaults included.
    """

    init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has every constructor check its arguments, those of a user's own too."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked(cls)

    def __new__(cls: type[Own], *args: Any, **kwargs: Any) -> Own:
        """Records the constructor's arguments."""
        self = super().__new__(cls)
        # Copying and unpickling call this without arguments and fill in the state
        # afterwards; missing ones are __init__'s to complain about.
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from error
        bound.apply_defaults()
        init_args = dict(list(bound.arguments.items())[1:])  # all but self
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                init_args.update(init_args.pop(name, {}))
        self.__dict__["init_args"] = init_args
        return self

    # Without it, object's would take any argument in silence.
    def __init__(self) -> None:
        super().__init__()

    def record(self, **chosen: Any) -> None:
        """Records what was chosen where the caller left it open.

        Args:
            chosen:
                The values that are recorded instead, by the arguments' names. Those
                that a subclass does not take are not its arguments.
        """
        taken = set(constructor_arguments(type(self)))
        self.init_args.update({k: v for k, v in chosen.items() if k in taken})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.init_args.items())
        return f"{type(self).__name__}({arguments})"


def constructor_arguments(cls: type) -> list[str]:
    """Returns the names of the arguments that a class can be made with.

    Those of its parents count as long as each constructor passes `**options` on.

    Args:
        cls:
            The class.
    """
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
        open_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names |= {p.name: None for p in parameters[1:] if p.kind not in open_kinds}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def to_config(value: Any) -> Any:
    """Returns a value as YAML can hold it.

    Args:
        value:
            Anything. What was made of recorded arguments becomes its `class_path`,
            `init_args` and, for those that the constructor does not name,
            `dict_kwargs`. Of a data set or a module, which cannot be built again from
            words, the name of its class is told, of a function or a class its own.
    """
    if isinstance(value, Recorded):
        cls = type(value)
        named = constructor_arguments(cls)
        arguments = {name: to_config(item) for name, item in value.init_args.items()}
        config = {
            "class_path": _import_path(cls),
            "init_args": {k: v for k, v in arguments.items() if k in named},
            "dict_kwargs": {k: v for k, v in arguments.items() if k not in named},
        }
        return {name: item for name, item in config.items() if item}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_config(getattr(value, name)) for name in names}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return to_python(value)
    if isinstance(value, Mapping):
        return {str(name): to_config(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_config(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    told = value if hasattr(value, "__qualname__") else type(value)
    return f"<{told.__module__}.{told.__qualname__}>"


def from_config(value: Any) -> Any:
    """Makes again what `to_config` has written down.

    Args:
        value:
            What YAML has made of it.

    Raises:
        ValueError: If it names anything but a recorded class of this package, or was
            something that words do not make again, such as a module or a function.
    """
    if isinstance(value, list):
        return [from_config(item) for item in value]
    if isinstance(value, str) and is_named_only(value):
        raise ValueError(f"{value} cannot be made again from words")
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {name: from_config(item) for name, item in value.items()}
    path = str(value["class_path"])
    arguments = {
        name: from_config(item)
        for part in ("init_args", "dict_kwargs")
        for name, item in (value.get(part) or {}).items()
    }
    return _own_class(path)(**arguments)


def _own_class(path: str) -> Any:
    """Returns a recorded class of this package by its dotted path."""
    package = __name__.partition(".")[0]
    module, _, name = path.rpartition(".")
    if module.split(".")[0] != package:
        raise ValueError(f"{path} is not of {package}, and no file has it imported")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, Recorded)):
        raise ValueError(f"there is no class {path} that a run is made of")
    return found


def is_named_only(value: Any) -> bool:
    """Returns whether `to_config` could but tell the name of a thing's class.

    Args:
        value:
            What `to_config` returned.
    """
    return isinstance(value, str) and value.startswith("<") and value.endswith(">")


def _import_path(cls: type) -> str:
    """Returns where a class can be imported from, the shortest path that does."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
