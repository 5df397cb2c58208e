"""Square blocks of pixels within a cell: counted, averaged, drawn.

Shapes: K cells of (p, q) pixels in the order of `lightly_mim.patches`, blocks of
(f, f) pixels of which (p / f, q / f) tile a cell, C channels.
"""

from __future__ import annotations

from torch import Tensor

from lightly_mim.targets.base import at_least_float32


def count_blocks(
    cell_size: tuple[int, int], factor: int, name: str = "factor"
) -> tuple[int, int]:
    """Returns how many blocks lie along the (height, width) of a cell.

    Args:
        cell_size:
            (height, width) of a cell in pixels.
        factor:
            Side of a block in pixels.
        name:
            What the side is called in the error message.

    Raises:
        ValueError: If the blocks do not tile the cell.
    """
    height, width = cell_size
    if height % factor or width % factor:
        raise ValueError(
            f"A cell of {height} x {width} pixels does not divide into blocks of "
            f"{factor} x {factor} ({name}={factor}): choose a {name} that divides the "
            "cell."
        )
    return height // factor, width // factor


def average_blocks(
    patches: Tensor, cell_size: tuple[int, int], factor: int, name: str = "factor"
) -> Tensor:
    """Averages the pixels of each block.

    Args:
        patches:
            Float tensor with shape (batch_size, num_cells, cell_height * cell_width *
            channels).
        cell_size:
            (height, width) of a cell in pixels.
        factor:
            Side of a block in pixels. 1 returns the patches as they are.
        name:
            What the side is called in the error message.

    Returns:
        Float tensor with shape (batch_size, num_cells, cell_height / factor *
        cell_width / factor * channels), half precision in float32.

    Raises:
        ValueError: If the blocks do not tile the cell.
    """
    rows, columns = count_blocks(cell_size, factor, name)
    if factor == 1:
        return patches
    shape = (*patches.shape[:-1], rows, factor, columns, factor, -1)
    return at_least_float32(patches).reshape(shape).mean(dim=(-4, -2)).flatten(-3)


def repeat_blocks(values: Tensor, cell_size: tuple[int, int], factor: int) -> Tensor:
    """Gives each pixel of a block its value, the picture of what was averaged.

    Args:
        values:
            Tensor with shape (batch_size, num_cells, cell_height / factor * cell_width
            / factor * channels).
        cell_size:
            (height, width) of a cell in pixels.
        factor:
            Side of a block in pixels. 1 returns the values as they are.

    Returns:
        Tensor with shape (batch_size, num_cells, cell_height * cell_width * channels).

    Raises:
        ValueError: If the blocks do not tile the cell.
    """
    rows, columns = count_blocks(cell_size, factor)
    if factor == 1:
        return values
    blocks = values.reshape(*values.shape[:-1], rows, 1, columns, 1, -1)
    return blocks.expand(-1, -1, -1, factor, -1, factor, -1).flatten(-5)
