"""SimMIM: put mask tokens in place of patches, encode all, regress the masked pixels.

- [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886

Shapes: B images, C channels, N cells (output tokens of the encoder) of (p, q) pixels,
K of them predicted, D = p * q * C values each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from lightly.models.utils import get_at_index
from torch import Tensor, nn

from lightly_mim.encoders import Encoder, MaskedEncoder, masked_encoder
from lightly_mim.losses import LossName, check_loss_name, masked_loss
from lightly_mim.masking import RandomMasking, expand_mask, split_index
from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.optim import Recipe
from lightly_mim.patches import Size, grid_size, patchify
from lightly_mim.targets import LocallyNormalizedPixels, Pixels
from lightly_mim.transforms import SimMIMTransform


class SimMIM(MaskedImageModel):
    """SimMIM, a simple framework for masked image modelling.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886

    Attributes:
        encoder:
            The encoder, with a mask token.
        head:
            One linear layer from a token to the pixels of its cell (section 3.3).

    Args:
        encoder:
            timm name or timm module of a VisionTransformer, Beit, Eva, SwinTransformer
            or SwinTransformerV2, or a `MaskedEncoder`.
        img_size:
            Side of the images in pixels or (height, width). None for the encoder's own.
        in_chans:
            Number of image channels.
        mask_patch_size:
            Side in pixels, or (height, width), of the blocks that are masked as a whole
            (section 3.2: 32, whatever the encoder's patch size).
        mask_ratio:
            Share of blocks that is masked (section 3.2: 0.6).
        loss:
            'l1' (section 3.4), 'l2' or 'smooth_l1' (table 5).
        region:
            'masked' predicts the masked pixels only (section 3.4). 'all' predicts every
            pixel, which the paper found worse (section 4.1.4).
        norm_target_window:
            Side in pixels of the window that the target is normalised in, 47 for
            SwinV2. None predicts the normalised pixels themselves, as the paper.
        encoder_options:
            Further options of the encoder: see `lightly_mim.encoders.masked_encoder`.

    Raises:
        ValueError: If an argument is out of range or the encoder is not supported.

    Examples:
        >>> model = SimMIM("vit_tiny_patch16_224", img_size=64)
        >>> model(torch.randn(2, 3, 64, 64)).prediction.shape
        torch.Size([2, 12, 768])
    """

    def __init__(
        self,
        encoder: Encoder,
        img_size: Size | None = None,
        in_chans: int = 3,
        mask_patch_size: Size = 32,
        mask_ratio: float = 0.6,
        loss: LossName = "l1",
        region: Literal["masked", "all"] = "masked",
        norm_target_window: int | None = None,
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        check_loss_name(loss)
        if region not in ("masked", "all"):
            raise ValueError(f"The region is 'masked' or 'all', got {region!r}.")
        if isinstance(encoder, str):
            # timm builds Swin with 0.1; the reference pretrains it without, and the ViT
            # with 0.1, which its recipe sets.
            encoder_options = {"drop_path_rate": 0.0} | encoder_options
        self.encoder: MaskedEncoder = masked_encoder(
            encoder, img_size=img_size, in_chans=in_chans, **encoder_options
        )
        self.encoder.add_mask_token()
        self.masking = RandomMasking(mask_patch_size, mask_ratio)
        self.target = (
            Pixels()
            if norm_target_window is None
            else LocallyNormalizedPixels(norm_target_window)
        )
        self.loss: LossName = loss
        self.region = region
        # The reference's 1 x 1 convolution and pixel shuffle, with its initialisation,
        # which is PyTorch's default; only the order of the outputs differs.
        cell_values = math.prod(self.encoder.stride) * self.encoder.in_chans
        self.head = nn.Linear(self.encoder.embed_dim, cell_values)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        num_masked: int | None = None,
    ) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        mask, num_masked = self.prepare_mask(images, mask, num_masked)

        tokens = self.encoder.encode_masked(images, mask)  # section 3.1
        tokens = tokens[:, -self._num_cells(images) :]  # the cells alone

        index, weight = self._cells_to_predict(images, mask, num_masked)
        if index.shape[1] < tokens.shape[1]:
            tokens = get_at_index(tokens, index)
        prediction = self.head(tokens)  # section 3.3
        target = self.target(images, index, self.encoder.stride)  # section 3.4
        loss = masked_loss(prediction, target, weight, self.loss)
        return MIMOutput(loss, prediction, target, index, weight, mask)

    def transform(
        self, normalize: dict[str, tuple[float, ...]] | None = None, **options: Any
    ) -> SimMIMTransform:
        """Returns the paper's augmentation at the encoder's image size.

        Args:
            normalize:
                Mean and standard deviation per channel, None for uint8 images.
            options:
                Further arguments of `SimMIMTransform`.
        """
        return SimMIMTransform(
            input_size=self.encoder.img_size, normalize=normalize, **options
        )

    def _num_cells(self, images: Tensor) -> int:
        size = (images.shape[-2], images.shape[-1])
        return math.prod(grid_size(size, self.encoder.stride, "the encoder's stride"))

    def _cells_to_predict(
        self, images: Tensor, mask: Tensor, num_masked: int
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the index (B, K) of the cells and the weight (B, K, D) of pixels."""
        size = (images.shape[-2], images.shape[-1])
        grid = grid_size(size, self.encoder.stride, "the encoder's stride")
        all_cells = torch.arange(math.prod(grid), device=images.device)
        all_cells = all_cells.expand(len(images), -1)
        if self.region == "all":
            return all_cells, None
        if grid[0] % mask.shape[1] == 0 and grid[1] % mask.shape[2] == 0:
            # Every cell is wholly masked or wholly visible.
            cells = expand_mask(mask, grid)
            num_cells = num_masked * math.prod(grid) // mask[0].numel()
            return split_index(cells, num_cells)[0], None
        pixels = expand_mask(mask, size)[:, None].expand_as(images)
        return all_cells, patchify(pixels, self.encoder.stride).to(images.dtype)


# Section 4.1.1 and appendix A of the paper, with the values of the configuration files
# that its code was published with where the paper is silent. Rates are per 512 images
# and every run has 2048 in a step. All encoders see 192 pixels except the ViT.
_SWIN = Recipe(
    source="microsoft/SimMIM, configs/swin_base__100ep",
    encoder="swin_base_patch4_window7_224",
    encoder_options={"window_size": 6},
    img_size=192,
    epochs=100,
    batch_size=2048,
    lr=2e-4,
    lr_batch_size=512,
    warmup_epochs=10,
    warmup_lr=1e-6,
    min_lr=1e-5,
    schedule="cosine",
    betas=(0.9, 0.999),
    weight_decay=0.05,
    clip_grad=5.0,
    drop_path=0.0,
    min_scale=0.67,
)
# 800 epochs: half the rate, and one step down by ten at epoch 700 instead of a cosine.
_SWIN_800 = dataclasses.replace(
    _SWIN,
    source="microsoft/SimMIM, configs/swin_base__800ep",
    epochs=800,
    lr=1e-4,
    warmup_lr=5e-7,
    min_lr=0.0,
    schedule="step",
    step_epochs=(700,),
    step_factor=0.1,
)

SimMIM.recipes = {
    "swin_base_100ep": _SWIN,
    "swin_base_800ep": _SWIN_800,
    "swin_large_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/SimMIM, configs/swin_large__800ep",
        encoder="swin_large_patch4_window12_384",
        encoder_options={"window_size": 12},
    ),
    "vit_base_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/SimMIM, configs/vit_base__800ep",
        encoder="beit_base_patch16_224",
        # One table of relative positions for all blocks, no absolute positions, layer
        # scale 0.1, a norm in front of the head.
        encoder_options={
            "use_shared_rel_pos_bias": True,
            "use_rel_pos_bias": False,
            "use_abs_pos_emb": False,
            "use_fc_norm": False,
            "init_values": 0.1,
        },
        img_size=224,
        drop_path=0.1,
        # The reference exempts the mask token of Swin from weight decay, not the ViT's.
        decay_mask_token=True,
    ),
    "swinv2_base_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/Swin-Transformer, configs/simmim: swinv2_base, 800ep",
        encoder="swinv2_base_window12_192",
        encoder_options={},
        method_options={"norm_target_window": 47},
        drop_path=0.1,
    ),
}
