"""Weights under our own names, whatever layout they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """What a file holds of a method and its encoder.

    Attributes:
        layout:
            Whose layout it was, in words.
        spec:
            What to build the encoder from, see `EncoderCheckpoint`.
        encoder:
            The weights of the timm model, under timm's names.
        mask_token:
            The encoder's mask token, with shape (1, 1, patch_dim), if it has one.
        method:
            Name of the method that the weights are of, or its dotted path. None if the
            file does not say.
        options:
            Arguments of that method, as `lightly_mim.config.to_config` writes them.
        parts:
            The weights of the method's other parts, under the method's names.
        left_out:
            What was in the file and is expected to be left out.
        licence:
            What is known of the licence of weights in this layout.
        notes:
            What a user must know of them, in sentences.
    """

    layout: str
    spec: dict[str, Any]
    encoder: dict[str, Tensor]
    mask_token: Tensor | None = None
    method: str | None = None
    options: Mapping[str, Any] = {}
    parts: Mapping[str, Tensor] = {}
    left_out: tuple[str, ...] = ()
    licence: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def method_name(self) -> str | None:
        """The method's name, if it is one of this package."""
        package, _, name = (self.method or "").rpartition(".")
        return name if package.split(".")[0] in ("", "lightly_mim") else None


def pixels(
    head: Mapping[str, Tensor], cell: tuple[int, int], forward: bool = True
) -> dict[str, Tensor]:
    """Reorders the outputs of a layer that predicts the pixels of a cell.

    A 1 x 1 convolution in front of a pixel shuffle has them in the order (channels,
    height, width), ours is (height, width, channels).

    Args:
        head:
            `weight` and `bias` of the layer.
        cell:
            (height, width) of the cell in pixels.
        forward:
            From a convolution to ours. False: back.
    """
    p, q = cell
    moved = {}
    for name, tensor in head.items():
        if forward:
            rows = tensor.reshape(-1, p, q, tensor[0].numel())
            rows = rows.permute(1, 2, 0, 3)
        else:
            rows = tensor.view(p, q, -1, tensor[0].numel()).permute(2, 0, 1, 3)
        rows = rows.reshape(tensor.shape).contiguous()
        if name == "weight":
            rows = rows.flatten(1) if forward else rows[:, :, None, None]
        moved[name] = rows
    return moved
