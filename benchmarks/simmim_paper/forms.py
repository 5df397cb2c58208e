"""The forms of SimMIM's study: what depends on the size of images and encoder.

- [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 4.1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightly_mim.evaluation import FineTune, Linear
from lightly_mim.heads import InverseSwinHead
from lightly_mim.targets import LocallyNormalizedPixels, Pixels, Target


@dataclass(frozen=True)
class Form:
    """What depends on the size of the images and of the encoder.

    Attributes:
        encoder:
            timm name of the encoder.
        encoder_options:
            Its options. They go with this encoder alone.
        img_size:
            Side of the images in pixels.
        target:
            What the default row predicts.
        window:
            Side of the window of locally normalised pixels.
        blocks:
            Side of the blocks of pixels whose averages are sorted into classes.
        gradients:
            Side of the blocks of pixels of which a histogram of gradients is made.
        inverse_swins:
            The heavy heads, small and large.
        decoder:
            MAE's decoder.
        pretraining:
            Arguments of `pretrain`.
        lr:
            Highest learning rate of a batch of that size. None for the recipes'.
        last_layers:
            The layer that is evaluated is chosen from this number of last ones.
        evaluation:
            Arguments of `evaluate`.
        note:
            What a reader of the numbers should know.
    """

    encoder: str
    encoder_options: Mapping[str, Any]
    img_size: int
    target: Target
    window: int
    blocks: int
    gradients: int
    inverse_swins: tuple[InverseSwinHead, InverseSwinHead]
    decoder: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    lr: float | None
    last_layers: int
    evaluation: Mapping[str, Any]
    note: str = ""


# As near to the papers as one GPU takes: their images of 192 pixels in patches of 16,
# the epochs of [0]'s study, the settings of each method's first recipe.
FULL = Form(
    encoder="vit_base_patch16_224",
    encoder_options={},
    img_size=192,
    target=Pixels(),
    window=47,  # SwinV2's
    blocks=4,  # of every pixel, 256 classes would make a head of 150 million parameters
    gradients=8,  # MaskFeat's
    inverse_swins=(InverseSwinHead("tiny"), InverseSwinHead("base")),
    decoder={"decoder_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    pretraining={"epochs": 100, "batch_size": 256},
    lr=None,
    last_layers=4,
    evaluation={},
)
# For the solar cells, one thread and about a minute: as many patches as 128 pixels have
# with patches of 16. Optimiser and crops are those of benchmarks/solar_cells.py, which
# says why pixels are normalised in a window by default.
SMALL = Form(
    encoder="vit_tiny_patch16_224",
    encoder_options={"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3},
    img_size=64,
    target=LocallyNormalizedPixels(15),
    window=15,
    blocks=2,
    gradients=4,
    inverse_swins=(
        InverseSwinHead(embed_dim=24, depths=(2, 2)),
        InverseSwinHead(embed_dim=32, depths=(6, 2)),
    ),
    decoder={"decoder_dim": 48, "decoder_depth": 2, "decoder_num_heads": 3},
    pretraining={
        "epochs": 6,
        "batch_size": 32,
        "weight_decay": 0.05,
        "min_scale": 0.67,
        "reconstruct_every": 0,
        "rank_every": 0,
        "tensorboard": False,
    },
    lr=1e-3,
    last_layers=3,
    evaluation={
        "crop_ratio": 1.0,  # defects lie at the margin, too
        "linear": Linear(learning_rates=(1e-3, 1e-2, 0.1), epochs=30, num_folds=3),
        # What suited held-out cells, see `FineTune`.
        "finetune": FineTune(
            epochs=15,
            lr=4e-3,
            layer_decay=0.75,
            min_scale=0.67,
            mixup=0.0,
            cutmix=0.0,
            rand_augment="",
            random_erasing=0.0,
            drop_path=0.0,
        ),
    },
    note="This is a small form of the study: a narrow encoder, few epochs and few "
    "images. What it says need not hold at the size of the papers.",
)
# Shows that everything runs.
QUICK = dataclasses.replace(
    SMALL,
    encoder_options={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    pretraining={**SMALL.pretraining, "epochs": 1},
    evaluation={
        **SMALL.evaluation,
        "linear": Linear(learning_rates=(0.1,), epochs=5, num_folds=2),
        "finetune": dataclasses.replace(SMALL.evaluation["finetune"], epochs=1),
    },
    note="These are the numbers of --quick, which trains too little to mean a thing.",
)
