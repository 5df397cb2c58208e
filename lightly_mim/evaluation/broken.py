"""`on_error="skip"` of an evaluation: what cannot be read is left out, and said."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.data import KeyedLoader
from lightly_mim.data.loading import default_num_workers
from lightly_mim.data.notes import by_reason, printable
from lightly_mim.data.opening import BrokenImageError

Part = Literal["training", "test", "given"]

_AT_A_TIME = 64  # images that a worker tries


class Readable(NamedTuple):
    """The numbers of the images that can be used, in order, and notes of the others."""

    indices: list[int]
    notes: list[str]


def find_readable(
    images: Dataset[Any],
    part: Part,
    num_workers: int | None = None,
    progress: bool = False,
) -> Readable:
    """Tries every image once, and says how many cannot be used, by reason.

    Raises:
        BrokenImageError: If the machine, the disk or the network fails: the file may be
            whole.
        ValueError: If no image can be used.
    """
    if num_workers is None:
        num_workers = default_num_workers(images)
    loader = KeyedLoader(
        _Tried(images), _AT_A_TIME, training=False, num_workers=num_workers
    )
    indices: list[int] = []
    broken: dict[str, str] = {}
    for _, numbers, outcomes in track(
        loader, f"Trying {part} images", disable=not progress
    ):
        for number, outcome in zip(numbers.tolist(), outcomes, strict=True):
            name, _, reason = outcome.partition("\0")
            if reason:
                broken[name] = reason
            else:
                indices.append(number)
    total = len(indices) + len(broken)
    why = "\n  ".join(by_reason(broken))
    if not indices:
        raise ValueError(f"None of the {total} {part} images can be used:\n  {why}")
    if not broken:
        return Readable(indices, [])
    note = f"{len(broken)} of {total} {part} images are left out:\n  {why}"
    print(note, flush=True)
    return Readable(indices, [note])


class _Tried(Dataset[tuple[Tensor, int, str]]):
    """Yields the number of an image and, if it cannot be used, its name and why."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        outcome = ""
        try:
            self.images[index]
        except BrokenImageError as error:
            if error.passing:
                raise
            outcome = f"{printable(error.path or str(index))}\0{error}"
        return torch.zeros(0), index, outcome
