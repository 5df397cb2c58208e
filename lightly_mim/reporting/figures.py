"""Pictures of what a method was shown and what it painted."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightly_mim.files import atomic_write, printable

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLUMNS = ("original", "masked", "prediction", "pasted")
# In the PNG file: where its cells are, as JSON, so that a page can show them alone.
LAYOUT_KEY = "lightly_mim"
MASKED_GREY = 0.5

_MIN_WIDTH = 160  # of a picture; smaller ones are enlarged by a whole number
_BACKGROUND = (255, 255, 255)
_INK = (70, 70, 70)
# Where nothing was predicted, as image editors show that nothing is there.
_CHECKER = ((255, 255, 255), (236, 236, 236))
_CHECKER_SIDE = 8


def reconstruction_grid(
    original: Tensor,
    pasted: Tensor,
    masked: Tensor,
    path: Path | str | None = None,
    *,
    title: str = "",
    note: str = "",
) -> Image.Image:
    """Draws original | masked | prediction | pasted, one row per image.

    Masked pixels are grey in the second column. In the third one the visible pixels,
    for which nothing is predicted, are a light checkerboard. Pixels are enlarged by a
    whole number without smoothing, never shrunk. Values outside [0, 1], which a
    prediction may have, are shown as 0 or 1.

    Args:
        original:
            Float tensor with shape (batch_size, channels, height, width) with values in
            [0, 1]. One channel is shown in grey, three in colour; of any other number
            the first three (of two, the first), and the picture says so.
        pasted:
            The original with its masked pixels replaced by their prediction.
        masked:
            Bool tensor with shape (batch_size, 1, height, width), True = masked.
        path:
            PNG file to write as well. It appears as a whole or not at all. Its text
            `LAYOUT_KEY` tells where the cells are, and title and note.
        title:
            What stands above the picture: which run, when, with what loss.
        note:
            What stands below it.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If the tensors are not batches of float images and a mask of the
            same size, or hold NaN or infinity.
        OSError: If the file cannot be written.
    """
    for caption, images in (("original", original), ("pasted", pasted)):
        _check_images(caption, images, original)
    num_images, channels, height, width = original.shape
    if masked.dtype != torch.bool or masked.shape != (num_images, 1, height, width):
        raise ValueError(
            f"masked is a bool tensor with shape {(num_images, 1, height, width)}, got "
            f"{masked.dtype} with shape {tuple(masked.shape)}."
        )
    scale = math.ceil(_MIN_WIDTH / width)
    cell_width, cell_height = width * scale, height * scale
    gap = max(6, cell_width // 32)
    font = ImageFont.load_default(size=max(13, cell_width // 12))
    line = round(1.6 * font.size)  # type: ignore[union-attr]
    full_width = 4 * cell_width + 5 * gap
    room = full_width - 2 * gap
    above = _wrapped(printable(title), font, room)
    below = [
        *_wrapped(_channel_note(channels), font, room),
        *_wrapped(printable(note), font, room),
    ]
    top = line * (len(above) + 1)  # of the first row

    picture = Image.new(
        "RGB",
        (
            full_width,
            top + num_images * (cell_height + gap) + (line * len(below) or gap // 2),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(above):
        place = (gap, line * number + line // 2)
        draw.text(place, text, fill=_INK, font=font, anchor="lm")
    grey = original.masked_fill(masked.to(original.device), MASKED_GREY)
    columns = (original, grey, pasted, pasted)
    visible = _to_masks(~masked, scale)
    nothing = _checkerboard((cell_width, cell_height))
    for column, (caption, images) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = gap + column * (cell_width + gap)
        middle = (left + cell_width // 2, top - line // 2)
        draw.text(middle, caption, fill=_INK, font=font, anchor="mm")
        for row, cell in enumerate(_to_pictures(images)):
            cell = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            if caption == "prediction":
                cell.paste(nothing, mask=visible[row])
            picture.paste(cell, (left, top + row * (cell_height + gap)))
    for number, text in enumerate(below):
        place = (gap, picture.height - line * (len(below) - number) + line // 2)
        draw.text(place, text, fill=_INK, font=font, anchor="lm")
    if path is not None:
        layout = {
            "left": gap,
            "top": top,
            "gap": gap,
            "cell": [cell_width, cell_height],
            "rows": num_images,
            "title": title,
            "note": note,
        }
        info = PngInfo()
        info.add_itxt(LAYOUT_KEY, json.dumps(layout))
        with atomic_write(path) as temporary:
            picture.save(temporary, format="PNG", optimize=True, pnginfo=info)
    return picture


def _wrapped(text: str, font: Font, room: int) -> list[str]:
    """Returns a text as lines of at most so many pixels."""
    if not text:
        return []
    width = max(font.getlength(text) / len(text), 1.0)  # of a character
    characters = max(int(room / width), 8)
    while True:
        lines = textwrap.wrap(text, characters)
        if characters <= 8 or max(map(font.getlength, lines)) <= room:
            return lines
        characters -= 1


def _checkerboard(size: tuple[int, int]) -> Image.Image:
    width, height = size
    x = torch.arange(width) // _CHECKER_SIDE
    y = torch.arange(height)[:, None] // _CHECKER_SIDE
    colours = torch.tensor(_CHECKER, dtype=torch.uint8)
    return Image.fromarray(colours[(x + y) % 2].numpy())


def _to_masks(chosen: Tensor, scale: int) -> list[Image.Image]:
    """Returns masks for `Image.paste`, enlarged."""
    pixels = chosen[:, 0].cpu().to(torch.uint8).mul(255).numpy()
    return [
        Image.fromarray(mask).resize(
            (mask.shape[1] * scale, mask.shape[0] * scale), Image.Resampling.NEAREST
        )
        for mask in pixels
    ]


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
            f"{tuple(original.shape)}. Both need the same shape."
        )
    if not bool(images.isfinite().all()):
        raise ValueError(f"The {caption} images hold NaN or infinite values.")
