"""How to measure a prediction."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["l1", "l2", "smooth_l1"]

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def check_loss_name(loss: str) -> None:
    """Raises a ValueError for a loss that does not exist."""
    if loss not in _LOSSES:
        raise ValueError(f"The loss is one of {get_args(LossName)}, got {loss!r}.")


def masked_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    loss: LossName = "l1",
) -> Tensor:
    """Averages a loss over the predicted values of a batch.

    This is SimMIM's normalisation: the sum over the masked pixels of the whole batch,
    divided by their number and the number of channels. Its reference code adds 1e-5 to
    the number against a division by zero, which cannot happen here; that changes the
    loss by less than float32 resolves.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4, equation 1; l2
      and smooth l1 are the ablations of table 5)

    Args:
        prediction:
            Tensor with shape (batch_size, num_cells, dim). Half precision is measured
            in float32.
        target:
            Tensor with the shape of the prediction.
        weight:
            Tensor with the shape of the prediction, 1 where a value counts and 0 where
            it does not. None if all count.
        loss:
            'l1', 'l2' (squared error) or 'smooth_l1' (beta 1).

    Returns:
        Tensor with shape ().

    Raises:
        ValueError: If the loss does not exist.
    """
    check_loss_name(loss)
    measure = _LOSSES[loss]
    if prediction.dtype in (torch.float16, torch.bfloat16):
        prediction = prediction.float()
    target = target.to(prediction.dtype)
    if weight is None:
        return measure(prediction, target)
    difference = measure(prediction, target, reduction="none")
    return (difference * weight).sum() / weight.sum()
