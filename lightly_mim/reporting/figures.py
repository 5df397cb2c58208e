"""Pictures of what an encoder was shown and what it painted."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightly_mim.files import atomic_write

_CAPTIONS = ("original", "masked", "reconstruction", "pasted")
_MIN_WIDTH = 160  # of a picture; smaller ones are enlarged by a whole number
_BACKGROUND = (255, 255, 255)
_INK = (70, 70, 70)


def reconstruction_grid(
    original: Tensor,
    masked: Tensor,
    reconstruction: Tensor,
    pasted: Tensor,
    path: Path | str | None = None,
) -> Image.Image:
    """Draws original | masked | reconstruction | pasted, one row per image.

    Pixels are enlarged by a whole number without smoothing, never shrunk. Values
    outside [0, 1], which a reconstruction may have, are shown as 0 or 1.

    Args:
        original:
            Float tensor with shape (batch_size, channels, height, width) with values in
            [0, 1]. One channel is shown in grey, three in colour; of any other number
            the first three (of two, the first), and the picture says so.
        masked:
            The same with the masked cells in mid grey, 0.5.
        reconstruction:
            What the method predicts for the whole image.
        pasted:
            The original with its masked cells replaced by their prediction.
        path:
            PNG file to write as well. It appears as a whole or not at all.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If the tensors are not batches of float images of the same shape, or
            hold NaN or infinity.
        OSError: If the file cannot be written.
    """
    columns = (original, masked, reconstruction, pasted)
    for caption, images in zip(_CAPTIONS, columns, strict=True):
        _check_images(caption, images, original)
    num_images, channels, height, width = original.shape
    scale = math.ceil(_MIN_WIDTH / width)
    cell_width, cell_height = width * scale, height * scale
    gap = max(6, cell_width // 32)
    font = ImageFont.load_default(size=max(13, cell_width // 12))
    line = round(1.6 * font.size)  # type: ignore[union-attr]
    note = _channel_note(channels)

    picture = Image.new(
        "RGB",
        (
            4 * cell_width + 5 * gap,
            line + num_images * (cell_height + gap) + (line if note else gap // 2),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(picture)
    for column, (caption, images) in enumerate(zip(_CAPTIONS, columns, strict=True)):
        left = gap + column * (cell_width + gap)
        middle = (left + cell_width // 2, line // 2)
        draw.text(middle, caption, fill=_INK, font=font, anchor="mm")
        for row, cell in enumerate(_to_pictures(images)):
            cell = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            picture.paste(cell, (left, line + row * (cell_height + gap)))
    if note:
        corner = (gap, picture.height - line // 2)
        draw.text(corner, note, fill=_INK, font=font, anchor="lm")
    if path is not None:
        with atomic_write(path) as temporary:
            picture.save(temporary, format="PNG", optimize=True)
    return picture


def _to_pictures(images: Tensor) -> list[Image.Image]:
    shown = 3 if images.shape[1] >= 3 else 1
    values = images[:, :shown].detach().float().cpu().clamp(0, 1).mul(255).round()
    pixels = values.to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return [Image.fromarray(image) for image in pixels.contiguous().numpy()]


def _channel_note(channels: int) -> str:
    if channels in (1, 3):
        return ""
    return f"channel{'s 1 to 3' if channels > 3 else ' 1'} of {channels} shown"


def _check_images(caption: str, images: Tensor, original: Tensor) -> None:
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"The {caption} images are a float tensor with shape (batch_size, "
            f"channels, height, width), got {images.dtype} with shape "
            f"{tuple(images.shape)}."
        )
    if images.shape != original.shape:
        raise ValueError(
            f"The {caption} images have shape {tuple(images.shape)}, the original ones "
            f"{tuple(original.shape)}. All four need the same shape."
        )
    if not bool(images.isfinite().all()):
        raise ValueError(f"The {caption} images hold NaN or infinite values.")
