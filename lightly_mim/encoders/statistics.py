"""The mean and deviation of the images that weights were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def pretrained_statistics(model: nn.Module, in_chans: int) -> Statistics:
    """Returns the mean and deviation of images that a timm model was trained with.

    Those of its `pretrained_cfg`, ImageNet's for a model without one. They are averaged
    over the colours if the model takes another number of channels, for which timm adds
    up or repeats the weights of the colours.

    Args:
        model:
            The model.
        in_chans:
            Number of channels.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std:
        return imagenet_statistics(in_chans)
    return _for_channels(mean, in_chans), _for_channels(std, in_chans)


def imagenet_statistics(in_chans: int) -> Statistics:
    """Returns ImageNet's mean and deviation, averaged over colours unless RGB.

    Args:
        in_chans:
            Number of channels.
    """
    return (
        _for_channels(IMAGENET_DEFAULT_MEAN, in_chans),
        _for_channels(IMAGENET_DEFAULT_STD, in_chans),
    )


def _for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if len(values) == in_chans:
        return tuple(map(float, values))
    return (sum(values) / len(values),) * in_chans
