from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightly_mim.config import to_config
from lightly_mim.targets import ColorBins, ColorClusters, LearnedTarget

INDEX = torch.tensor([[0, 3, 5], [1, 2, 4]])
MAKE: list[Callable[[], LearnedTarget]] = [
    lambda: ColorBins(5, factor=2),
    lambda: ColorClusters(6, factor=2),
]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("channels", [1, 3])
def test_learned_target__state_goes_into_a_new_one(
    make: Callable[[], LearnedTarget], channels: int
) -> None:
    torch.manual_seed(0)  # not every draw has values in three of five bins
    images = torch.randn(2, channels, 16, 24)
    first, second = make(), make()
    model, other = nn.ModuleDict({"target": first}), nn.ModuleDict({"target": second})
    first.fit(images)
    other.load_state_dict(model.state_dict())
    expected = model["target"](images, INDEX, (8, 8))
    assert len(expected.unique()) > 2
    assert torch.equal(other["target"](images, INDEX, (8, 8)), expected)
    # And over one that has seen other images, of another number of channels.
    second.fit(torch.randn(2, 2, 16, 24))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["target"](images, INDEX, (8, 8)), expected)


def test_learned_target__another_number_of_clusters_does_not_fit() -> None:
    target = ColorClusters(6)
    target.fit(torch.randn(2, 3, 16, 24))
    with pytest.raises(RuntimeError, match="size mismatch for centroids"):
        ColorClusters(7).load_state_dict(target.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*centroids"):
        ColorClusters(7).load_state_dict({})


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))]
)
@pytest.mark.parametrize("fitted", [False, True])
def test_learned_target__is_copied(
    make: Callable[[], LearnedTarget],
    clone: Callable[[LearnedTarget], LearnedTarget],
    fitted: bool,
) -> None:
    images = torch.randn(2, 3, 16, 24)
    target = make()
    if fitted:
        target.fit(images)
    other = clone(target)
    assert (other.init_args, repr(other)) == (target.init_args, repr(target))
    assert to_config(other) == to_config(target)
    if not fitted:
        target.fit(images)
        with pytest.raises(ValueError, match=r"call its fit\(images\)"):
            other(images, INDEX, (8, 8))
        other.fit(images)
    expected = target(images, INDEX, (8, 8))
    assert torch.equal(other(images, INDEX, (8, 8)), expected)


def legacy_state() -> Any:
    return np.random.get_state()[1]  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("make", MAKE)
def test_learned_target__draws_no_global_random_numbers(
    make: Callable[[], LearnedTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightly_mim.targets.clusters._NUM_SAMPLES", 100)
    images = torch.randn(2, 3, 16, 24)
    before = torch.get_rng_state(), legacy_state()
    make().fit(images)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(legacy_state(), before[1])


@pytest.mark.parametrize("make", MAKE)
def test_learned_target__has_no_parameters_and_keeps_its_device(
    make: Callable[[], LearnedTarget],
) -> None:
    target = make().to("meta")
    target.fit(torch.randn(2, 3, 16, 24))
    assert all(buffer.is_meta for buffer in target.buffers())
    assert not list(target.parameters())


@pytest.mark.parametrize("make", MAKE)
def test_learned_target__refuses(make: Callable[[], LearnedTarget]) -> None:
    images = torch.randn(2, 3, 16, 24)
    target = make()
    logits = torch.zeros(2, 3, target.width((8, 8), 3) * (target.num_classes or 0))
    name = type(target).__name__
    with pytest.raises(ValueError, match=rf"{name}\(.*has not seen.*fit\(images\)"):
        target(images, INDEX, (8, 8))
    with pytest.raises(ValueError, match=rf"{name}\(.*has not seen.*fit\(images\)"):
        target.to_pixels(logits, images, INDEX, (8, 8))
    target.fit(images)
    with pytest.raises(ValueError, match=r"fitted on images of 3 .*got images of 1"):
        target(images[:, :1], INDEX, (8, 8))
    with pytest.raises(ValueError, match=r"fitted on images of 3 .*got images of 1"):
        target.to_pixels(logits, images[:, :1], INDEX, (8, 8))
