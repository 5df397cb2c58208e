"""Models on the Hugging Face hub by their names, or in its cache on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

_WANTED = ["config.json", "preprocessor_config.json", "*.safetensors*"]

# Endings of files of weights.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def is_hub_name(name: str) -> bool:
    """Returns whether this is OWNER/MODEL, and no path of this machine.

    Args:
        name:
            What a user calls weights.
    """
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    is_path = Path(name).parent.exists() or Path(name).suffix in SUFFIXES
    return is_name is not None and not is_path


def fetch(name: str) -> Path:
    """Returns the folder of a model on the hub, from its cache if it lies there.

    Args:
        name:
            OWNER/MODEL.

    Raises:
        ValueError: If there is no such model, or no network.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_WANTED, "*.bin*"]))
    # Its own errors, those of requests, or those of a proxy between them.
    except Exception as error:
        raise ValueError(
            f"'{name}' is neither a run, a file nor a folder of this machine, and as a "
            "name on the Hugging Face hub it cannot be fetched "
            f"({type(error).__name__}). Check the path or the name; fetch it once "
            "where there is a network, or download the folder and pass its path."
        ) from error
    return folder
