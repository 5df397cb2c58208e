"""timm's `SwinTransformer` and `SwinTransformerV2`: windows on a shrinking grid."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lightly_mim.encoders.transformer import MaskedTransformer
from lightly_mim.patches import grid_size


class MaskedSwin(MaskedTransformer):
    """A timm `SwinTransformer` or `SwinTransformerV2` that encodes masked images.

    The input tokens are the patches behind the patch embedding and its norm, and there
    the mask token goes. The output tokens are the cells of the last stage, which are
    fewer: `stride` is `patch_size` times 2 for every stage after the first. The layers
    are the stages, the output of each with its own number of tokens and of dimensions.

    - [0]: Swin Transformer, 2021, https://arxiv.org/abs/2103.14030
    - [1]: Swin Transformer V2, 2021, https://arxiv.org/abs/2111.09883

    Raises:
        ValueError: If the windows do not tile the model's images.
    """

    def __init__(self, vit: nn.Module) -> None:
        stages = len(cast(Any, vit).layers)
        super().__init__(vit, stages, patches_per_cell=2 ** (stages - 1))
        if self.vit.patch_embed.strict_img_size:
            self._check_size(self.img_size)

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Embeds the images, see `MaskedTransformer.preprocess`.

        Raises:
            ValueError: Also if `idx_keep` is given.
        """
        if idx_keep is not None:
            raise ValueError(
                "idx_keep does not work here: window attention and patch merging need "
                "the full grid of tokens. Use encode_masked, which puts the mask token "
                "in place of masked patches."
            )
        return super().preprocess(images, idx_mask=idx_mask, mask=mask)

    def forward_intermediates(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        norm: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encodes images and returns the output of every stage, too.

        As in timm, `norm` applies the final norm to the output of the last stage, the
        only one that it is made for. See `MaskedTransformer.forward_intermediates`.

        Returns:
            The tokens that `encode` returns, and a list with one tensor per stage, with
            shape (batch_size, stage_height * stage_width, stage_dim).
        """
        tokens, stages = super().forward_intermediates(
            images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask
        )
        if norm:
            stages[-1] = tokens
        return tokens, stages

    def windows_at(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Returns the (height, width) of each stage's windows for another image size.

        They grow and shrink with the grid, as in fine-tuning after [0] and [1] (6 at
        192 pixels, 7 at 224). Where that gives no whole numbers they stay as they are,
        and may or may not tile the grid (7 at 448 pixels, 7 at 224).

        Args:
            size:
                (height, width) of the images in pixels.

        Raises:
            ValueError: If patches do not tile such images.
        """
        (old_h, old_w), (new_h, new_w) = self.grid, grid_size(size, self.patch_size)
        windows = [tuple(stage.blocks[0].window_size) for stage in self.vit.layers]
        if any(h * new_h % old_h or w * new_w % old_w for h, w in windows):
            return windows
        return [(h * new_h // old_h, w * new_w // old_w) for h, w in windows]

    def _blocks(self) -> list[nn.Module]:
        return [block for stage in self.vit.layers for block in stage.blocks]

    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        x = tokens.reshape(len(tokens), *grid, -1)
        for stage in self.vit.layers:
            x = stage(x)
            if intermediates is not None:
                intermediates.append(x.flatten(1, 2))
        return x.flatten(1, 2)

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises a ValueError where timm would pad the grid in silence."""
        super()._check_size(size)
        grid = grid_size(size, self.patch_size)
        if size[0] % self.stride[0] or size[1] % self.stride[1]:
            raise ValueError(
                f"Images of {size[0]} x {size[1]} pixels do not divide into the "
                f"{self.stride[0]} x {self.stride[1]} pixels of an output token. Use "
                f"an img_size that is a multiple of {self.stride}."
            )
        for index, stage in enumerate(self.vit.layers):
            height, width = grid[0] // 2**index, grid[1] // 2**index
            window = stage.blocks[0].window_size
            if height % window[0] or width % window[1]:
                raise ValueError(
                    f"Images of {size[0]} x {size[1]} pixels give stage {index + 1} a "
                    f"grid of {height} x {width} tokens, which windows of {window[0]} "
                    f"x {window[1]} do not tile. Use another img_size, or a "
                    f"window_size that fits: {_fitting_windows(grid, self.num_layers)}."
                )


def _fitting_windows(grid: tuple[int, int], num_stages: int) -> str:
    """Names the square windows that tile the grid of every stage.

    timm shrinks a window to the grid where the grid is smaller.
    """
    sides = [side // 2**stage for side in grid for stage in range(num_stages)]
    windows = [
        window
        for window in range(2, max(grid) + 1)
        if all(side <= window or side % window == 0 for side in sides)
    ]
    return ", ".join(map(str, windows))
