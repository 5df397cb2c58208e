"""Files that a reader never sees half of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path and renames it to the wanted one when all went well.

    The temporary file lies in the same folder, because only a rename within one file
    system is atomic, and it reaches the disk before the rename. If the body raises, it
    is removed and whatever stood at the path stays as it was. Missing folders are made.

    Args:
        path:
            Where the file is wanted.

    Yields:
        The temporary path to write to. It keeps the suffix of the wanted one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give it the rights any other file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
