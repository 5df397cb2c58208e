"""Any supported timm backbone behind lightly's MaskedVisionTransformer interface."""

from lightly_mim.encoders.base import MaskedEncoder, masked_encoder, pool_tokens

__all__ = ["MaskedEncoder", "masked_encoder", "pool_tokens"]
