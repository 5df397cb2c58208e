"""Pretraining: `pretrain(...)` and its LightningModule, `Pretraining`.

- `entry`: `pretrain`, from the arguments to the finished marker.
- `module`: `Pretraining`, which also works in a Trainer of your own.
- `images`: what it reads, and what tells those images from others.
- `arguments`, `checks`: what is refused, also without images or weights.
- `length`: `minutes` instead of epochs.
- `summary`: what a run says before it begins.

What looks at the encoder meanwhile is in `lightly_mim.monitoring`, what every training
needs in `lightly_mim.training`.
"""

from lightly_mim.pretraining.checks import check_pretraining
from lightly_mim.pretraining.entry import pretrain
from lightly_mim.pretraining.module import Pretraining
from lightly_mim.training.machine import Precision, default_precision

__all__ = [
    "Precision",
    "Pretraining",
    "check_pretraining",
    "default_precision",
    "pretrain",
]
