"""Pictures of what a method reconstructs while it trains."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightly_mim import MAE, pretrain
from lightly_mim.reporting.figures import LAYOUT_KEY

from .conftest import SHORT_RUN, TINY_VIT

KEPT = TINY_VIT.keys() - {"mask_patch_size"}


class TakesImages(CSVLogger):
    """As Weights & Biases' logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.taken: list[tuple[str, tuple[int, int], int]] = []

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.taken += [(key, image.size, step) for image in images]


def test_reconstruction_pictures__reach_loggers_and_say_what_they_are(
    tmp_path: Path, photos: Path
) -> None:
    logger = TakesImages(tmp_path)
    options = {**SHORT_RUN, "epochs": 1, "tensorboard": True, "rank_every": 0}
    out = tmp_path / "a run"
    method = partial(MAE, **{k: v for k, v in TINY_VIT.items() if k in KEPT})
    pretrain(out, photos, method, loggers=[logger], **options)
    (path,) = (out / "reconstructions").iterdir()
    with Image.open(path) as picture:
        said = json.loads(picture.text[LAYOUT_KEY])  # type: ignore[attr-defined]
        size = picture.size
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    (loss,) = (float(row["train_loss"]) for row in rows if row["train_loss"])
    assert said["title"] == f"epoch 1 of 1 · training loss {loss:.4f} · MAE · a run"
    assert "Brightness and contrast of each predicted patch" in said["note"]
    assert logger.taken == [("reconstructions", size, 4)]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    (event,) = events.Images("reconstructions")
    assert (event.step, (event.width, event.height)) == (4, size)
