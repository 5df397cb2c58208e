"""Which folders hold training and validation images, however they are spelled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lightly_mim.data.decode import PICTURE_EXTENSIONS
from lightly_mim.data.listing import is_system
from lightly_mim.data.notes import printable, say

_ROLE_OF = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
# What may follow in a name: "training_set", "train_images", "val2017".
_FILLERS = ("set", "split", "data", "images", "image", "imgs", "img", "photos")
_NUMBERED = re.compile(r"(fold|split|cv)[ _-]?\d+")


class Splits(NamedTuple):
    """Folders of images.

    Attributes:
        train:
            The training images, or all there are.
        val:
            The validation images. None if there are none.
    """

    train: Path
    val: Path | None


def find_splits(root: Path) -> Splits:
    """Finds the training and the validation images of a folder.

    `train` and `val`, `training` and `validation` and the like, in upper or lower case,
    are the splits; so is `train` alone. A folder that holds nothing but another one is
    looked through, which is said.

    Args:
        root:
            A folder that exists.

    Raises:
        ValueError: If something looks like a split and is not used.
    """
    root = look_through(root)
    folders = _folders(root)
    roles = _roles(folders)
    named = [name for names in roles.values() for name in names]
    if [len(roles.get(role, ())) for role in ("train", "val")] == [1, 1]:
        train, val = roles["train"][0], roles["val"][0]
        others = [name for name in folders if name not in (train, val)]
        if len(roles.get("test", ())) > 1 or _parts(others):
            raise ValueError(_unclear(root, folders, train))
        if others:
            say(
                f"{_shown(root)}: {train} is for training and {val} for validation; "
                f"not used: {_some(others)}."
            )
        return Splits(root / train, root / val)
    if folders and folders == roles.get("train"):
        return Splits(root / folders[0], None)
    if named or _parts(folders):
        raise ValueError(_unclear(root, folders, (named or folders)[0]))
    return Splits(root, None)


def check_no_splits_below(root: Path, filenames: Iterable[str]) -> None:
    """Raises a ValueError if some folder below holds splits, which are all read.

    Args:
        root:
            The folder whose images are read.
        filenames:
            The images, relative to it.
    """
    below: dict[str, set[str]] = {}
    for folder in {Path(name).parent for name in filenames}:
        for inner in (folder, *folder.parents):
            below.setdefault(str(inner.parent), set()).add(inner.name)
    below.pop(".", None)
    for name in sorted(below):
        roles = _roles(sorted(below[name]))
        if "train" in roles and len(roles) > 1:
            splits = [split for names in roles.values() for split in names]
            raise ValueError(
                f"{_shown(root / name)} holds {_some(sorted(splits))}, which look like "
                f"training and other images, and all would be read. Give "
                f'data="{_shown(root / name)}", or '
                f'lightly_mim.data.ImageDataset("{_shown(root)}") if these are not.'
            )


def find_val(root: Path) -> Path:
    """Finds the validation images of a folder that holds no others.

    Args:
        root:
            A folder that exists.

    Raises:
        ValueError: If it holds training images, too.
    """
    root = look_through(root)
    folders = _folders(root)
    roles = _roles(folders)
    if "train" in roles:
        other = next((roles[role][0] for role in ("val", "test") if role in roles), "")
        raise ValueError(
            f"val is a folder of validation images, but {_shown(root)} holds "
            f'{roles["train"][0]}, too. Give val="{_shown(root / other)}".'
        )
    if len(folders) == 1 and roles:
        return root / folders[0]
    return root


def look_through(root: Path) -> Path:
    """Returns the folder below one that holds nothing else, if it holds several.

    Args:
        root:
            A folder that exists.
    """
    folders = _folders(root)
    if len(folders) != 1 or _has_pictures(root) or _roles(folders):
        return root
    inner = root / folders[0]
    below = _folders(inner)
    if _roles(below) or (len(below) > 1 and not _has_pictures(inner)):
        say(f"{_shown(root)} holds nothing but {folders[0]}, which is read instead.")
        return inner
    return root


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            folders = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise ValueError(
            f"Cannot look into {_shown(root)}: {error.strerror or error}."
        ) from error
    return sorted(name for name in folders if not is_system(name))


def _has_pictures(root: Path) -> bool:
    endings = (*PICTURE_EXTENSIONS, ".npy")
    return any(
        entry.name.lower().endswith(endings) and not is_system(entry.name)
        for entry in root.iterdir()
    )


def _roles(folders: list[str]) -> dict[str, list[str]]:
    """Returns the folders whose names are those of splits, by what they are for."""
    found: dict[str, list[str]] = {}
    for name in folders:
        role = _ROLE_OF.get(_without_filler(name))
        if role is not None:
            found.setdefault(role, []).append(name)
    return found


def _without_filler(name: str) -> str:
    stem = re.sub(r"[\W\d_]+$", "", name.lower())  # "train2017", "val_1"
    for filler in _FILLERS:
        shorter = re.sub(r"[\W\d_]+$", "", stem.removesuffix(filler))
        if stem.endswith(filler) and shorter in _ROLE_OF:
            return shorter
    return stem


def _parts(folders: list[str]) -> list[str]:
    """Returns folders that look like splits together, not alone: "a_train", "a_val"."""
    numbered = [name for name in folders if _NUMBERED.fullmatch(name.lower())]
    if len(numbered) > 1:
        return numbered
    by_rest: dict[str, dict[str, str]] = {}
    for name in folders:
        words = re.split(r"[\W\d_]+", name.lower())
        for position in {0, len(words) - 1}:
            role = _ROLE_OF.get(words[position])
            if role is not None and len(words) > 1:
                rest = "_".join(words[:position] + words[position + 1 :])
                by_rest.setdefault(rest, {})[role] = name
    return [
        name for roles in by_rest.values() if len(roles) > 1 for name in roles.values()
    ]


def _unclear(root: Path, folders: list[str], example: str) -> str:
    return (
        f"Which images of {_shown(root)} are for training? It holds the folders "
        f"{_some(folders)}, but not one train and one val. Give "
        f'data="{_shown(root / example)}", and val="..." for validation, or '
        f'lightly_mim.data.ImageDataset("{_shown(root)}") if these are classes.'
    )


def _shown(path: Path) -> str:
    return printable(str(path))


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:10])
