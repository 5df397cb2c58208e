"""CrossMAE: masked patches look at the visible ones alone, so a part of them suffices.

- [0]: CrossMAE, 2024, https://arxiv.org/abs/2401.14391

Shapes: B images, P prefix tokens, V visible and K predicted patches, L layers of the
encoder of width E.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lightly_mim.arguments import Share
from lightly_mim.decoders import CrossAttentionDecoder, MAEDecoder
from lightly_mim.encoders import Encoder
from lightly_mim.losses import masked_loss
from lightly_mim.masking import Mask
from lightly_mim.methods.base import MIMOutput
from lightly_mim.methods.mae import MAE


class CrossMAE(MAE):
    """MAE with a decoder of cross-attention, which predicts a part of what is masked.

    - [0]: CrossMAE, 2024, https://arxiv.org/abs/2401.14391

    Attributes:
        decoder:
            The transformer in which mask tokens attend to visible tokens alone.

    Args:
        encoder:
            See `MAE`.
        predict_ratio:
            Share of the masked patches that is predicted in a training step, drawn
            anew each time (section 3; 1 / 3 of 75 % masked patches are the 25 % there).
            Without gradients or in evaluation mode all of them are predicted.
        weighted_feature_maps:
            Whether each block of the decoder attends to its own learned sum of the
            encoder's layers (section 3) or to the last one.
        options:
            Further arguments of `MAE`.

    Raises:
        ValueError: See `MAE`; also if predict_ratio is out of range.

    Examples:
        >>> import torch
        >>> model = CrossMAE("vit_tiny_patch16_224", img_size=64)
        >>> model(torch.randn(2, 3, 64, 64)).prediction.shape
        torch.Size([2, 4, 768])
    """

    decoder: CrossAttentionDecoder

    def __init__(
        self,
        encoder: Encoder,
        predict_ratio: Share = 1 / 3,
        weighted_feature_maps: bool = True,
        **options: Any,
    ) -> None:
        # MAE's constructor makes the decoder, which depends on it.
        self.weighted_feature_maps = weighted_feature_maps
        super().__init__(encoder, **options)
        self.predict_ratio = predict_ratio
        self._share = Fraction(str(predict_ratio)).as_integer_ratio()

    def _make_decoder(
        self, dim: int, depth: int, num_heads: int
    ) -> tuple[nn.Module, MAEDecoder | CrossAttentionDecoder]:
        """Returns the identity, as the decoder takes the encoder's width, and it."""
        return nn.Identity(), CrossAttentionDecoder(
            self.encoder.grid,
            self.encoder.embed_dim,
            dim,
            depth,
            num_heads,
            self.encoder.num_prefix_tokens,
            self.encoder.num_layers if self.weighted_feature_maps else None,
        )

    def forward(self, images: Tensor, mask: Mask | Tensor | None = None) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        grid, num_prefix = (
            self.encoder.input_grid(images),
            self.encoder.num_prefix_tokens,
        )
        mask = self.prepare_mask(images, mask)
        patches = mask.on(grid)
        idx_keep, idx_mask = patches.token_index(num_prefix)
        if self.predict_ratio < 1 and self.training and torch.is_grad_enabled():
            idx_mask = _draw_share(idx_mask, *self._share)

        layers: list[Tensor] = []
        encoded = self.encoder.encode_visible(images, patches, layers)  # (B, P + V, E)
        tokens = encoded
        if self.weighted_feature_maps:
            tokens = torch.stack(
                [*layers[:-1], encoded]
            )  # (L, ...), the last normalised
        tokens = self.decoder.decode_masked(tokens, idx_keep, idx_mask, grid)
        prediction = self.head(tokens)

        index = idx_mask - num_prefix
        target = self.target(images, index, self.encoder.patch_size)
        loss = masked_loss(
            prediction, target, self.loss, num_classes=self.target.num_classes
        )
        features = self.encoder.pool_encoded(encoded)
        return MIMOutput(loss, prediction, target, index, None, mask, features)


def _draw_share(index: Tensor, numerator: int, denominator: int) -> Tensor:
    """Draws a share of the tokens (B, K) of each image, rounded up, in their order."""
    count = -(-index.shape[1] * numerator // denominator)
    noise = torch.rand(index.shape, device=index.device)
    chosen = noise.argsort(dim=1)[:, :count].sort(dim=1).values
    return index.gather(1, chosen)
