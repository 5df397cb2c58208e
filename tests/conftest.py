"""Small real images for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

TINY_VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mask_patch_size": 8,
}

# A run of 3 epochs of 4 steps of 8 images, for the photographs below.
SHORT_RUN: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 8,
    "lr": 0.002,
    "precision": "32-true",
    "accelerator": "cpu",
    "devices": 1,
    "num_workers": 0,
    "tensorboard": False,
    "log_every": 2,
    "report": False,  # takes as long as the run
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that are marked `gpu` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="gpu: there is none here"))


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each test hear what is said once in a process."""
    monkeypatch.setattr("lightly_mim.data.notes._said", set())


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/, two classes of real photographs cut into pieces.

    16 + 16 training and 6 + 6 validation JPEG files of 48 x 40 pixels.
    """
    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(
        ("temple", "flower"), load_sample_images().images, strict=True
    ):
        pieces = [
            photo[y : y + 40, x : x + 48]
            for y in range(0, 400, 80)
            for x in range(0, 600, 120)
        ]
        for number, piece in enumerate(pieces[:22]):
            folder = root / ("train" if number < 16 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.ascontiguousarray(piece))
            image.save(folder / f"{number:02d}.jpg", quality=95)
    return root
