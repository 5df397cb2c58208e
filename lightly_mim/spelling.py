"""The words of a method on the command line, and messages in the command line's words.

jsonargparse's own messages about a method tell its type hints, twenty lines at a time:
the usual mistakes are found here before it reads the words.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import itertools
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightly_mim.methods
from lightly_mim.config import Recorded, constructor_arguments
from lightly_mim.methods import MaskedImageModel

_METHOD = "--method."


def spell_method(words: Sequence[str]) -> list[str]:
    """Lets `--method.window_size 6` reach timm: jsonargparse wants it spelled out.

    Raises:
        ValueError: If there is no such method or part, or if words of one stand where
            it has not been named.
    """
    words = list(words)
    if "--method" not in words[:-1]:
        lone = next((word for word in words if word.startswith(_METHOD)), None)
        if lone is not None and "--config" not in words:
            raise ValueError(
                f"{lone} needs a method: --method and its name before it, such as "
                "--method SimMIM."
            )
        return words
    place = words.index("--method")
    early = [word for word in words[:place] if word.startswith(_METHOD)]
    if early:
        raise ValueError(
            f"--method stands before {early[0]}: it says which options there are."
        )
    method = _find_method(words[place + 1])
    if method is None:
        return words
    _check_parts(words, method)
    own = constructor_arguments(method)
    if "encoder" in own and not any(
        re.match(r"--(config$|method\.(encoder$|help$|init_args|dict_kwargs))", word)
        for word in words
    ):
        parameter = inspect.signature(method).parameters.get("encoder")
        if parameter is None or parameter.default is parameter.empty:
            raise ValueError(
                f"--method {method.__name__} needs an encoder: --method.encoder and "
                "the name of a timm model, such as vit_small_patch16_224."
            )
    open_ = any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(method).parameters.values()
    )
    return [_spell_option(word, method.__name__, own, open_) for word in words]


def _spell_option(word: str, name: str, own: Sequence[str], is_open: bool) -> str:
    option = word.removeprefix(_METHOD).partition(".")[0]
    known = {"help", "init_args", "dict_kwargs", *own}
    if not word.startswith(_METHOD) or option in known:
        return word
    if not is_open:
        raise ValueError(f"{name} has no option {word}.{_known(option, own, _METHOD)}")
    return word.replace(_METHOD, f"{_METHOD}dict_kwargs.", 1)


def _find_method(name: str) -> type[MaskedImageModel] | None:
    """Returns the class of a method; None for what is left to jsonargparse."""
    found = getattr(lightly_mim.methods, name.rpartition(".")[2], None)
    if "." in name and not name.startswith("lightly_mim."):
        found = import_own(name)
    if inspect.isclass(found) and issubclass(found, MaskedImageModel):
        return found
    if inspect.isfunction(found) and "return" in found.__annotations__:
        return None  # it makes a method
    known = [
        known
        for known in lightly_mim.methods.__all__
        if known not in ("MIMOutput", "MaskedImageModel")
    ]
    raise ValueError(
        f"There is no method {name!r}.{meant(name, known)} There are: "
        f"{', '.join(known)}; or give the dotted path of a MaskedImageModel of your "
        "own."
    )


def import_own(name: str) -> Any:
    """Returns what a dotted path of the command line names.

    It may lie where one stands, which is looked through last.

    Raises:
        ValueError: If it cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be imported: {type(error).__name__}: {error}. It is looked "
            f"for among the installed packages and in {Path.cwd()}."
        ) from error


def _check_parts(words: Sequence[str], method: type[MaskedImageModel]) -> None:
    """Refuses unknown parts of a method, and arguments of parts without a name.

    Raises:
        ValueError: If there is one.
    """
    for part, base in _parts(method).items():
        option = f"{_METHOD}{part}"
        names = [value for word, value in itertools.pairwise(words) if word == option]
        known = {each.__name__: each for each in public_classes(base)}
        what = base.__name__.lower()
        classes = [_find_part(name, base, known) for name in names]
        for place, word in enumerate(words):
            argument = word.removeprefix(f"{option}.")
            if not word.startswith(f"{option}.") or argument.startswith(
                ("init_args", "dict_kwargs", "help", "class_path")
            ):
                continue
            if option not in words[:place] and "--config" not in words:
                raise ValueError(
                    f"{word} is an argument of a {what}, which is named before it: "
                    f"{option} and one of {', '.join(known)}."
                )
            cls = classes[-1] if classes else None
            taken = constructor_arguments(cls) if cls else []
            if cls and argument.partition(".")[0] not in taken:
                hint = _known(argument, taken, f"{option}.")
                raise ValueError(f"{cls.__name__} has no option {word}.{hint}")


def _find_part(
    name: str, base: type[Recorded], known: dict[str, type[Recorded]]
) -> type[Recorded] | None:
    """Returns the class of a part; None for what is left to jsonargparse."""
    if name in ("null", "None") or name.startswith("{"):
        return None
    if "." in name:
        found = import_own(name)
        if inspect.isclass(found) and issubclass(found, base):
            return found
    elif name in known:
        return known[name]
    what = base.__name__.lower()
    raise ValueError(
        f"There is no {what} {name!r}.{meant(name, known)} There are: "
        f"{', '.join(known)}; or give the dotted path of a {base.__name__} of your own."
    )


def _parts(method: type[MaskedImageModel]) -> dict[str, type[Recorded]]:
    """Returns the arguments of a method that have arguments of their own."""
    found: dict[str, type[Recorded]] = {}
    for cls in method.__mro__:
        try:
            hints = get_type_hints(vars(cls).get("__init__", object))
        except NameError:  # of names that a type checker alone imports
            continue
        for name, hint in hints.items():
            for each in (hint, *get_args(hint)):
                if inspect.isclass(each) and issubclass(each, Recorded):
                    found.setdefault(name, each)
    taken = constructor_arguments(method)
    return {name: base for name, base in found.items() if name in taken}


def public_classes(base: type[Recorded]) -> list[type[Recorded]]:
    """Returns what can be made of a base class, in alphabetical order.

    Args:
        base:
            The class.
    """
    found = {base}
    while more := {each for cls in found for each in cls.__subclasses__()} - found:
        found |= more
    public = [
        cls
        for cls in found
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_")
    ]
    return sorted(public, key=lambda cls: cls.__name__)


def meant(name: str, known: Iterable[str]) -> str:
    """Returns a question for the name that is nearest, if one is near.

    Args:
        name:
            What was said.
        known:
            What could be meant.
    """
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean {by_lower[near[0]]}?" if near else ""


def _known(option: str, known: Sequence[str], prefix: str) -> str:
    if not known:
        return " It has none."
    return f"{meant(option, known)} It has: {prefix}{f', {prefix}'.join(known)}."


# Messages.

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "two numbers",
    "list": "a list",
}


def shorten(message: str, command: str, options: Iterable[str] = ()) -> str:
    """Returns what a message of jsonargparse says, in a line or two.

    Args:
        message:
            The message.
        command:
            The command that was read.
        options:
            Names of its options.
    """
    more = f"lightly-mim {command} --help lists all options."
    if match := re.fullmatch(r"argument (--\S+): expected one argument", message):
        return f"{match[1]} has no value."
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        missing = [name.rpartition(".")[2] for name in match[1].split(", ")]
        names = " and ".join(f"--{name}" for name in missing)
        return f"{names} {'is' if len(missing) == 1 else 'are'} missing. {more}"
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        return f"There is no command {match[1]!r}. There are: {match[2]}."
    if match := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        if not match[1].startswith("-"):
            return f"{match[1]!r} stands behind no option, such as --out. {more}"
        hint = meant(match[1], [f"--{name}" for name in options])
        return f"{command} has no option {match[1]}.{hint} {more}"
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    if not keys:
        return message
    option = ".".join(dict.fromkeys(keys))
    last = message.rpartition('Parser key "')[2].partition('":')[2]
    value = re.search(r"(?:Got|Given) value: (.*)", last)
    taken: dict[str, None] = {}
    for line in re.findall(r"Expected (.*)", last):
        if match := re.match(r"a <class '(\w+)'>", line):
            taken |= {_TYPES[match[1]]: None} if match[1] in _TYPES else {}
        elif match := re.match(r"a typing\.Literal\[(.*?)\]", line):
            taken[f"one of {match[1]}".replace("'", "")] = None
        else:
            taken = {}
            break
    if taken and value:
        return f"--{option} takes {' or '.join(taken)}, got {value[1]}."
    lines = [
        line.strip(" -")
        for line in last.splitlines()
        if "NoneType" not in line
        and not re.match(r"\s*(Subtypes|Errors|Given value|Does not validate)", line)
    ]
    return f"--{option}: {'; '.join(dict.fromkeys(filter(None, lines)))}"


@contextlib.contextmanager
def spelled_warnings(
    function: Callable[..., Any] | None, words: Sequence[str]
) -> Iterator[None]:
    """Shows warnings in the words of the command line.

    Args:
        function:
            The function of the command, None if it is not known.
        words:
            The words of the command.
    """
    shown = warnings.formatwarning

    def spelled(
        message: Warning | str, category: type[Warning], *place: Any, **line: Any
    ) -> str:
        text = as_options(str(message), function, words)
        if category is UserWarning:  # for the user, whom no line of code helps
            return f"lightly-mim: warning: {text}\n"
        return shown(text, category, *place, **line)

    warnings.formatwarning = spelled
    try:
        yield
    finally:
        warnings.formatwarning = shown


def as_options(
    message: str, function: Callable[..., Any] | None, words: Sequence[str] = ()
) -> str:
    """Returns a message with `batch_size=0` as `--batch_size 0`, as it was typed.

    Args:
        message:
            The message.
        function:
            The function whose arguments it may name. None leaves the message as it is.
        words:
            The words of the command, which may name a method.
    """
    if function is None:
        return message
    options: dict[str, str] = {}
    if "--method" in words[:-1]:
        name = words[words.index("--method") + 1].rpartition(".")[2]
        method = getattr(lightly_mim.methods, name, None)
        if inspect.isclass(method):
            own = constructor_arguments(method)
            options = {each: f"{_METHOD}{each}" for each in own}
    options |= {name: f"--{name}" for name in inspect.signature(function).parameters}
    return respell(message, options)


def respell(message: str, options: Mapping[str, str]) -> str:
    """Returns a message with `batch_size=0` as `--batch_size 0`, as it was typed.

    Args:
        message:
            The message.
        options:
            How the arguments that it may name are spelled.
    """
    if not options:
        return message
    names = "|".join(map(re.escape, options))
    value = r"\"[^\"]*\"|'[^']*'|\([^()]*\)|\[[^\[\]]*\]|[\w.+/~-]*\w"

    def replace(match: re.Match[str]) -> str:
        text = match[2].strip("\"'")
        if text == match[2]:  # a number, a word or a list of them
            text = re.sub(r"[\"'()\[\],]", "", text)
        elif text != "...":
            text = shlex.quote(text)
        text = text.lower() if text in ("True", "False") else text
        return f"{options[match[1]]} {text}" if text != "None" else match[0]

    message = re.sub(rf"(?<![\w.(-])({names})=({value})", replace, message)
    return re.sub(
        rf"(?<=[Pp]ass )(?:{names})\b(?! of\b)|(?<=[Ll]eave )(?:{names})(?= out\b)"
        rf"|(?<![\w-])(?!out\b)(?:{names})(?= to (?:go|replace))"
        rf"|(?<![\w-])resume(?= goes on\b)"
        rf"|(?<= or )(?:{names})(?=, not both)"
        rf"|(?<=\bas )(?:out|val)\b(?![/.]\w)|(?<=\bin )out\b(?![/.]\w)",
        lambda match: options.get(match[0], match[0]),
        message,
    )
