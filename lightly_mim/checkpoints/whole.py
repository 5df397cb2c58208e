"""PyTorch's files: read as a whole or not at all, and never unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from lightly_mim.files import check_regular

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def load_whole(
    path: Path | str,
    *,
    remedy: str,
    foreign: str | None = None,
    harmless: Sequence[Any] = (),
) -> Any:
    """Reads what `torch.save` wrote, on the CPU, if every byte of it is as it was.

    The file is a zip whose parts have checksums, which PyTorch does not look at.

    Args:
        path:
            The file.
        remedy:
            What to do if it is damaged, one sentence.
        foreign:
            The message for a file that is whole, but holds more than tensors and plain
            values. By default one that says what it asks for.
        harmless:
            Classes that it may hold besides, as `torch.serialization.safe_globals`
            takes them.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged or holds something else.
    """
    path = Path(path).absolute()  # names that begin like a URL are files too
    try:
        check_regular(path)
    except ValueError as error:
        raise _damaged(path, str(error), remedy) from error
    with path.open("rb") as file:
        head = file.read(len(_ZIP))
        if head == _ZIP:
            try:
                _check_zip(path)
            except Exception as error:  # zipfile's own depend on where the damage is
                raise _damaged(path, _reason(error), remedy) from error
        elif head[:1] != _PICKLE:
            raise _damaged(path, "it does not begin like a PyTorch file", remedy)
        file.seek(0, os.SEEK_SET)
        try:
            with torch.serialization.safe_globals(list(harmless)):
                return torch.load(file, map_location="cpu", weights_only=True)
        # Whatever it is that an unpickler makes of a file that is cut or made up.
        except Exception as error:
            if foreign is not None:
                raise ValueError(foreign) from error
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                raise _damaged(path, _reason(error), remedy) from error
            raise ValueError(
                f"{path} is refused: it asks for {asked[1]}, and unpickling that may "
                "run code. Weights need no more than tensors and plain values, besides "
                "argparse.Namespace and yacs' CfgNode. Where you trust the file, load "
                "it with torch.load(..., weights_only=False) and save its state dict "
                "alone."
            ) from error


def check_claims(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuses tensors that would be larger than what is in their file.

    Tensors of a PyTorch file may share their numbers, and one number may be all of a
    tensor: a few bytes claim terabytes, which a model with them would take.

    Args:
        path:
            The file.
        tensors:
            What was read of it; what is no tensor is passed over.

    Raises:
        ValueError: If so.
    """
    claimed, there = 0, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{path} is refused: {name} is not a plain tensor, but on "
                f"{tensor.device} with layout {tensor.layout}."
            )
        claimed += tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        there[storage.data_ptr()] = storage.nbytes()
    if claimed > _SHARED * sum(there.values()) + _SMALL:
        raise ValueError(
            f"{path} is refused: its tensors claim {claimed:,} bytes, and "
            f"{sum(there.values()):,} are there."
        )


# How often the numbers of a file may be shared (layers that are tied share theirs), and
# how many bytes by which tensors may be larger than that.
_SHARED, _SMALL = 4, 2**20


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}. {remedy}")


def _reason(error: Exception) -> str:
    # PyTorch's own advice stands before its reason.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return (reason or type(error).__name__).splitlines()[0].rstrip(".")


def _check_zip(path: Path) -> None:
    """Raises an error if a part of a zip is not what its checksum says.

    Args:
        path:
            The file.
    """
    with ZipFile(path) as archive:
        packed = [i for i in archive.infolist() if i.compress_type != ZIP_STORED]
        if packed:  # PyTorch packs nothing
            raise BadZipFile(f"{packed[0].filename} is packed")
        if bad := archive.testzip():
            raise BadZipFile(f"the checksum of its part {bad} is another")
