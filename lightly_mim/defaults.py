"""Our own settings, for the encoder and the images at hand, where nobody chose.

The published ones are the methods' `recipes`: ViT-B, 1.28 million images, 800 epochs.
Those here are for the thousands of pictures and the small encoders on which they train
to nothing. Each choice is one function, `pretrain` prints what they chose, and
`benchmarks/defaults.py` measures them (`--choice` its alternatives).

Figures in the docstrings are kNN / logistic accuracy in percent of the last layer, by
cross-validation on training images, after 24,000 images in batches of 32 with a ViT of
128 values and 4 blocks in 16 to 64 patches, one seed, so that differences of two points
mean nothing; they were found with an earlier form of that script. The sets are
scikit-learn's digits, 4,000 images of MNIST, 1,506 drawings in colour (emoji) and 1,968
solar cells at 64 pixels.
"""

from __future__ import annotations

import math
from typing import Any

from lightly_mim.encoders import Encoder, Init, MaskedEncoder, can_drop_tokens
from lightly_mim.optim import Recipe

SOURCE = "lightly_mim.defaults"


def initialization(encoder: Encoder) -> Init:
    """Returns the law of an encoder's initial weights.

    MAE's for a ViT: Xavier uniform with fixed sine-cosine positions. From timm's normal
    of 0.02 with learned positions, which have to be found first, SimMIM came to 38 / 49
    instead of 82 / 86 on digits, 35 / 36 instead of 49 / 65 on MNIST, 53 / 53 instead
    of 56 / 55 on drawings and 75 / 75 instead of 77 / 74 on solar cells. A Swin, which
    has no positions to find, was not measured and stays timm's.

    Args:
        encoder:
            timm's name of the encoder or a module, see `masked_encoder`.
    """
    return "mae" if can_drop_tokens(encoder) else "timm"


def mask_unit(img_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Returns the block that SimMIM masks as a whole, in proportion to the image.

    SimMIM's 32 pixels are a sixth of its 192 pixels and a seventh of its 224. This is
    the multiple of the stride that divides the image and comes nearest to that share,
    with three blocks along a side or more where the stride allows it. Of 8 x 8 patches
    that is one; blocks of 2 x 2 were level (57 / 53 against 56 / 55 on drawings, 77 /
    72 against 77 / 74 on solar cells).

    Args:
        img_size:
            (height, width) of the images in pixels.
        stride:
            (height, width) of the cell of an output token in pixels: a ViT's patch.

    Returns:
        (height, width) in pixels; 32 x 32 at the paper's sizes.
    """
    wanted = min(img_size) / math.sqrt(6 * 7)

    def unit(side: int, cell: int) -> int:
        fitting = [each for each in range(cell, side + 1, cell) if side % each == 0]
        enough = [each for each in fitting if side >= 3 * each]
        return min(
            enough or fitting or [cell], key=lambda each: abs(math.log(each / wanted))
        )

    return unit(img_size[0], stride[0]), unit(img_size[1], stride[1])


# Pictures whose means hold less than this share of the variance of all pixels count as
# equally bright, and SimMIM then predicts plain pixels: 0.01 on digits, where plain
# pixels came to 83 / 93 and normalised ones to 76 / 90 (16,000 images, all layers),
# 0.02 on MNIST, where neither had learned by then. Above are 0.13 on Fashion-MNIST,
# 0.22 on drawings and 0.5 on solar cells, where plain pixels came to 61 / 66 and
# normalised ones to 71 / 76 (README, the study).
SAME_BRIGHTNESS = 0.05


def target_window(img_size: tuple[int, int]) -> int:
    """Returns the window in pixels that SimMIM's target is normalised in.

    Plain pixels make the model learn first how bright pictures are as a whole. SwinV2
    normalises each pixel in a window of 47 of 192 pixels; this is the same share.
    Pixels normalised in their patch came to 79 / 86 instead of 82 / 86 on digits, 40 /
    59 instead of 49 / 65 on MNIST, 51 / 54 instead of 56 / 55 on drawings and 75 / 74
    instead of 77 / 74 on solar cells.

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
    ViT of 192 and 6 they would cost some 40 times as much as the encoder. A half of
    width and depth came to 52 / 64 instead of 64 / 72 on digits, 63 / 76 instead of 66
    / 78 on MNIST, 59 / 58 instead of 59 / 56 on drawings and 77 / 73 instead of 75 / 70
    on solar cells.

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

    MAE, which sees twice as many images in the same time and was ahead of SimMIM on
    MNIST (63 / 76 against 49 / 65) and drawings (59 / 58 against 56 / 55), level on
    solar cells (77 / 73 against 77 / 74; on test images two points behind) and behind
    on digits, whose 16 patches leave it four to see. Pictures of a few pixels get
    patches of one, in which MAE's target has no deviation, and SimMIM.

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
    name = "MAE" if patch_size > 1 else "SimMIM"
    if gpu:
        return name, {"encoder": "vit_small_patch16_224", **options}
    small = {"embed_dim": 192, "depth": 6, "num_heads": 6}
    return name, {"encoder": "vit_tiny_patch16_224", **options, **small}


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

    Few images make few steps, and steps are what a short run lacks: 16,000 images of
    MNIST in batches of 64 left MAE's kNN at 43 where it began at 44; 24,000 in batches
    of 32 brought it to 63, 32,000 to 73, and in batches of 16 to 71.

    Args:
        num_images:
            Number of training images.

    Returns:
        A power of two, from 8 to 256, or the number of images if that is less.
    """
    power = int(math.log2(max(num_images, 1)) / 2)
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

    1e-3 for encoders of up to 192 values. 2e-3 took MAE to 45 / 55 instead of 52 / 64
    on digits (with crops from 0.67), to 60 / 74 instead of 63 / 76 on MNIST and to 59 /
    55 instead of 59 / 58 on drawings. The rate falls in proportion to larger widths,
    where nothing was measured here: ViT-B gets 2.5e-4, and MAE's rule 1.5e-4 for a
    batch of 256.

    Args:
        embed_dim:
            Width of the encoder.
    """
    return 1e-3 * min(192 / embed_dim, 1)
