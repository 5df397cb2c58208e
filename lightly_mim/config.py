"""What `config.yaml` says of a method and its parts: class and arguments.

These are the words that jsonargparse reads, so that a run's configuration builds the
same method again. A file is data: `from_config` imports nothing but this package.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from lightly_mim.arguments import checked, to_python
from lightly_mim.files import check_regular, check_text

Own = TypeVar("Own", bound="Recorded")

# Options of a timm model that say where its weights come from.
WEIGHT_OPTIONS = {
    *("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
}
# Of a configuration: a run's own has two thousand bytes and is four levels deep.
MAX_BYTES = 100_000
MAX_DEPTH = 20


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
    check_named(arguments)
    cls = own_class(path)
    parameters = inspect.signature(cls).parameters.values()
    if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
        check_known(cls, arguments)  # otherwise timm knows
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{path} cannot be made as it is written: {error}") from error


def check_known(cls: type, names: Collection[str]) -> None:
    """Refuses arguments that a class does not have.

    Args:
        cls:
            The class.
        names:
            The arguments that a file names.

    Raises:
        ValueError: If one is unknown.
    """
    known = constructor_arguments(cls)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{cls.__name__} of this version of lightly_mim has no option "
            f"{', '.join(map(repr, unknown))}; it knows {', '.join(known) or 'none'}"
        )


def check_named(arguments: Mapping[str, Any]) -> None:
    """Refuses an encoder that would come from wherever a file says.

    Args:
        arguments:
            Those of a recorded class.

    Raises:
        ValueError: If it is not one of timm's own models, or with weights of others.
    """
    if places := sorted(WEIGHT_OPTIONS & arguments.keys()):
        raise ValueError(
            f"{', '.join(places)} says where weights come from, and no file has them "
            "fetched or read from elsewhere"
        )
    encoder = arguments.get("encoder")
    if isinstance(encoder, str) and ":" in encoder and not is_named_only(encoder):
        raise ValueError(
            f"the encoder {encoder!r} is not one of timm's own models, and no file "
            "has one fetched or read from elsewhere"
        )


def own_class(path: str) -> type[Recorded]:
    """Returns a recorded class of this package by its dotted path.

    Args:
        path:
            The path. Nothing outside this package is imported for it.

    Raises:
        ValueError: If there is no such class.
    """
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


def read_yaml(path: Path | str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Reads a YAML file that somebody else may have written.

    Args:
        path:
            The file.
        load:
            What reads the text, one of PyYAML's safe loaders.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML, too large or too deep, or if it repeats parts by
            aliases (a few lines of which make gigabytes).
    """
    try:
        check_regular(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    with Path(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: no configuration.")
    try:
        text = content.decode()
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is more than {MAX_DEPTH} levels deep")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it repeats *{event.anchor}: write it out")
        return load(text)
    except (
        *(yaml.YAMLError, RecursionError),
        *(ValueError, TypeError, AttributeError),  # of settings of other kinds
    ) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


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


def whole_config(text: str) -> dict[str, Any]:
    """Returns the arguments of a run from the text of its `config.yaml`.

    Raises:
        ValueError: If it is something else by now. What was never sealed is taken as it
            is.
    """
    check_text(text)
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or not config.keys() >= {"out", "data", "method"}:
        raise ValueError("it has no out, data and method of a run")
    return _in_todays_words(config)


def _in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a run as this version says them.

    What an earlier version did not say is said as it meant it, so that its run goes on.
    """
    recipe, method = config.get("recipe"), config["method"]
    if isinstance(recipe, dict):
        decayed = ["mask_token"] if recipe.pop("decay_mask_token", False) else []
        meant = {
            "weight_decay_on": decayed,
            "min_lr_is_absolute": False,
            "full_warmup_from": None,
        }
        config["recipe"] = meant | recipe
    if isinstance(method, dict):
        arguments = method.get("init_args") or {}
        init = _OWN_INIT.get(str(method.get("class_path")).rpartition(".")[2])
        if init is not None and "init" not in arguments:
            there = (method.get("dict_kwargs") or {}).get("pretrained")
            there = there or str(arguments.get("encoder")).startswith("<")
            arguments["init"] = "timm" if there else init
            method["init_args"] = arguments
    return config


# How methods drew new weights before they had the argument.
_OWN_INIT = {"SimMIM": "timm"} | dict.fromkeys(
    ("MAE", "CrossMAE", "MaskTokenMAE"), "mae"
)
