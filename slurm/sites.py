"""A site's YAML file, `--config site.yaml`, as words of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class _AsWritten(yaml.SafeLoader):
    """Reads numbers and dates as their text: 0123 is no 83, 24:00:00 no 86400."""


def _as_written(loader: _AsWritten, node: yaml.Node) -> Any:
    return node.value


for _tag in ("int", "float", "timestamp"):
    yaml.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_written, _AsWritten)


def read_config(path: Path, refused: set[str]) -> list[str]:
    """Reads a site's YAML file as words of the command line.

    Args:
        path:
            The file.
        refused:
            Names of the options that it may not have. All others are the cluster's, or
            sbatch's own.

    Raises:
        ValueError: If it cannot be read, has such options, or values that YAML reads as
            something else than their text.
    """
    from lightly_mim.config import read_yaml

    try:
        stored = read_yaml(path, lambda text: yaml.load(text, _AsWritten))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"--config {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} holds no mapping of option: value.")
    words = []
    for key, value in stored.items():
        option = str(key).replace("_", "-")
        if option in refused:
            raise ValueError(
                f"--config {path} has {key!r}, which is an option of a study, not of a "
                "cluster."
            )
        try:
            words += [f"--{option}", *_values(value, option)]
        except ValueError as error:
            raise ValueError(f"--config {path}, {key}: {error}") from error
    return words


def _values(value: Any, option: str) -> Iterator[str]:
    """Yields the words of an option.

    Raises:
        ValueError: If YAML does not read one as text.
    """
    if isinstance(value, dict):
        for name, text in value.items():
            # sbatch has options without a value.
            if option == "sbatch" and (text is True or text is None):
                yield _text(name)
            else:
                yield f"{_text(name)}={_text(text)}"
    else:
        for each in value if isinstance(value, list) else [value]:
            yield _text(each)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        read = "nothing" if value is None else f"the truth value {value}"
        raise ValueError(
            f"YAML reads {read} here: put quotes around what is meant, such as 'no', "
            "or leave the line out."
        )
    raise ValueError(
        f"YAML reads a {type(value).__name__} here, {value}: put quotes around the "
        "text."
    )
