"""MAE's ablation with mask tokens in the encoder, slower and worse (table 1c).

- [0]: MAE, 2021, https://arxiv.org/abs/2111.06377
"""

from __future__ import annotations

from typing import Any, cast

from lightly.models.utils import get_at_index
from torch import Tensor

from lightly_mim.decoders import MAEDecoder
from lightly_mim.encoders import Encoder
from lightly_mim.losses import masked_loss
from lightly_mim.masking import Mask
from lightly_mim.methods.base import MIMOutput
from lightly_mim.methods.mae import MAE


class MaskTokenMAE(MAE):
    """MAE whose encoder sees mask tokens in place of the masked patches.

    The decoder gets what becomes of them instead of mask tokens of its own.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (table 1c)

    Args:
        encoder:
            See `MAE`.
        options:
            Further arguments of `MAE`.
    """

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.encoder.add_mask_token()
        self.decoder.mask_token.requires_grad_(False)  # without a use

    def forward(self, images: Tensor, mask: Mask | Tensor | None = None) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        grid = self.encoder.input_grid(images)
        mask = self.prepare_mask(images, mask)
        patches = mask.on(grid)
        _, idx_mask = patches.token_index(self.encoder.num_prefix_tokens)

        decoder = cast(MAEDecoder, self.decoder)
        encoded = self.encoder.encode_masked(images, patches)
        tokens = self.decoder_embed(encoded)
        tokens = decoder.decode(tokens + decoder.positions(grid))
        prediction = self.head(get_at_index(tokens, idx_mask))

        index, _ = patches.index()
        target = self.target(images, index, self.encoder.patch_size)
        loss = masked_loss(
            prediction, target, self.loss, num_classes=self.target.num_classes
        )
        features = self.encoder.pool_encoded(encoded)
        return MIMOutput(loss, prediction, target, index, None, mask, features)
