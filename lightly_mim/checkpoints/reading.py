"""Reads files of weights as data: nothing in them is executed.

PyTorch's files are read with `weights_only`; beyond tensors and plain values they may
hold the two classes that the official code put beside its weights, argparse's Namespace
and yacs' CfgNode.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightly_mim.checkpoints.whole import check_claims, load_whole
from lightly_mim.files import check_regular

# Where a dictionary of weights lies in a file: Lightning and timm, and Meta's code.
_HOLDERS = ("state_dict", "model")
# A CfgNode is a dictionary with methods, and need not be more here.
_HARMLESS: Any = (argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"))
REMEDY = "Copy or download it again."
# In a folder of the Hugging Face hub, the first that is there.
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Content(NamedTuple):
    """What a file of weights holds, whatever its layout is.

    Attributes:
        path:
            The file or the folder.
        tensors:
            The weights, on the CPU, by the names in the file.
        beside:
            What else is in a PyTorch file.
        metadata:
            That of a safetensors file.
        config:
            The config.json of a folder.
        preprocessor:
            The preprocessor_config.json of a folder.
    """

    path: Path
    tensors: dict[str, Tensor]
    beside: Mapping[str, Any] = {}
    metadata: Mapping[str, str] = {}
    config: Mapping[str, Any] | None = None
    preprocessor: Mapping[str, Any] = {}


def read_content(path: Path, remedy: str = REMEDY) -> Content:
    """Reads a file of weights, or a folder with a config.json.

    Args:
        path:
            A safetensors file, a file of `torch.save`, or a folder as the Hugging Face
            hub has them.
        remedy:
            What to do if it is a file and damaged, one sentence.

    Raises:
        ValueError: If it is damaged, holds no weights, or asks for more than tensors
            and plain values.
    """
    if not path.is_dir():
        return _read_file(path, remedy)
    config = _read_json(path / "config.json")
    file = next((path / n for n in _IN_FOLDER if (path / n).is_file()), None)
    if file is None:
        raise ValueError(
            f"There are no weights in {path}: one of {', '.join(_IN_FOLDER)} is "
            "expected beside config.json."
        )
    preprocessor = path / "preprocessor_config.json"
    return Content(
        path,
        _read_shards(file) if file.suffix == ".json" else _read_file(file).tensors,
        config=config,
        preprocessor=_read_json(preprocessor) if preprocessor.is_file() else {},
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} is damaged: it has no weight_map.")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(map(str, places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside its folder: {name}.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names a file that is not there: {name}.")
        tensors |= _read_file(index.parent / name).tensors
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        check_regular(file)
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it is not a table of settings.")
    return value


def _read_file(file: Path, remedy: str = REMEDY) -> Content:
    with file.open("rb") as content:
        head = content.read(9)
    # A safetensors file begins with the length of its header, in eight bytes, and "{".
    if head[8:] == b"{":
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}
                return Content(file, tensors, metadata=content.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}. {remedy}") from error
    zipped = head.startswith(b"PK\x03\x04")
    if not (zipped or head.startswith(b"\x80")) or (zipped and _is_program(file)):
        raise ValueError(
            f"{file} is damaged, or is neither a safetensors file nor one of "
            "torch.save. Copy or download it again; of an encoder in ONNX or of "
            "torch.export, pass what it was converted from."
        )
    return _content(file, load_whole(file, remedy=remedy, harmless=_HARMLESS))


def _is_program(file: Path) -> bool:
    """Returns whether a whole zip holds what torch.save does not write."""
    try:
        with ZipFile(file) as archive:
            return not any(Path(name).name == "data.pkl" for name in archive.namelist())
    except Exception:  # cut, or made up: zipfile's own depend on where
        return False


def _content(file: Path, loaded: Any) -> Content:
    if isinstance(loaded, dict):
        held = [name for name in _HOLDERS if isinstance(loaded.get(name), dict)]
        tensors = loaded[held[0]] if held else loaded
        if tensors and all(
            isinstance(name, str) and isinstance(value, Tensor)
            for name, value in tensors.items()
        ):
            check_claims(file, tensors)
            beside = {k: v for k, v in loaded.items() if held and k != held[0]}
            return Content(file, dict(tensors), beside)
    raise ValueError(
        f"{file} holds no weights: a state dict is expected, bare or under one of "
        f"{', '.join(map(repr, _HOLDERS))}."
    )
