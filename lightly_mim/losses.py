"""How to measure a prediction."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightly_mim.arguments import PositiveFloat
from lightly_mim.config import Recorded

Reduction = Literal["none", "mean"]


class Loss(Recorded, ABC):
    """A distance between predictions and targets.

    Attributes:
        for_classes:
            Whether the targets are classes and the predictions logits.
    """

    for_classes: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, prediction: Tensor, target: Tensor, reduction: Reduction
    ) -> Tensor:
        """Measures every value.

        Args:
            prediction:
                Float tensor with shape (batch_size, num_cells, width), for classes
                (batch_size, num_cells, width, num_classes).
            target:
                Tensor with shape (batch_size, num_cells, width), float or int64.
            reduction:
                'none', or 'mean' for the mean over all values.

        Returns:
            Tensor with shape (batch_size, num_cells, width), or ().
        """


class L1(Loss):
    """The absolute difference (SimMIM, section 3.4)."""

    def __call__(
        self, prediction: Tensor, target: Tensor, reduction: Reduction
    ) -> Tensor:
        """Returns |prediction - target|, see `Loss`."""
        return F.l1_loss(prediction, target, reduction=reduction)


class L2(Loss):
    """The squared difference (MAE, section 3; SimMIM, table 5)."""

    def __call__(
        self, prediction: Tensor, target: Tensor, reduction: Reduction
    ) -> Tensor:
        """Returns (prediction - target)**2, see `Loss`."""
        return F.mse_loss(prediction, target, reduction=reduction)


class SmoothL1(Loss):
    """The squared difference over 2 beta below beta, the absolute one above it.

    Above beta, beta / 2 is subtracted, so that both meet (SimMIM, table 5, which does
    not say its beta).

    Attributes:
        beta:
            Where the two meet, in units of the target. 1 is PyTorch's.

    Raises:
        ValueError: If beta is not positive.
    """

    def __init__(self, beta: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def __call__(
        self, prediction: Tensor, target: Tensor, reduction: Reduction
    ) -> Tensor:
        """Returns the smooth difference, see `Loss`."""
        return F.smooth_l1_loss(prediction, target, reduction=reduction, beta=self.beta)


class CrossEntropy(Loss):
    """The negative log-likelihood of the right class."""

    for_classes: ClassVar[bool] = True

    def __call__(
        self, prediction: Tensor, target: Tensor, reduction: Reduction
    ) -> Tensor:
        """Returns the cross-entropy of each class decision, see `Loss`."""
        # As a list of decisions, whose logits PyTorch takes without a copy; on GPUs it
        # sums a list up in a fixed order, and more dimensions in none.
        losses = F.cross_entropy(
            prediction.flatten(0, -2), target.flatten(), reduction=reduction
        )
        return losses if reduction == "mean" else losses.view_as(target)


def choose_loss(loss: Loss | None, num_classes: int | None, default: Loss) -> Loss:
    """Returns the loss for a target.

    Args:
        loss:
            The one that was asked for. None for cross-entropy where the target is
            classes, and `default` elsewhere.
        num_classes:
            Of the target, see `lightly_mim.targets.Target`.
        default:
            What measures numbers.

    Raises:
        ValueError: If the loss does not fit the target, or cannot be called as one.
    """
    discrete = num_classes is not None
    if loss is None:
        return CrossEntropy() if discrete else default
    _check_call(loss)
    if getattr(loss, "for_classes", False) != discrete:
        needed = "classes, which need CrossEntropy()" if discrete else "numbers"
        raise ValueError(f"The target is {needed}, got the loss {loss!r}.")
    return loss


def _check_call(loss: Callable[..., Any]) -> None:
    """Raises a ValueError if a loss does not take what it is called with."""
    called = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        inspect.signature(called).bind(None, None, reduction="mean")
    except TypeError as error:
        raise ValueError(
            f"A loss is called by loss(prediction, target, reduction=...) with 'mean' "
            f"or 'none', which {loss!r} does not take: {error}. Derive from "
            "lightly_mim.losses.Loss, or pass a function such as "
            "torch.nn.functional.l1_loss; a module of torch.nn has its reduction fixed."
        ) from None
    except ValueError:
        return  # written in C, which does not tell


def masked_loss(
    prediction: Tensor,
    target: Tensor,
    loss: Loss,
    weight: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Averages a loss over the predicted values of a batch.

    This is SimMIM's normalisation: the sum over the masked pixels of the whole batch,
    divided by their number and the number of channels. Its reference code adds 1e-5 to
    the number against a division by zero, which cannot happen here; that changes the
    loss by less than float32 resolves.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4, equation 1)

    Args:
        prediction:
            Float tensor with shape (batch_size, num_cells, width), for classes
            (batch_size, num_cells, width * num_classes). Half precision is measured in
            float32.
        target:
            Tensor with shape (batch_size, num_cells, width).
        loss:
            How each value is measured.
        weight:
            Tensor with the shape of the target, how much a value counts, from 0 to 1.
            None if all count.
        num_classes:
            Number of classes that the target has. None to take what is predicted.

    Returns:
        Tensor with shape ().

    Raises:
        ValueError: If prediction and target do not fit each other, or if the loss does
            not measure every value.
    """
    if prediction.dtype in (torch.float16, torch.bfloat16):
        prediction = prediction.float()
    width = target.shape[-1]
    if getattr(loss, "for_classes", False):
        if target.dtype != torch.int64:
            raise ValueError(f"Classes are int64, and the target is {target.dtype}.")
        num_classes = num_classes or prediction.shape[-1] // width
        fits = prediction.shape == (*target.shape[:-1], width * num_classes)
        if fits:
            prediction = prediction.reshape(*target.shape, num_classes)
    else:
        target = target.to(prediction.dtype)
        fits = prediction.shape == target.shape
    if not fits:
        raise ValueError(
            f"The head predicts a tensor of shape {tuple(prediction.shape)}, and the "
            f"target has {tuple(target.shape)}"
            + (f" of {num_classes} classes" if num_classes else "")
            + ": build the head for the width of the target."
        )
    if weight is None:
        return loss(prediction, target, reduction="mean")
    values = loss(prediction, target, reduction="none")
    if values.shape != target.shape:
        raise ValueError(
            f"With reduction='none' a loss measures every value, {loss!r} returned the "
            f"shape {tuple(values.shape)} for {tuple(target.shape)}."
        )
    return (values * weight).sum() / weight.sum()
