"""What arguments may be: checked at every public door, by the signatures' own types.

Types say more than classes here: `PositiveInt` is `Annotated[int, ...]`, which is `int`
for a type checker and for the command line, and a rule for `checked`. As in Python's
own typing, a number may be whole where a fraction is asked for, and a list stands for
a tuple, as YAML knows no tuples. `True` is no number, text is no list, and numbers are
finite.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:

    class Indexed(Protocol):
        """Has a length and items, as a list or a LightlyDataset."""

        def __len__(self) -> int: ...

        def __getitem__(self, index: int, /) -> Any: ...

    AnyDataset = Dataset[Any] | Indexed
else:
    AnyDataset = Dataset[Any]  # of which `fits` asks a length and items, no more

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """What a type does not say of a value: metadata of `Annotated`.

    Attributes:
        words:
            What follows the type in a message: "a whole number *of at least 1*".
        test:
            Function that tells whether a value of the type is allowed.
        alone:
            Whether words and test stand for the type as well, which is then what the
            command line can pass.
    """

    words: str
    test: Callable[[Any], bool]
    alone: bool = False

    def __repr__(self) -> str:
        return self.words


def one_of(names: Collection[str]) -> Rule:
    """Returns the rule of a word that is one of some names."""
    return Rule(
        f"one of {', '.join(map(repr, names))}",
        lambda name: isinstance(name, str) and name in names,
        alone=True,
    )


# No size that PyTorch could use has more than 64 bits.
PositiveInt = Annotated[int, Rule("of at least 1", lambda n: 1 <= n < 2**63)]
NonNegativeInt = Annotated[int, Rule("of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Rule("of 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)]
AtLeastTwo = Annotated[int, Rule("of at least 2", lambda n: 2 <= n < 2**63)]
# More would fill the memory of any machine.
Workers = Annotated[int, Rule("from 0 to 1024", lambda n: 0 <= n <= 1024)]
PositiveFloat = Annotated[float, Rule("above 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Rule("of at least 0", lambda x: x >= 0)]
# Shares, named by whether 0 and 1 are among them.
Share = Annotated[float, Rule("above 0 and at most 1", lambda x: 0 < x <= 1)]
InnerShare = Annotated[float, Rule("strictly between 0 and 1", lambda x: 0 < x < 1)]
Rate = Annotated[float, Rule("of at least 0 and below 1", lambda x: 0 <= x < 1)]
Probability = Annotated[float, Rule("from 0 to 1", lambda x: 0 <= x <= 1)]
NonEmpty = Annotated[Sequence[T], Rule("of one or more", lambda items: len(items) > 0)]


def _names_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


Device = torch.device | Annotated[str, Rule("such as 'cpu' or 'cuda:1'", _names_device)]


def checked(target: Function) -> Function:
    """Decorates a function, or a class, whose arguments are what its signature says.

    Paths such as `~/photos` are expanded where one is taken: a shell does so only where
    they stand alone. NumPy's numbers and arrays become Python's.

    Args:
        target:
            The function. Of a class it is the constructor.

    Returns:
        A function, or the class, that raises a ValueError for other arguments.
    """
    if isinstance(target, type):
        target.__init__ = checked(target.__init__)  # type: ignore[misc]
        return target
    signature = _signature(target)
    is_constructor = target.__name__ == "__init__"

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return target(*args, **kwargs)  # which says it in Python's words
        name = type(args[0]).__name__ if is_constructor else target.__name__
        bound.arguments.update(check_arguments(target, bound.arguments, name))
        return target(*bound.args, **bound.kwargs)

    # jsonargparse would look for the names of types in this module first.
    with contextlib.suppress(NameError):
        call.__annotations__ = get_type_hints(target)
    return call  # type: ignore[return-value]


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], name: str | None = None
) -> dict[str, Any]:
    """Checks arguments of a function that is called later, or was called.

    Args:
        function:
            The function.
        arguments:
            Some of its arguments by their names.
        name:
            What messages call the function. None for its own name.

    Returns:
        The arguments, with paths expanded and NumPy's numbers as Python's.

    Raises:
        ValueError: If one is not what the signature says, naming it.
    """
    name = name or function.__name__
    hints, parameters = _hints(function), _signature(function).parameters
    checked_ones: dict[str, Any] = {}
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        kind = parameters[key].kind if key in parameters else None
        if kind is inspect.Parameter.VAR_POSITIONAL:
            checked_ones[key] = tuple(_admit(v, hint, key, name) for v in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            checked_ones[key] = {k: _admit(v, hint, k, name) for k, v in value.items()}
        else:
            checked_ones[key] = _admit(value, hint, key, name)
    return checked_ones


# Both take longer than most checks.
_signature = functools.cache(inspect.signature)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(function), include_extras=True)
    except NameError:  # of names that a type checker alone imports
        return {}


def _admit(value: Any, hint: Any, name: str, function: str) -> Any:
    """Returns a value that a hint allows, in Python's own types."""
    if hint is Any:
        return value
    is_path = isinstance(value, str | Path) and str(value)[:1] == "~"
    if is_path and _takes_path(hint):
        return type(value)(os.path.expanduser(value))  # noqa: PTH111, not strict
    if fits(value, hint):
        return to_python(value) if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray) and fits(value.tolist(), hint):
        return value.tolist()
    message = f"{name} of {function} is {_describe(hint)}, got {name}={_told(value)}."
    items = value if isinstance(value, (list, tuple)) else [value]
    if classes := [item for item in items if isinstance(item, type)]:
        message += f" Make an object of it: {classes[0].__name__}(...)."
    raise ValueError(message)


def to_python(value: np.generic) -> Any:
    """Returns a number of NumPy as Python's, where 0.6 of single precision is 0.6."""
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def _takes_path(hint: Any) -> bool:
    rules = [rule for rule in _rules(hint) if rule.alone]
    if rules:
        return any(rule.test(Path("x")) for rule in rules)
    if isinstance(hint, type) and not get_args(hint):
        return issubclass(hint, os.PathLike)
    return any(_takes_path(part) for part in get_args(hint)) or (
        get_origin(hint) is os.PathLike
    )


def _rules(hint: Any) -> list[Rule]:
    metadata = getattr(hint, "__metadata__", ())
    return [each for each in metadata if isinstance(each, Rule)]


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is what a type hint says.

    Args:
        value:
            The value.
        hint:
            The hint, with the rules of `Annotated`.
    """
    rules = _rules(hint)
    if rules:
        is_known = any(rule.alone for rule in rules) or fits(value, get_args(hint)[0])
        return is_known and all(rule.test(value) for rule in rules)
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if hint is Any or isinstance(hint, TypeVar) or origin is object:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (None, type(None)):
        return value is None
    if origin is bool:
        return isinstance(value, (bool, np.bool_))
    if origin is str:
        return isinstance(value, str) and "\0" not in value
    if origin in (int, float):
        kind = Integral if origin is int else Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        return origin is int or _is_finite(value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, parts or object)
    if origin is Callable or getattr(origin, "__name__", "") == "Callable":
        return callable(value)
    return _is_container(value, origin, parts)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_sized(value: Any) -> bool:
    try:
        len(value)
    except TypeError:  # also of a tensor without a dimension
        return False
    return True


def _is_container(value: Any, origin: Any, parts: tuple[Any, ...]) -> bool:
    """Returns whether a value is of a class, and its items what the hint says."""
    if origin is tuple and parts and parts[-1] is not ...:
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(parts)
            and all(map(fits, value, parts))
        )
    if origin in (list, tuple):
        origin = Sequence
    if origin is Dataset:  # which many, as LightlyDataset, do not derive from
        is_other = isinstance(value, (str, bytes, Mapping))
        return not is_other and hasattr(type(value), "__getitem__") and _is_sized(value)
    if origin in (Sequence, Iterable) and isinstance(value, (str, bytes)):
        return False
    if getattr(origin, "_is_protocol", False):
        names = [n for n in (*vars(origin), *origin.__annotations__) if n[:1] != "_"]
        return all(hasattr(value, name) for name in names)
    if not isinstance(value, origin):
        # What a part of a method is called for, any function may do.
        is_part = "__call__" in getattr(origin, "__abstractmethods__", ())
        return is_part and callable(value) and not isinstance(value, type)
    if isinstance(value, Mapping) and len(parts) == 2:
        return all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)) and parts:
        return all(fits(item, parts[0]) for item in value)
    return True


_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
    Dataset: "a data set",
    Mapping: "a dictionary",
    dict: "a dictionary",
    os.PathLike: "a path",
    Path: "a path",
}


def _describe(hint: Any) -> str:
    """Returns in words what a type hint allows."""
    rules = _rules(hint)
    if rules:
        words = " and ".join(rule.words for rule in rules)
        base = get_args(hint)[0]
        if any(rule.alone for rule in rules):
            return words
        if get_origin(base) is Sequence:
            return f"a list {words}{_each(base)}"
        return f"{_describe(base)} {words}"
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        told = dict.fromkeys(map(_describe, sorted(parts, key=_is_not_none)))
        return " or ".join(told)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple and parts and parts[-1] is not ...:
        return f"({', '.join(map(_describe, parts))})"
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list{_each(hint)}"
    if origin in _NAMES:
        return _NAMES[origin]
    if getattr(origin, "__name__", "") == "Callable":
        return "a function"
    name = getattr(origin, "__name__", str(origin))
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _is_not_none(hint: Any) -> bool:
    return hint is not type(None)


def _each(hint: Any) -> str:
    item = _describe(get_args(hint)[0]) if get_args(hint) else ""
    return f", each {item}" if item else ""


def _told(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)
