"""The processes of `torch.distributed` that share an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as distributed

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes that share an evaluation, and the rank of this one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def distributed(cls) -> World:
        """Returns the processes of `torch.distributed`.

        Raises:
            ValueError: If it has not been initialised.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "torch.distributed has not been initialised, so there are no processes "
                "to share the images. Leave distributed out, or start with torchrun "
                "and call torch.distributed.init_process_group."
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Returns what the first process makes, in every process."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(box, src=0)
        made: _T = box[0]
        return made

    def from_all(self, value: _T) -> list[_T]:
        """Returns what each process has."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        distributed.all_gather_object(boxes, value)
        return boxes

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            distributed.barrier()
