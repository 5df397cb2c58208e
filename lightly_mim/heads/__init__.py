"""From an encoder's tokens to the values of a target.

A head is built for an encoder and a target once both are known, `LinearHead()(384,
768, (16, 16), (14, 14))`, and is then a module that takes the tokens of all cells.
"""

from lightly_mim.heads.base import Head, LinearHead, MLPHead, TransformerHead
from lightly_mim.heads.inverse_swin import InverseSwinHead

__all__ = ["Head", "InverseSwinHead", "LinearHead", "MLPHead", "TransformerHead"]
