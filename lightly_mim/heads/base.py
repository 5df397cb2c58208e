"""What every head is, and the linear, MLP and transformer ones.

Shapes: B images, N cells on a grid (h, w), K of them predicted, D the encoder's width,
V values per cell.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial

from lightly.models.utils import get_at_index
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from lightly_mim.arguments import PositiveInt
from lightly_mim.config import Recorded


class Head(Recorded, ABC):
    """A kind of head. On the command line, one of one's own is a subclass of this."""

    @abstractmethod
    def __call__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        per_pixel: bool = False,
    ) -> nn.Module:
        """Builds the head.

        Args:
            embed_dim:
                Size of the encoder's tokens.
            num_values:
                How many values are predicted for a cell.
            cell_size:
                (height, width) of a cell in pixels.
            grid:
                How many cells lie along (height, width) of the images.
            per_pixel:
                Whether the values are those of the cell's pixels, as many for each of
                them and in the order of `lightly_mim.patches`.

        Returns:
            A module that takes the tokens of all cells, with shape (batch_size,
            num_cells, embed_dim) and in raster order, how many of them lie along
            (height, width), and an index of those to predict, int64 with shape
            (batch_size, num_predicted) or None for all. It returns a float tensor with
            shape (batch_size, num_predicted, num_values).

        Raises:
            ValueError: If the head cannot be built for that width, cell or grid.
        """


class LinearHead(Head):
    """One linear layer from a token to the values of its cell (SimMIM, section 3.3).

    SimMIM's reference code writes it as a 1 x 1 convolution and a pixel shuffle, with
    PyTorch's default initialisation, which it has here, too; only the order of the
    outputs differs.
    """

    def __call__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        per_pixel: bool = False,
    ) -> nn.Module:
        """Builds the layer, see `Head`."""
        return _Linear(embed_dim, num_values)


class _Linear(nn.Linear):
    def forward(  # type: ignore[override]
        self, tokens: Tensor, grid: tuple[int, int], index: Tensor | None = None
    ) -> Tensor:
        """Predicts the indexed cells, see `Head`."""
        return super().forward(take(tokens, index))


class MLPHead(Head):
    """Two linear layers with a GELU between them (SimMIM, section 4.1.2).

    Like the linear head it sees one token at a time, and begins with PyTorch's default
    initialisation.

    Args:
        hidden_dim:
            Width between the two layers. None for that of the encoder's tokens, which
            is what the paper's count of parameters says (from memory: 90.9 million
            where the linear head makes 89.9).

    Raises:
        ValueError: If the width is out of range.
    """

    def __init__(self, hidden_dim: PositiveInt | None = None) -> None:
        self.hidden_dim = hidden_dim

    def __call__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        per_pixel: bool = False,
    ) -> nn.Module:
        """Builds the layers, see `Head`."""
        return _MLP(embed_dim, self.hidden_dim, num_values)


class _MLP(Mlp):
    def forward(  # type: ignore[override]
        self, tokens: Tensor, grid: tuple[int, int], index: Tensor | None = None
    ) -> Tensor:
        """Predicts the indexed cells, see `Head`."""
        prediction: Tensor = super().forward(take(tokens, index))  # type: ignore[no-untyped-call]
        return prediction


class TransformerHead(Head):
    """Transformer blocks over the tokens of all cells, a norm and a linear layer.

    The blocks are timm's of a ViT (norms first, an MLP of four times the width) with
    timm's initialisation: weights of deviation 0.02, biases of zero. The cells attend
    to each other as in MAE's decoder, but no positions are added: the encoder has seen
    masked cells too, so that every token knows its own.

    Args:
        depth:
            Number of blocks, at least 1.
        num_heads:
            Number of attention heads, a divisor of the width. None for heads of 64
            channels or, where 64 does not divide the width, of the highest power of 2
            that does.
        embed_dim:
            Width of the blocks. A linear layer in front leads to one that is not the
            encoder's. None for the encoder's.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        depth: PositiveInt = 1,
        num_heads: PositiveInt | None = None,
        embed_dim: PositiveInt | None = None,
    ) -> None:
        self.depth = depth
        self.num_heads = num_heads
        self.embed_dim = embed_dim
        if embed_dim is not None:
            resolve_num_heads(embed_dim, num_heads, 64)

    def __call__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        per_pixel: bool = False,
    ) -> nn.Module:
        """Builds the blocks, see `Head`.

        Raises:
            ValueError: If the number of heads does not divide the width.
        """
        width = self.embed_dim or embed_dim
        num_heads = resolve_num_heads(width, self.num_heads, 64)
        return _Transformer(embed_dim, width, self.depth, num_heads, num_values)


class _Transformer(nn.Module):
    def __init__(
        self, embed_dim: int, width: int, depth: int, num_heads: int, num_values: int
    ) -> None:
        super().__init__()
        self.embed = to_width(embed_dim, width)
        blocks = [Block(width, num_heads, qkv_bias=True) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(width)
        self.output = nn.Linear(width, num_values)
        initialize(self)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], index: Tensor | None = None
    ) -> Tensor:
        """Predicts the indexed cells, see `Head`."""
        x = self.blocks(self.embed(tokens))
        prediction: Tensor = self.output(self.norm(take(x, index)))
        return prediction


def take(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Returns the indexed tokens, all of them if there is no index."""
    return tokens if index is None else get_at_index(tokens, index)


def to_width(embed_dim: int, width: int) -> nn.Module:
    """Returns a linear layer to another width, or the identity."""
    return nn.Identity() if embed_dim == width else nn.Linear(embed_dim, width)


def initialize(head: nn.Module) -> None:
    """Gives linear layers the weights that timm gives those of a ViT or a Swin."""
    head.apply(partial(init_weights_vit_timm, needs_reset=False))


def resolve_num_heads(width: int, num_heads: int | None, head_dim: int) -> int:
    """Returns the number of heads, by default of `head_dim`, a power of 2, channels."""
    if num_heads is None:
        return width // math.gcd(width, head_dim)
    if width % num_heads:
        raise ValueError(
            f"The number of attention heads divides the width of the head, got "
            f"{num_heads} heads for a width of {width}. Leave num_heads out to have "
            f"{width // math.gcd(width, head_dim)}."
        )
    return num_heads
