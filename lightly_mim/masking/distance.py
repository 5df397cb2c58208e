"""How far a mask's masked pixels are from what is visible: SimMIM's AvgDist."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightly_mim.masking.mask import Mask


def average_distance(mask: Mask | Tensor, image_size: tuple[int, int]) -> Tensor:
    """Returns the mean distance of masked pixels to the nearest visible one, AvgDist.

    The distance is Euclidean, in pixels, from centre to centre, and exact. Beside the
    result this takes a few times the memory of one channel of the images in float32.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 4.1.1)

    Args:
        mask:
            The masks, or bool tensor with shape (batch_size, height, width), True =
            masked.
        image_size:
            (height, width) of the images in pixels.

    Returns:
        Float tensor with shape (batch_size,).

    Raises:
        ValueError: If the mask does not divide the image, or the tensor is no mask.
    """
    mask = Mask.of(mask)
    (h, w), (height, width) = mask.grid, image_size
    if not mask.fits(image_size):
        raise ValueError(
            f"A mask of {h} x {w} cells does not divide an image of {height} x {width} "
            "pixels: each side of the image must be a multiple of the mask's."
        )
    # The pixel rows of a cell row are alike, so along the rows one of each will do:
    # (B, h, W), squared, infinite where a row has nothing visible.
    visible = ~mask.cells.repeat_interleave(width // w, dim=-1)
    x = torch.arange(width, dtype=torch.float32, device=visible.device)
    there = x.expand(visible.shape)
    before = there.masked_fill(~visible, -math.inf).cummax(dim=-1).values
    after = there.masked_fill(~visible, math.inf)
    after = after.flip(-1).cummin(dim=-1).values.flip(-1)
    along = torch.minimum(x - before, after - x).square()

    # Of a cell row, the pixel row that is nearest to y counts: (H, h), squared.
    p = height // h
    y = torch.arange(height, dtype=torch.float32, device=visible.device)[:, None]
    first = torch.arange(0, height, p, dtype=torch.float32, device=visible.device)
    across = torch.maximum(first - y, y - (first + p - 1)).clamp(min=0).square()

    total = torch.zeros(len(mask), device=visible.device)
    for rows in torch.split(across, p):  # (B, p, h, W) at a time
        nearest = (along[:, None] + rows[:, :, None]).amin(dim=2)
        total += nearest.sqrt().sum(dim=(1, 2))  # 0 where a pixel is visible
    return total / (mask.count * p * (width // w))
