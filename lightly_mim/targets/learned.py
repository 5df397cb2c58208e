"""What every target is that learns from images before the training starts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightly_mim.targets.base import Target


class LearnedTarget(Target, nn.Module):
    """A target that looks at images before the training starts.

    What it learns lies in buffers whose last dimension is the channels: none before
    `fit`, and those of the images after it. So a state that was saved after `fit` can
    be loaded before it, and a target does not ask for a number of channels that the
    images tell.
    """

    @abstractmethod
    def fit(self, images: Tensor) -> None:
        """Learns from images; what was learned before is forgotten.

        The same images give the same result, and no global random number is drawn.

        Args:
            images:
                Float tensor with shape (num_images, channels, height, width), a sample
                of training images, normalised and not augmented.

        Raises:
            ValueError: If the images do not suffice.
        """

    @property
    def fitted(self) -> bool:
        """Whether it has learned from images."""
        return next(self.buffers()).shape[-1] > 0

    def check_fitted(self, in_chans: int) -> None:
        """Checks that images of that many channels were seen.

        Raises:
            ValueError: If none were, or others.
        """
        if not self.fitted:
            raise ValueError(
                f"{self} has not seen any images: call its fit(images) before, with a "
                "sample of training images, normalised and not augmented."
            )
        learned = next(self.buffers()).shape[-1]
        if learned != in_chans:
            raise ValueError(
                f"{self} was fitted on images of {learned} channel(s), got images of "
                f"{in_chans}: fit it on images like these."
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                shape = buffer.shape[:-1] + saved.shape[-1:]
                setattr(self, name, buffer.new_zeros(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
