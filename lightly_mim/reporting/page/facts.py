"""What was run, on what, and what to type next, as texts for the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from lightly_mim.data.notes import counted
from lightly_mim.reporting.page.reading import (
    RunFiles,
    as_mapping,
    as_number,
    as_text,
    dig,
)

_DEFAULTS = "lightly_mim.defaults"


def summary(run: RunFiles) -> list[str]:
    """Returns the run in a few words: method, encoder, images, length."""
    config = run.config or {}
    said = []
    if config:
        arguments = _method_arguments(config)
        size = arguments.get("img_size")
        encoder = as_text(arguments.get("encoder", "an encoder"), 80)
        said = [
            class_name(config.get("method") or ""),
            encoder + (f" at {words_of(size)}" if size else ""),
            as_text(config.get("data", ""), 80),
        ]
        epochs = dig(config, "recipe", "epochs")
        said += [counted(epochs, "epoch")] if isinstance(epochs, int) else []
    elif run.results:
        name = dig(run.results, "encoder", "name")
        data = dig(run.results, "arguments", "data")
        said = [as_text(part, 80) for part in (name, data) if part]
    return [part for part in said if part]


def state(run: RunFiles) -> tuple[str, str]:
    """Returns whether a run has finished: a class for its colour, and words."""
    if not run.config:
        return "plain", "evaluation"
    if run.finished is not None:
        return "good", "finished"
    epochs = dig(run.config, "recipe", "epochs")
    reached = max((max(s.epochs, default=-1) for s in run.metrics.values()), default=-1)
    if reached < 0:
        return "open", "nothing logged yet"
    of = f" of {epochs}" if isinstance(epochs, int) else ""
    return "open", f"unfinished, in epoch {reached + 1}{of}"


def facts(run: RunFiles) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns what was run: groups of (name, value, where the value is from)."""
    groups = []
    if run.config:
        groups += [
            ("Method", list(_method_facts(run.config))),
            ("Images", list(_image_facts(run))),
            ("Recipe", list(_recipe_facts(run.config))),
            ("Machine", list(_machine_facts(run))),
        ]
    elif run.results:
        groups.append(("Encoder", list(_encoder_facts(run.results))))
    if run.results:
        groups.append(("Evaluation", list(_evaluation_facts(run.results))))
    found = versions(run)
    if found:
        listed = [(name, as_text(value, 40), "") for name, value in found.items()]
        groups.append(("Versions", listed))
    return [(name, entries) for name, entries in groups if entries]


def versions(run: RunFiles) -> dict[str, Any]:
    """Returns the versions of the packages, the run's if it noted them."""
    if run.sessions and run.sessions[-1].get("versions"):
        return as_mapping(run.sessions[-1]["versions"])
    return as_mapping(dig(run.results, "versions"))


def _method_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return arguments_of(as_mapping(config.get("method")))


def arguments_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an object that a configuration describes."""
    named = as_mapping(described.get("init_args"))
    return {**named, **as_mapping(described.get("dict_kwargs"))}


def class_name(value: Any) -> str:
    """Returns the name of a class that a configuration names, or the value as text."""
    path = as_mapping(value).get("class_path", value)
    return as_text(path, 120).rpartition(".")[2]


def words_of(value: Any) -> str:
    """Returns a setting in one line: a class with its arguments, a number, a list."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = arguments_of(value).items()
        inner = ", ".join(f"{k} {words_of(v)}" for k, v in arguments)
        return as_text(class_name(value) + (f" ({inner})" if inner else ""))
    if isinstance(value, list | tuple):
        return as_text(" x ".join(map(words_of, value)) if value else "none")
    if isinstance(value, float):
        return f"{value:g}"
    if value is None:
        return "none"
    return as_text("yes" if value is True else "no" if value is False else value)


def _method_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    arguments = _method_arguments(config)
    yield "method", class_name(config.get("method")), ""
    if config.get("init"):
        yield "began with the weights of", as_text(config["init"]), ""
    for name, value in arguments.items():
        if value is not None:
            yield str(name).replace("_", " "), words_of(value), ""


def _image_facts(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    config = run.config or {}
    yield "data", as_text(config.get("data", "")), ""
    told = run.facts.get("images")
    if told:
        yield "training images", as_text(told).partition(" images")[0], ""
    if config.get("val"):
        yield "validation", as_text(config["val"]), ""
    elif config.get("validate") is False:
        yield "validation", "none: test images stay unseen", ""
    normalize = as_mapping(config.get("normalize"))
    for name in ("mean", "std"):
        if isinstance(normalize.get(name), list):
            numbers = " ".join(map(words_of, normalize[name]))
            yield f"normalised with {name}", as_text(numbers), ""


def _recipe_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    recipe = as_mapping(config.get("recipe"))
    source = as_text(recipe.get("source", ""))
    ours = source == _DEFAULTS
    if source:
        yield "source", source, ""
    names = ("epochs", "batch_size", "lr", "warmup_epochs", "weight_decay", "min_scale")
    for name in names:
        if name in recipe:
            given = config.get(name) is not None
            origin = "given" if given else "chosen by the defaults" if ours else ""
            shown = recipe[name]
            words = words_of(shown)
            if name == "lr" and recipe.get("lr_batch_size"):
                words += f" for {words_of(recipe['lr_batch_size'])} images"
            yield name.replace("_", " "), words, origin
    for name in ("schedule", "betas", "clip_grad", "drop_path", "min_lr"):
        value = recipe.get(name)
        if value is not None:
            words = (
                ", ".join(map(words_of, value))
                if isinstance(value, list)
                else words_of(value)
            )
            yield name.replace("_", " "), words, ""
    yield "seed", words_of(config.get("seed")), ""


def _machine_facts(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    config = run.config or {}
    last = run.sessions[-1] if run.sessions else {}
    for name in ("host", "machine"):
        if last.get(name):
            yield name, as_text(last[name]), ""
    if last.get("job"):
        yield "SLURM job", as_text(last["job"]), ""
    device = run.facts.get("device")
    if device:
        processes = words_of(run.facts.get("processes", 1))
        yield "processes", f"{processes} x {as_text(device, 40)}", ""
    yield "precision", words_of(config.get("precision")), ""
    if run.sessions:
        yield "begun", as_text(run.sessions[0].get("time", ""), 40), ""
        if len(run.sessions) > 1:
            yield "went on", f"{len(run.sessions) - 1} times", ""
    seconds = training_seconds(run)
    if seconds:
        yield "time in training steps", duration(seconds), ""
    wall = _wall_seconds(run)
    if wall:
        yield "from begin to end", duration(wall), ""
    speed = run.metrics.get("images_per_second")
    if speed and speed.values and math.isfinite(speed.values[-1]):
        yield "images per second", f"{speed.values[-1]:.4g} in the last epoch", ""


def training_seconds(run: RunFiles) -> float | None:
    """Returns the seconds spent in training epochs, by their speed.

    Those of epochs without a logged speed are not counted.
    """
    speed = run.metrics.get("images_per_second")
    batch = as_number(dig(run.config, "recipe", "batch_size"))
    if speed is None or batch is None:
        return None
    seconds = 0.0
    # An epoch's row stands at its last step, counted from 0.
    for before, step, value in zip(
        [-1, *speed.steps], speed.steps, speed.values, strict=False
    ):
        if math.isfinite(value) and value > 0 and step > before:
            seconds += (step - before) * batch / value
    return seconds or None


def _wall_seconds(run: RunFiles) -> float | None:
    ends = (dig(run.finished, "time"), *(s.get("time") for s in run.sessions[:1]))
    try:
        last, first = (datetime.fromisoformat(str(end)) for end in ends)
        return max((last - first).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def duration(seconds: float) -> str:
    """Returns seconds in the words of a person, such as 1 h 20 min."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _encoder_facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, value in as_mapping(results.get("encoder")).items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {words_of(v)}" for k, v in value.items())
        if value not in (None, ""):
            yield str(name).replace("_", " "), words_of(value), ""


def _evaluation_facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    arguments = as_mapping(results.get("arguments"))
    yield "data", as_text(arguments.get("data", "")), ""
    data = as_mapping(results.get("data"))
    for name, word in (("num_train", "training images"), ("num_test", "test images")):
        if name in data:
            yield word, words_of(data[name]), ""
    classes = data.get("classes")
    if isinstance(classes, list):
        yield "classes", str(len(classes)), ""
    for name in ("layers", "pools", "seed", "precision"):
        value = arguments.get(name)
        if value is not None:
            listed = isinstance(value, list)
            words = ", ".join(map(words_of, value)) if listed else words_of(value)
            yield name, as_text(words), ""


def commands(run: RunFiles) -> list[tuple[str, str]]:
    """Returns commands to type: what they do, and the words."""
    said: list[tuple[str, str]] = []
    path = str(run.path)
    config = run.config or {}
    if config:
        again = ["--config", f"{path}/config.yaml", "--out", f"{path}-again"]
        said.append(("Run it again", _typed("pretrain", *again)))
        if run.finished is None:
            said.append(
                (
                    "Next, go on where it stopped",
                    _typed("pretrain", "--out", path, "--resume"),
                )
            )
    if run.results and run.results.get("command"):
        said.append(("The results came from", as_text(run.results["command"], 2000)))
    if config and run.finished is not None:
        data = config.get("data")
        words = ["--encoder", path, "--data", str(data)]
        words += ["--val", str(config["val"])] if config.get("val") else []
        if not isinstance(data, str) or data.startswith("<"):
            pass  # a data set of one's own, which no word opens
        elif not run.results:
            said.append(
                ("Next, evaluate it", _typed("evaluate", *words, "--out", path))
            )
        elif all(row["protocol"] != "finetune" for row in run.results["rows"]):
            more = ["--protocols", "finetune", "--out", f"{path}-finetune"]
            said.append(("Next, fine-tune it", _typed("evaluate", *words, *more)))
    return said


def _typed(command: str, *words: str) -> str:
    return shlex.join(["lightly-mim", command, *words])
