"""From the tokens of an image to one feature."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Pool = Literal["mean", "cls", "cls+mean"]
AnyPool = Pool | Literal["tokens"]  # all patch tokens: not pooled at all
_POOLS: tuple[str, ...] = get_args(Pool)  # which compiled code cannot ask for


def pool_tokens(
    tokens: Tensor, num_prefix_tokens: int, pool: AnyPool = "mean"
) -> Tensor:
    """Makes one feature of the tokens of an image.

    Args:
        tokens:
            Tensor with shape (batch_size, num_tokens, dim), prefix tokens first.
        num_prefix_tokens:
            Number of class and register tokens.
        pool:
            "mean" of the patch tokens, "cls" for the class token, "cls+mean" for both,
            one behind the other, or "tokens" for the patch tokens as they are.

    Returns:
        Tensor with shape (batch_size, dim), (batch_size, 2 * dim) for "cls+mean", or
        (batch_size, num_patches, dim) for "tokens".

    Raises:
        ValueError: If there is no such pool, or no prefix token to take.
    """
    if pool == "tokens":
        return tokens[:, num_prefix_tokens:]
    check_pool(pool)
    mean = tokens[:, num_prefix_tokens:].mean(dim=1)
    if pool == "mean":
        return mean
    if num_prefix_tokens == 0:
        raise ValueError(
            f"The pool '{pool}' takes the class token, and there is none. Use 'mean'."
        )
    cls = tokens[:, 0]
    return cls if pool == "cls" else torch.cat([cls, mean], dim=-1)


def check_pool(pool: str) -> None:
    """Raises a ValueError if there is no such pool."""
    if pool not in _POOLS:
        raise ValueError(f"pool is one of {', '.join(_POOLS)}, got '{pool}'.")


def timm_pooling(model: nn.Module) -> str:
    """Returns what timm's `global_pool` says of a model, "" if it says nothing."""
    head: Any = getattr(model, "head", None)
    for owner in (head, model):
        pool = getattr(owner, "global_pool", None)
        if pool is not None:
            return str(getattr(pool, "pool_type", pool))
    return ""
