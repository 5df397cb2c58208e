from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images

from lightly_mim.patches import gather_patches
from lightly_mim.targets import ColorClusters, clusters

INDEX = torch.tensor([[0, 3, 5], [1, 2, 4]])


def _photos() -> torch.Tensor:
    photos = np.stack(load_sample_images().images)[:, 100:228, 100:292]
    return torch.from_numpy(photos).movedim(-1, 1) / 127.5 - 1


def test_color_clusters__equal_scikit_learn() -> None:
    images = _photos()[:, :, :64, :64]
    target = ColorClusters(12)
    target.fit(images)
    pixels = images.movedim(1, -1).reshape(-1, 3)
    expected = KMeans(12, random_state=0).fit(pixels.numpy())
    assert np.array_equal(target.centroids, expected.cluster_centers_)
    labels = target(images, torch.zeros(2, 1, dtype=torch.int64), (64, 64))
    assert np.array_equal(labels.flatten(), expected.labels_)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("factor", [1, 4])
def test_color_clusters__are_the_nearest(
    channels: int, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the pixels come in several parts, the last one shorter.
    monkeypatch.setattr(clusters, "_NUM_DISTANCES", 70)
    images = torch.randn(2, channels, 16, 24, dtype=torch.float64)
    target = ColorClusters(10, factor)
    target.fit(images)
    labels = target(images, INDEX, (8, 8))
    assert labels.dtype == torch.int64
    assert labels.shape[-1] == target.width((8, 8), channels)
    side = 8 // factor
    for b, k, y, x in np.ndindex(2, 3, side, side):
        top = int(INDEX[b, k]) // 3 * 8 + y * factor
        left = int(INDEX[b, k]) % 3 * 8 + x * factor
        color = images[b, :, top : top + factor, left : left + factor].mean((1, 2))
        distances = [float((color - c).square().sum()) for c in target.centroids]
        label = int(labels[b, k].reshape(side, side)[y, x])
        assert distances[label] <= min(distances) + 1e-6


@pytest.mark.parametrize("factor", [1, 4])
def test_color_clusters__a_palette_round_trips(factor: int) -> None:
    palette = torch.tensor([[-2.0, 0, 1], [0, 0, 0], [1, 1, 3], [2.5, -1, 0]])
    coarse = palette[torch.randint(0, 4, (2, 16 // factor, 24 // factor))]
    images = F.interpolate(coarse.movedim(-1, 1), scale_factor=factor, mode="nearest")
    target = ColorClusters(4, factor)
    target.fit(images)
    distances = torch.cdist(palette, target.centroids)
    assert distances.min(dim=1).values.max() < 1e-5
    labels = target(images, INDEX, (8, 8))
    logits = 20 * F.one_hot(labels, 4).flatten(-2).bfloat16()
    pixels = target.to_pixels(logits, images, INDEX, (8, 8))
    expected = gather_patches(images, INDEX, (8, 8))
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_color_clusters__learn_from_a_sample_of_many_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters, "_NUM_SAMPLES", 5000)
    images = _photos()
    target = ColorClusters(16)
    target.fit(images)
    first = target.centroids
    target.fit(images)
    assert torch.equal(target.centroids, first)
    pixels = images.movedim(1, -1).reshape(-1, 3)
    error = torch.cdist(pixels, first).min(dim=1).values.square().mean()
    best = KMeans(16, random_state=0).fit(pixels.numpy()).inertia_ / len(pixels)
    assert best * 0.95 < error < best * 1.1


def test_color_clusters__ignore_the_precision_of_matrix_products() -> None:
    images = _photos()
    target = ColorClusters(64)
    target.fit(images[..., :64])
    index = torch.zeros(2, 1, dtype=torch.int64)
    labels = target(images, index, (128, 192))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(target(images, index, (128, 192)), labels)


def test_color_clusters__refuses() -> None:
    with pytest.raises(ValueError, match="at least 2, got num_clusters=1"):
        ColorClusters(1)
    with pytest.raises(ValueError, match="at least 1, got factor=-2"):
        ColorClusters(8, factor=-2)
    target = ColorClusters(8)
    grey = torch.arange(7.0).repeat(10).reshape(1, 1, 10, 7)
    with pytest.raises(ValueError, match="at least 8 different .* have 7"):
        target.fit(grey)
    ColorClusters(7).fit(grey)
    with pytest.raises(ValueError, match="8 x 12 pixels.*8 x 8 .factor=8"):
        ColorClusters(8, factor=8).width((8, 12), 3)
