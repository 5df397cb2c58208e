from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lightly_mim.training.saving import AtomicCheckpointIO


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """Lets no file become larger: real writes that fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_atomic_checkpoint_io__full_disk(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO(lambda: None)
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    with no_room(100_000), pytest.raises(OSError, match="File too large.*last.ckpt"):
        io.save_checkpoint({"step": torch.ones(100_000)}, path)
    assert torch.load(path) == {"step": torch.tensor(1)}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_checkpoint_io__asks_first(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SystemExit("taken over")

    with pytest.raises(SystemExit, match="taken over"):
        AtomicCheckpointIO(refuse).save_checkpoint({}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
