"""What a study may run: checked with the command's own parser before it is sent.

A command is a script of `benchmarks/`, or one of those of `lightly-mim`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from slurm.options import Machine
from slurm.study import ROOT, TaskSpec

PROGRAM = "lightly-mim"

# Options that belong to the study, and why.
OWNED = {
    "out": "every task writes to a directory of its own in the study",
    "resume": "every task goes on where it was cut by itself",
    "overwrite": "a study never replaces one that is there",
    "stage": "training and evaluation are jobs of their own",
    "devices": "it follows from --gpus-per-node or --tasks-per-node",
    "num_nodes": "it follows from --nodes",
}


class Script:
    """A script of `benchmarks/`.

    It exposes its parser as `parser()`, and as `plan(name, arguments)` how it builds
    and trains what goes by a name: one of `--method`, or of `names(arguments)` in a
    script that has names of its own. `images(arguments)`, if there is one, returns the
    folder or the name of its images, None if this machine does not have them.
    """

    def __init__(self, words: Sequence[str]) -> None:
        path = Path(words[0])
        self.name = path.stem
        self._program = f"benchmarks/{path.name}"
        self._script = _load_script(path)
        self._parser: argparse.ArgumentParser = self._script.parser()
        self._parser.error = self._refuse
        self._actions = self._parser._option_string_actions
        self.words = [words[0], *map(self._spell, words[1:])]
        self._tried: set[str] = set()

    def _refuse(self, message: str) -> NoReturn:
        raise ValueError(f"{self._program}: {message}")

    def _spell(self, word: str) -> str:
        """Returns a word with the option as the script spells it: --batch-size."""
        name, equals, value = word.partition("=")
        known = self.option(name[2:]) if name.startswith("--") else None
        return f"{known}{equals}{value}" if known else word

    def check(self, words: Sequence[str], machine: Machine) -> None:
        """Tries the words after the script, down to building its methods.

        Raises:
            ValueError: If the script refuses them.
        """
        from lightly_mim.spelling import respell

        try:
            self._check(words, machine)
        except ValueError as error:
            options = {a.dest: name for name, a in reversed(self._actions.items())}
            raise ValueError(respell(str(error), options)) from error

    def _check(self, words: Sequence[str], machine: Machine) -> None:
        from lightly_mim.pretraining import check_pretraining
        from lightly_mim.settings import check_batch

        arguments = self._parser.parse_args(words)
        shares = {
            "devices": machine.devices,
            "num_nodes": machine.nodes,
            "accumulate": arguments.accumulate,
        }
        names = getattr(self._script, "names", None)
        images = getattr(self._script, "images", None)
        for name in names(arguments) if names else arguments.method:
            plan = self._script.plan(name, arguments)
            # Seeds and the like have the same plan.
            if (tried := repr((plan, arguments.given, shares))) not in self._tried:
                settings = {**plan.pretraining, **arguments.given}
                method = check_pretraining({"method": plan.build, **settings, **shares})
                data = images(arguments) if images else None
                if data is not None:
                    check_batch(data, method, settings)
                self._tried.add(tried)

    def option(self, key: str) -> str | None:
        """Returns the option of a key such as `batch_size`; None if there is none."""
        spellings = (key, key.replace("_", "-"), key.replace("-", "_"))
        return next((f"--{s}" for s in spellings if f"--{s}" in self._actions), None)

    def swept(self, key: str) -> str:
        """Returns the option that a key of a sweep gives a value to.

        Raises:
            ValueError: If there is none, or if it takes no value.
        """
        option = self.option(key)
        if option is None:
            known = sorted(
                name[2:]
                for name, action in self._actions.items()
                if name.startswith("--")
                and action.nargs != 0
                and name[2:].replace("-", "_") not in OWNED
            )
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{Path(self.words[0]).name} does not take the sweep key {key!r}.{hint}"
                f" It takes: {', '.join(known)}."
            )
        if self._actions[option].nargs == 0:
            raise ValueError(f"{option} takes no value, so it cannot be swept.")
        return option

    def given(self) -> set[str]:
        """Returns the keys that the words have options of."""
        options = {word.partition("=")[0] for word in self.words[1:]}
        found = {self._actions[name] for name in options if name in self._actions}
        return {
            name.lstrip("-").replace("-", "_")
            for action in found
            for name in action.option_strings
        }

    def stages(self, words: Sequence[str], machine: Machine) -> dict[str, list[str]]:
        """Returns what the jobs run, by stage, for words that passed `check`.

        `{out}` stands for the task's directory. There are two stages if the script can
        be cut in two with `--stage`.
        """
        full = [self._program, *words, *_owned(self, machine)]
        if "--stage" not in self._actions:
            return {"run": full}
        return {stage: [*full, "--stage", stage] for stage in ("train", "evaluate")}


class Program:
    """A command of `lightly-mim`, with the methods of a `Script`.

    `evaluation` are words of `lightly-mim evaluate`, for what `pretrain` trains.
    """

    def __init__(self, words: Sequence[str], evaluation: Sequence[str] = ()) -> None:
        from lightly_mim.cli import COMMANDS

        if len(words) < 2 or words[1] not in COMMANDS:
            raise ValueError(
                f"{PROGRAM} has the commands {', '.join(COMMANDS)}, got "
                f"{shlex.join(words)!r}."
            )
        self.words = list(words)
        self.name = words[1]
        self._evaluation = list(evaluation)
        self._parameters = inspect.signature(COMMANDS[self.name]).parameters

    def check(self, words: Sequence[str], machine: Machine) -> None:
        """Tries the words after the program, and those of the evaluation."""
        from lightly_mim.cli import check

        if machine != Machine(1, 1) and "devices" not in self._parameters:
            raise ValueError(
                f"{PROGRAM} {self.name} runs in one process, got {machine.nodes} "
                f"node(s) with {machine.devices} each."
            )
        full = [*words, *_owned(self, machine)]
        method = check([word.replace("{out}", "run") for word in full])
        if self._evaluation:
            encoder = None if method is None else method.encoder
            check(["evaluate", "--encoder", "run", *self._evaluation], encoder)

    def option(self, key: str) -> str | None:
        """Returns the option of a key. What there is, only the parser knows."""
        key = key.replace("-", "_")
        return f"--{key}" if key not in OWNED or key in self._parameters else None

    def swept(self, key: str) -> str:
        """Returns the option that a key of a sweep gives a value to."""
        return f"--{key.replace('-', '_')}"

    def given(self) -> set[str]:
        """Returns the keys that the words have options of."""
        options = [word.partition("=")[0] for word in self.words]
        return {w[2:].replace("-", "_") for w in options if w.startswith("--")}

    def stages(self, words: Sequence[str], machine: Machine) -> dict[str, list[str]]:
        """Returns `train`, and `evaluate` if an evaluation was asked for; or `run`."""
        full = [PROGRAM, *words, *_owned(self, machine)]
        if self.name != "pretrain":
            return {"run": [*full, "--overwrite"]}
        return {"train": full} | self.evaluation(full)

    def evaluation(self, words: Sequence[str]) -> dict[str, list[str]]:
        """Returns the stage `evaluate`, if there is one, of a run with such words.

        It has the run's seed, so that the baseline at random initialisation is another
        one for each seed.
        """
        if not self._evaluation:
            return {}
        where = ["--encoder", "{out}", "--out", "{out}", "--overwrite"]
        seed: list[str] = []
        if not any(re.match("--seed(=|$)", word) for word in self._evaluation):
            found = re.findall(r"(?<!\S)--seed[ =](\d+)(?!\S)", " ".join(words))
            seed = ["--seed", found[-1]] if found else []
        return {"evaluate": [PROGRAM, "evaluate", *where, *seed, *self._evaluation]}


Command = Script | Program


def _owned(command: Command, machine: Machine) -> list[str]:
    """Returns the words that the study adds."""
    values = {
        "out": ["{out}"],
        "devices": [str(machine.devices)],
        "num_nodes": [str(machine.nodes)],
        "resume": [],
    }
    words = []
    for key, value in values.items():
        if option := command.option(key):
            words += [option, *value]
    return words


def read(words: Sequence[str], evaluation: Sequence[str] = ()) -> Command:
    """Returns the command that the words behind `--` name.

    Raises:
        ValueError: If there is no such command, or if it has options that belong to
            the study.
    """
    if not words:
        raise ValueError(
            "Say what to run behind --, for example: -- benchmarks/solar_cells.py"
        )
    command: Command
    if Path(words[0]).name == PROGRAM:
        command = Program([PROGRAM, *words[1:]], evaluation)
    else:
        command = Script([str(_find_script(words[0])), *words[1:]])
    if evaluation and command.name != "pretrain":
        raise ValueError(f"--evaluate goes with {PROGRAM} pretrain alone.")
    for key in OWNED:
        if key in command.given():
            raise ValueError(
                f"Leave --{key.replace('_', '-')} to the study: {OWNED[key]}."
            )
    return command


def _find_script(word: str) -> Path:
    """Returns the script that a word names, from here or from the clone."""
    folder = ROOT / "benchmarks"
    scripts = [f for f in sorted(folder.glob("*.py")) if "\ndef plan(" in f.read_text()]
    for path in (Path(word).resolve(), ROOT / word):
        if path in scripts:
            return path
    listed = ", ".join(file.name for file in scripts)
    if (folder / Path(word).name).is_file():
        raise ValueError(
            f"{Path(word).name} trains nothing that a study could collect. Scripts "
            f"that do: {listed}."
        )
    raise ValueError(
        f"There is no command {word!r}. There are {PROGRAM} with pretrain, evaluate or "
        f"evaluate-dense, and the scripts of {folder}: {listed}."
    )


def _load_script(path: Path) -> ModuleType:
    """Imports a script by its path."""
    for folder in (ROOT, path.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_sweep(words: Sequence[str]) -> dict[str, list[str]]:
    """Reads `method=SimMIM,MAE seed=0,1,2`. Commas within brackets do not separate.

    Raises:
        ValueError: If a word is not of that form, or a key or value comes twice.
    """
    sweep: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = _split_values(text)
        if not (key and equals and all(values)):
            raise ValueError(f"--sweep takes KEY=VALUE,VALUE,..., got {word!r}.")
        if key in sweep:
            raise ValueError(f"--sweep names each key once, got {key!r} twice.")
        if len(set(values)) < len(values):
            raise ValueError(f"--sweep names each value once, got {word!r}.")
        sweep[key] = values
    return sweep


def _split_values(text: str) -> list[str]:
    depth, values = 0, [""]
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def tasks(
    command: Command, sweep: Mapping[str, Sequence[str]], machine: Machine
) -> list[TaskSpec]:
    """Returns a task for each combination of the swept values.

    Raises:
        ValueError: If the command does not take a key, a value or a combination.
    """
    for key in sweep:
        option = _option(command, key)
        if key.replace("-", "_") in command.given():
            raise ValueError(f"{option} is in the command and in --sweep: say it once.")
    return [
        make_task(command, number, dict(zip(sweep, values, strict=True)), machine)
        for number, values in enumerate(itertools.product(*sweep.values()))
    ]


def make_task(
    command: Command, number: int, own: Mapping[str, str], machine: Machine
) -> TaskSpec:
    """Returns a task that runs a command with values of its own, which win.

    Raises:
        ValueError: If the command does not take a key, a value or the combination.
    """
    words = command.words[1:]
    for key, value in own.items():
        option = _option(command, key)
        dash = value.startswith("-")  # a separate word would be an option
        swept = [f"{option}={value}"] if dash else [option, value]
        # At the end, where it wins over a --config; but --method stands before
        # --method.encoder.
        own_options = (i for i, w in enumerate(words) if w.startswith(f"{option}."))
        place = next(own_options, len(words))
        words[place:place] = swept
    try:
        command.check(words, machine)
    except ValueError as error:
        values = ", ".join(f"{key}={value}" for key, value in own.items())
        having = f" with {values}" if own else ""
        raise ValueError(
            f"{Path(command.words[0]).name}{having} refuses its words. {error}"
        ) from error
    parts = [f"{key}={value}" for key, value in own.items()] or [command.name]
    name = re.sub(r"[^\w.=+-]", "_", "-".join([f"{number:02d}", *parts]))[:80]
    return TaskSpec(name, dict(own), command.stages(words, machine))


def _option(command: Command, key: str) -> str:
    if (plain := key.replace("-", "_")) in OWNED:
        raise ValueError(f"{key!r} cannot be swept: {OWNED[plain]}.")
    return command.swept(key)
