"""The model card beside converted weights: what, data, recipe, results, licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightly_mim.checkpoints import Weights
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.files import read_sealed
from lightly_mim.runs import RunDirectory

_MADE = "Converted by lightly_mim from "


def is_card(file: Path) -> bool:
    """Returns whether a file is a card that `model_card` wrote.

    Args:
        file:
            The file.
    """
    return file.is_file() and _MADE in file.read_text(errors="replace")


def model_card(
    source: Path | str,
    weights: Weights,
    encoder: MaskedEncoder,
    usage: str,
    notes: list[str],
) -> str:
    """Returns the text of a README.md.

    Args:
        source:
            Where the weights were read.
        weights:
            What was read.
        encoder:
            The encoder.
        usage:
            Code that loads what was written.
        notes:
            What was left out, in sentences.
    """
    run = RunDirectory(source)
    config = run.stored_config() if run.path.is_dir() else None
    name = weights.method_name
    height, width = encoder.img_size
    lines = [
        f"# {encoder.name}" + (f", pretrained with {name}" if name else ""),
        "",
        f"{_MADE}{weights.layout}.",
        *notes,
        "",
        "```python",
        usage,
        "```",
        "",
        f"It takes images of {height} x {width} pixels with {encoder.in_chans} "
        "channel(s), from [0, 1] normalised with mean "
        f"{_numbers(encoder.mean)} and deviation {_numbers(encoder.std)}.",
        "",
        *_data(config),
        *_recipe(config),
        *_results(run),
        *_licence(weights, config),
    ]
    return "\n".join(lines)


def _data(config: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Data"
    yield ""
    if config is None:
        yield (
            "Not known: there is no config.yaml beside the weights, which would say on "
            "which images they were trained."
        )
    else:
        yield f"Pretrained on `{config['data']}`, without labels."
    yield ""


def _recipe(config: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    recipe = (config or {}).get("recipe")
    if not isinstance(recipe, Mapping):
        why = "there is no config.yaml beside the weights"
        yield f"Not known: {why if config is None else 'config.yaml has no recipe'}."
        yield ""
        return
    said = ("source", "epochs", "batch_size", "lr", "lr_batch_size", "weight_decay")
    for name in (*said, "warmup_epochs", "schedule", "min_scale"):
        if name in recipe:
            yield f"- {name}: {recipe[name]}"
    if (config or {}).get("init"):
        yield f"- began with the weights in: {(config or {})['init']}"
    yield ""


def _results(run: RunDirectory) -> Iterator[str]:
    yield "## Results"
    yield ""
    file = run.path / "results.json"
    try:
        stored = (
            read_sealed(file, "Evaluate again.") if file.is_file() else {"rows": []}
        )
        rows = stored["rows"]
        # Such as that test images are training images.
        notes = [f"- {note}" for note in stored.get("notes", [])]
        lines = [
            f"| {row['model']} | {row['protocol']} {row['variant']} | "
            f"{100 * row['top1']:.1f} [{100 * row['top1_low']:.1f}, "
            f"{100 * row['top1_high']:.1f}] | {row['num_test']} |"
            for row in rows
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is of another version: {error!r}. Evaluate again."
        ) from error
    if lines:
        yield "| Model | Protocol | Top-1 % [95 % interval] | Test images |"
        yield "|---|---|---|---|"
        yield from lines
        yield ""
        yield from notes
    else:
        why = (
            "results.json has no rows" if file.is_file() else "there is no results.json"
        )
        yield f"Not evaluated: {why} beside the weights."
    yield ""


def _licence(weights: Weights, config: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Licence"
    yield ""
    init = (config or {}).get("init")
    if weights.licence is not None:
        yield f"The licence of the weights that it came from: {weights.licence}."
    elif init:
        yield (
            f"It began with the weights in {init}, and their licence holds for it, too."
        )
    else:
        yield "That of whoever trained it: the file does not say."
    yield ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
