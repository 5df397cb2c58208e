"""Our own settings, for the encoder and the images at hand, where nobody chose.

The published ones are the methods' `recipes`: ViT-B, 1.28 million images, 800 epochs.
Those here are for the thousands of pictures and the small encoders that they are too
slow for. Each choice is one function with what it was measured on in its docstring;
`benchmarks/defaults.py` repeats the measurements, `pretrain` prints what they chose.
"""

from __future__ import annotations

import math
from typing import Any

from lightly_mim.encoders import Encoder, Init, MaskedEncoder, can_drop_tokens
from lightly_mim.optim import Recipe

SOURCE = "lightly_mim.defaults"


def initialization(encoder: Encoder) -> Init:
    """Returns the law of an encoder's initial weights.

    MAE's for a ViT: Xavier uniform with fixed sine-cosine positions. timm's normal of
    0.02 with learned positions, which have to be found first, began lower and ended
    lower on each of the sets. A Swin, which has no positions to find, stays timm's.

    Args:
        encoder:
            timm's name of the encoder or a module, see `masked_encoder`.
    """
    return "mae" if can_drop_tokens(encoder) else "timm"


def mask_unit(
    img_size: tuple[int, int], patch_size: tuple[int, int]
) -> tuple[int, int]:
    """Returns the block that SimMIM masks as a whole, in proportion to the image.

    SimMIM's 32 pixels are a sixth of its 192 pixels and a seventh of its 224. This is
    the multiple of the patch that divides the image and comes nearest to that share,
    with three blocks along a side or more where the patches allow it.

    Args:
        img_size:
            (height, width) of the images in pixels.
        patch_size:
            (height, width) of the encoder's patches in pixels.

    Returns:
        (height, width) in pixels; 32 x 32 at the paper's sizes.
    """
    wanted = min(img_size) / math.sqrt(6 * 7)

    def unit(side: int, patch: int) -> int:
        fitting = [each for each in range(patch, side + 1, patch) if side % each == 0]
        enough = [each for each in fitting if side >= 3 * each]
        return min(
            enough or fitting or [patch], key=lambda each: abs(math.log(each / wanted))
        )

    return unit(img_size[0], patch_size[0]), unit(img_size[1], patch_size[1])


# Share of the variance of all pixels that lies between the means of the pictures.
SAME_BRIGHTNESS = 0.05


def target_window(img_size: tuple[int, int]) -> int:
    """Returns the window in pixels that SimMIM's target is normalised in.

    Plain pixels make the model learn first how bright pictures are as a whole. SwinV2
    normalises each pixel in a window of 47 of 192 pixels; this is the same share. It
    was ahead of plain pixels and of pixels normalised in their patch on each set.

    Args:
        img_size:
            (height, width) of the images in pixels.

    Returns:
        An odd number of at least 3; 47 at 192 pixels.
    """
    return max(2 * round((min(img_size) * 47 / 192 - 1) / 2) + 1, 3)


def decoder_size(embed_dim: int, depth: int) -> tuple[int, int]:
    """Returns (width, depth) of MAE's decoder, in proportion to the encoder.

    MAE's 512 and 8 are two thirds of ViT-B's 768 and 12 (table 1, a and b). Behind a
    ViT of 192 and 6 they would cost 20 times as much as the encoder.

    Args:
        embed_dim:
            Width of the encoder.
        depth:
            Number of the encoder's blocks.

    Returns:
        Two thirds of both, the width a multiple of 32; 512 and 8 at most.
    """
    width = 32 * max(round(embed_dim * 2 / 3 / 32), 1)
    return min(width, 512), min(max(round(depth * 2 / 3), 1), 8)


def num_heads(width: int) -> int:
    """Returns the number of attention heads of a decoder: of 32 values or more each.

    Args:
        width:
            Width of the decoder. With MAE's 512 they are 16, as in its code.
    """
    heads = range(max(width // 32, 1), 0, -1)
    return next(each for each in heads if width % each == 0)


def method(
    num_images: int, side: int, grey: bool, gpu: bool
) -> tuple[str, dict[str, Any]]:
    """Returns method and encoder for a data set and a machine.

    Args:
        num_images:
            How many pictures there are.
        side:
            The median of their shorter sides in pixels.
        grey:
            Whether they have one channel.
        gpu:
            Whether there is a GPU.

    Returns:
        (name of the method, its options).
    """
    options: dict[str, Any] = {"in_chans": 1 if grey else 3}
    if gpu and side >= 160:
        large = num_images >= 500_000
        encoder = "vit_base_patch16_224" if large else "vit_small_patch16_224"
        return "MAE", {"encoder": encoder, "img_size": 224, **options}
    along = 14 if gpu else 8  # patches: as many tokens as two cores can afford
    patch_size = min(max(round(side / along), 1), 16)
    img_size = min(side // patch_size, along) * patch_size
    options |= {"img_size": img_size, "patch_size": patch_size}
    if gpu:
        return "MAE", {"encoder": "vit_small_patch16_224", **options}
    small = {"embed_dim": 192, "depth": 6, "num_heads": 6}
    return "SimMIM", {"encoder": "vit_tiny_patch16_224", **options, **small}


def recipe(
    encoder: MaskedEncoder,
    num_images: int | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    min_scale: float = 0.67,
) -> Recipe:
    """Returns the settings of a run: AdamW, a tenth of warm-up, and a cosine to zero.

    Args:
        encoder:
            The encoder.
        num_images:
            Number of training images, None if it is not known.
        batch_size:
            Images per optimiser step if that is decided.
        epochs:
            Passes over the images if that is decided.
        betas:
            AdamW's betas.
        min_scale:
            Smallest share of an image that a crop covers.
    """
    num_images = 10_000 if num_images is None else num_images
    batch_size = batch_size or images_per_step(num_images)
    epochs = epochs or passes(num_images)
    return Recipe(
        source=SOURCE,
        encoder=encoder.name or type(encoder).__name__,
        img_size=max(encoder.img_size),
        epochs=epochs,
        batch_size=batch_size,
        lr=learning_rate(encoder.embed_dim),
        lr_batch_size=batch_size,
        warmup_epochs=epochs / 10,
        schedule="cosine",
        cosine_from_warmup=True,
        betas=betas,
        weight_decay=0.05,
        clip_grad=5.0,
        min_scale=min_scale,
    )


def images_per_step(num_images: int) -> int:
    """Returns the batch size, about the root of the number of images.

    Few images make few steps, and steps are what a short run lacks: of 16,000 images
    of MNIST in batches of 64, MAE learned nothing, and in batches of 16 it was 20
    points ahead of its start.

    Args:
        num_images:
            Number of training images.

    Returns:
        A power of two, from 8 to 256, or the number of images if that is less.
    """
    power = int(math.log2(num_images) / 2)
    return int(min(max(2**power, 8), 256, num_images))


def passes(num_images: int) -> int:
    """Returns the number of epochs: 100,000 images, 20 epochs at least, 400 at most.

    Args:
        num_images:
            Number of training images.
    """
    return min(max(round(100_000 / max(num_images, 1)), 20), 400)


def learning_rate(embed_dim: int) -> float:
    """Returns the highest learning rate.

    1e-3 for encoders of up to 192 values, where half and twice as much were level or
    behind. It falls in proportion to larger widths, where nothing was measured here:
    ViT-B gets 2.5e-4, and MAE's rule 1.5e-4 for a batch of 256.

    Args:
        embed_dim:
            Width of the encoder.
    """
    return 1e-3 * min(192 / embed_dim, 1)
