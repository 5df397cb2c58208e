"""What looks at the encoder while a run trains it, see `lightly_mim.monitoring`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback

from lightly_mim.data import ImageDataset, match_classes
from lightly_mim.monitoring import FeatureWatch, OnlineProbe, Probe
from lightly_mim.monitoring.pictures import ReconstructionPictures
from lightly_mim.pretraining.images import PretrainingImages


def drawing(
    images: PretrainingImages, directory: Path, every_n_epochs: int
) -> list[ReconstructionPictures]:
    """Returns the callback that draws reconstructions, if the target can be drawn."""
    target = images.method.target
    if not getattr(target, "drawable", False):
        print(
            f"No pictures of reconstructions: {type(target).__name__} does not say "
            "what a patch looks like."
        )
        return []
    return [ReconstructionPictures(*images.pictures(), directory, every_n_epochs)]


def watching(
    images: PretrainingImages, probe: Probe | None, probe_every: int, rank_every: int
) -> list[Callback]:
    """Returns the callbacks that encode whole images while the encoder trains."""
    train = images.plain()
    options: dict[str, Any] = {"num_workers": images.num_workers}
    watch = FeatureWatch(train, every_n_epochs=rank_every, **options)
    if probe is None:
        return [watch]
    for part in (train, images.val):
        is_folder = isinstance(part, ImageDataset)
        if is_folder and not part.classes:  # type: ignore[union-attr]
            raise ValueError(
                f"The probe needs labelled images, and those of {part.root} "  # type: ignore[union-attr]
                "have no labels: give a folder with one folder per class, or leave "
                "the probe out."
            )
    if images.val is not None:
        match_classes(train, images.val)
    options |= {"every_n_epochs": probe_every, "seed": images.seed}
    return [watch, OnlineProbe(train, images.val, probe, **options)]
