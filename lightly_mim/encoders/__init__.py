"""Any supported timm backbone behind one contract, `MaskedEncoder`."""

from lightly_mim.encoders.attention import choose_attention
from lightly_mim.encoders.base import MaskedEncoder
from lightly_mim.encoders.build import (
    Encoder,
    UnsupportedModelError,
    can_drop_tokens,
    masked_encoder,
    resize_encoder,
)
from lightly_mim.encoders.fitting import fit_encoder
from lightly_mim.encoders.initialization import Init
from lightly_mim.encoders.pooling import AnyPool, Pool, pool_tokens

__all__ = [
    "AnyPool",
    "Encoder",
    "Init",
    "MaskedEncoder",
    "Pool",
    "UnsupportedModelError",
    "can_drop_tokens",
    "choose_attention",
    "fit_encoder",
    "masked_encoder",
    "pool_tokens",
    "resize_encoder",
]
