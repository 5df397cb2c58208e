"""CUDA alone: the checklist of a training step on NVIDIA's GPUs, and who sees to it.

- Pinned memory: `lightly_mim.data.KeyedLoader` pins its batches where there is CUDA.
- Non-blocking copies: Lightning's, of pinned uint8 batches; normalised on the device.
- No waiting: nothing in a step reads a value of the device. Loss and gradient are
  checked when something is logged or saved (`TrainingModule.check_finite`).
- bfloat16: `computes_bf16`; Lightning's autocast, no scaler.
- float16: Lightning's autocast and gradient scaler, see `scales_gradients`.
- TF32: `float32_products`.
- Fused kernels: AdamW's, but for float16; attention's, see
  `lightly_mim.encoders.choose_attention`.
- NCCL: what Lightning takes for CUDA. One all-reduce of the gradient in a step.
- compile: in place (`module.compile()`), masks and augmentation stay outside.
- channels-last: of no use to a transformer, whose one convolution has no overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def computes_bf16() -> bool:
    """Returns whether the GPU has bfloat16, rather than PyTorch emulating it."""
    has: bool = torch.cuda.is_bf16_supported(including_emulation=False)
    return has


def scales_gradients(precision: str) -> bool:
    """Returns whether the loss is scaled for the range of float16.

    The scaler skips steps with infinite gradients. A fused optimiser would unscale them
    by itself, after they were clipped.

    Args:
        precision:
            Lightning's precision.
    """
    return precision == "16-mixed"


@contextmanager
def float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Computes float32 products in TF32 within mixed precision, and exactly elsewhere.

    TF32 has float16's 10 bits of mantissa, so next to autocast nothing is lost. In
    '32-true' PyTorch's default would take it for convolutions and not for matrices.

    Args:
        device:
            Where is computed. Nothing changes on other devices than CUDA's.
        precision:
            Lightning's precision.
    """
    if device.type != "cuda":
        yield
        return
    mixed = precision.endswith("mixed")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if mixed else "highest")
        torch.backends.cudnn.allow_tf32 = mixed
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
