"""Which files below a folder are images, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lightly_mim.data.decode import ARRAY_EXTENSIONS, PICTURE_EXTENSIONS, array_remedy
from lightly_mim.data.notes import printable, say, some

# Made by systems and viewers, in lower case: no classes, and their files no images.
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", "@recently-snapshot"),
    *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbnails", "_thumbnails", "thumbs", "_thumbs", "__pycache__"),
}
_SYSTEM = _SYSTEM_FOLDERS | {"thumbs.db", "ehthumbs.db", "desktop.ini"}


class ImageFiles(NamedTuple):
    """Which files are read, and as what.

    Attributes:
        filenames:
            Paths relative to the root.
        targets:
            One label per file, an index into the classes; all 0 without classes.
        classes:
            Names of the classes, empty if there are none.
    """

    filenames: list[str]
    targets: list[int]
    classes: list[str]


def find_images(
    root: str | os.PathLike[str], extensions: tuple[str, ...] = PICTURE_EXTENSIONS
) -> ImageFiles:
    """Finds the images below a folder; see `ImageDataset` for what counts.

    What is left out is counted by kind and said, and so is a picture beside class
    folders, for which there are no classes.

    Args:
        root:
            The folder.
        extensions:
            Lower-case endings of the files to take.

    Returns:
        Filenames, targets and classes.

    Raises:
        ValueError: If the folder does not exist or cannot be read, or holds no image.
    """
    root = Path(root)
    shown = printable(str(root))
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{shown} {kind}; a folder of images is expected.")
    found = _files_below(root)
    filenames = [name for name in found.files if name.lower().endswith(extensions)]
    if not filenames:
        others = f"found {_counted(found)}" if _others(found) else "there are no files"
        raise ValueError(
            f"No images in {shown}: files ending with {', '.join(extensions)} are "
            f"looked for, {others}.{_other_kind(root, found.files, extensions)}"
        )
    images = set(filenames)
    found.files[:] = [name for name in found.files if name not in images]
    if _others(found):
        say(f"{shown}: {len(filenames)} images; left out: {_counted(found)}.")
    folders = [name.partition(os.sep)[0] for name in filenames if os.sep in name]
    classes = sorted(set(folders))
    if len(folders) < len(filenames):
        if len(classes) > 1:
            beside = [printable(name) for name in filenames if os.sep not in name]
            say(
                f"{shown}: the images have no classes, since {some(beside)} "
                f"{'lies' if len(beside) == 1 else 'lie'} beside the folders "
                f"{some([printable(name) for name in classes])}. If these are "
                "classes, move what lies beside them elsewhere."
            )
        return ImageFiles(filenames, [0] * len(filenames), [])
    label = {name: number for number, name in enumerate(classes)}
    return ImageFiles(filenames, [label[folder] for folder in folders], classes)


def _other_kind(root: Path, files: list[str], extensions: tuple[str, ...]) -> str:
    """Returns what to do about images of the other kind, arrays or pictures."""
    if extensions == PICTURE_EXTENSIONS:
        arrays = [name for name in files if name.lower().endswith(ARRAY_EXTENSIONS)]
        return array_remedy(root / arrays[0]) if arrays else ""
    if any(name.lower().endswith(PICTURE_EXTENSIONS) for name in files):
        return " Pictures are read with in_chans=1 or in_chans=3."
    return ""


def is_system(name: str) -> bool:
    """Returns whether a file or folder is hidden, or made by a system or a viewer.

    Args:
        name:
            Its name, without the folders that hold it.
    """
    return name.startswith(".") or name.lower() in _SYSTEM


class _Found(NamedTuple):
    files: list[str]  # relative to the root, in order
    kinds: Counter[str]  # what else there is


def _files_below(root: Path) -> _Found:
    """Returns the files below a folder, each folder once, whatever links to it.

    Folders come before the links to folders, so that they keep their own names.
    """
    found = _Found([], Counter())
    seen: set[tuple[int, int]] = set()
    links: list[str] = []
    folders = [""]
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                found.kinds["link to a folder that is read already"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(
                f"Cannot look for images in {printable(str(root / folder))}: "
                f"{error.strerror or error}."
            ) from error
        for entry in ordered:
            name = os.path.join(folder, entry.name)  # noqa: PTH118, called often
            if is_system(entry.name):
                if not entry.name.startswith(".") and entry.is_dir():
                    found.kinds[f"folder {entry.name}"] += 1
                continue
            kind = _kind(entry)
            if kind == "file":
                found.files.append(name)
            elif kind == "folder":
                folders.append(name)
            elif kind == "link":
                links.append(name)
            else:
                found.kinds[kind] += 1
    found.files.sort(key=lambda name: name.split(os.sep))  # noqa: PTH206
    return found


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns whether it is a file, a folder, a link to a folder or something else."""
    try:
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if not entry.is_file() and entry.stat():
            return "FIFO, socket or device"
    except OSError:  # a link to nothing or in a loop, which is named when it is read
        pass
    return "file"


def _others(found: _Found) -> int:
    return len(found.files) + found.kinds.total()


def _counted(found: _Found) -> str:
    """Returns how many other files there are of which kind."""
    endings = Counter(
        printable(Path(name).suffix.lower()) or "no ending" for name in found.files
    )
    kinds = (endings + found.kinds).most_common()
    counts = [f"{count} x {kind}" for kind, count in kinds]
    return f"{_others(found)} other files ({some(counts)})"
