"""The training that `LinearMAE` and `FineTune` share, through both of them."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation.protocol import ImageProtocol, LabelledImages
from lightly_mim.evaluation.supervised import supervised
from lightly_mim.evaluation.supervised.finetune import FineTune
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE
from lightly_mim.evaluation.supervised.supervised import plan_batches
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.preemption import Preempted

OPTIONS: dict[str, Any] = {
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
}
FINETUNE = FineTune(epochs=2, batch_size=8, micro_batch_size=4)
LINEAR = LinearMAE(epochs=2, batch_size=8, micro_batch_size=4, lr=6.4)
PROTOCOLS = [FINETUNE, LINEAR]


class Stripes(Dataset[Any]):
    """Stripes across or along, with noise: (image, label, filename)."""

    def __init__(
        self,
        num_images: int,
        transform: Callable[[Any], Any] | None = None,
        size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        num_classes: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(num_images)
        height, width = size
        rows = (torch.arange(height) // 4 % 2 * 150)[:, None].expand(size)
        columns = (torch.arange(width) // 4 % 2 * 150).expand(size)
        self.labels = [number % num_classes for number in range(num_images)]
        noise = torch.randint(
            100, (num_images, in_chans, height, width), generator=generator
        )
        clean = torch.stack([rows if label % 2 else columns for label in self.labels])
        self.images = (clean[:, None] + noise).to(torch.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        image = self.images[index]
        sample = image if self.transform is None else self.transform(image)
        return sample, self.labels[index], str(index)


def stripes(num_train: int = 20, num_test: int = 10, **options: Any) -> LabelledImages:
    return LabelledImages(
        lambda transform: Stripes(num_train, transform, **options),
        Stripes(num_test, **options),
    )


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)


def run(
    protocol: ImageProtocol, encoder: MaskedEncoder, out: Path, **options: Any
) -> Tensor:
    outcomes = protocol(
        encoder, stripes(), 2, **({"out": out, "num_workers": 0} | options)
    )
    assert len(outcomes) == 1
    return outcomes[0].ranked


def trained(out: Path) -> dict[str, Tensor]:
    content = torch.load(out / supervised.CHECKPOINT_FILE, weights_only=True)
    weights: dict[str, Tensor] = content["trained"]
    return weights


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__a_cut_training_ends_with_the_same_weights(
    protocol: ImageProtocol,
    encoder: MaskedEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(protocol, encoder, tmp_path / "whole", seed=3)
    steps = 0
    step = supervised._step

    def cut_after(*arguments: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps in (1, 3, 5, 6):  # of 2 x 2 steps, some of them made twice
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(supervised, "_step", cut_after)
    monkeypatch.setattr(supervised, "SAVE_EVERY_SECONDS", 0.0)
    cuts = 0
    while cuts < 10:
        torch.rand(cuts + 1)  # what was drawn before does not matter
        try:
            again = run(protocol, encoder, tmp_path / "cut", seed=3)
            break
        except KeyboardInterrupt:
            cuts += 1
    assert (cuts, steps) == (4, 4 + 4)
    assert_same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))
    assert again.equal(whole)

    # A training that is done is scored again, without a step.
    assert run(protocol, encoder, tmp_path / "cut", seed=3).equal(whole)
    assert steps == 8


def test_train_and_score__a_signal_saves_and_ends(
    encoder: MaskedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FINETUNE, encoder, tmp_path / "whole")
    step = supervised._step

    def stopped(*arguments: Any) -> Tensor:
        loss = step(*arguments)
        if arguments[2][1:] == (1, 0):  # epoch and step
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "_step", stopped)
        with pytest.raises(Preempted):
            run(FINETUNE, encoder, tmp_path / "cut")
    content = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert (content["epoch"], content["step"]) == (1, 1)
    run(FINETUNE, encoder, tmp_path / "cut")
    assert_same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__leaves_everything_as_it_was(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    encoder = copy.deepcopy(encoder)
    encoder.add_mask_token()
    encoder.vit.pos_embed.requires_grad_(False)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modules = str(encoder)
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    run(protocol, encoder, tmp_path)
    assert torch.get_rng_state().equal(states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert_same(encoder.state_dict(), before)
    assert str(encoder) == modules
    assert encoder.training
    assert [n for n, p in encoder.named_parameters() if not p.requires_grad] == [
        "vit.pos_embed"
    ]
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__is_a_function_of_the_seed(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    run(protocol, encoder, tmp_path / "0", seed=0)
    run(protocol, encoder, tmp_path / "workers", seed=0, num_workers=1)
    run(protocol, encoder, tmp_path / "1", seed=1)
    assert_same(trained(tmp_path / "0"), trained(tmp_path / "workers"))
    other = trained(tmp_path / "1")
    assert any(not other[name].equal(w) for name, w in trained(tmp_path / "0").items())


def test_train_and_score__refuses_another_checkpoint(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    run(LINEAR, encoder, tmp_path)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        run(LINEAR, encoder, tmp_path, seed=1)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.vit.norm.bias[3] += 1e-3
    with pytest.raises(ValueError, match="encoder was"):
        run(LINEAR, other, tmp_path)
    with pytest.raises(ValueError, match="num_images"):
        LINEAR(encoder, stripes(30), 2, out=tmp_path, num_workers=0)


def test_train_and_score__refuses_labels_that_are_no_class(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Labels lie in \[0, 2\), got 0 to 2"):
        LINEAR(encoder, stripes(num_classes=3), 2, out=tmp_path, num_workers=0)


def test_train_and_score__a_broken_loss_is_not_saved(
    encoder: MaskedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "SAVE_EVERY_SECONDS", 0.0)
    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.vit.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="linear_mae became NaN .* epoch 1"):
        run(LINEAR, broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__bf16(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    ranked = run(protocol, encoder, tmp_path, precision="bf16", progress=True)
    assert ranked.shape == (10, 2)
    assert all(value.dtype != torch.bfloat16 for value in trained(tmp_path).values())


def test_plan_batches() -> None:
    assert plan_batches(1_281_167, 16_384, 512) == (16_384, 32, 78)
    assert plan_batches(100, 48, 20) == (48, 3, 2)  # 16 at a time
    assert plan_batches(100, 48, 20, multiple=2) == (48, 3, 2)
    assert plan_batches(100, 30, 20, multiple=2) == (30, 3, 3)  # not 15, which is odd
    # Fewer images than a batch: nearly all of them, in equal parts.
    assert plan_batches(1968, 16_384, 512) == (1968, 4, 1)
    assert plan_batches(1967, 16_384, 512) == (1964, 4, 1)
    assert plan_batches(7, 16_384, 512) == (7, 1, 1)
    assert plan_batches(7, 16_384, 512, multiple=2) == (6, 1, 1)
    with pytest.raises(ValueError, match="batch_size=31"):
        plan_batches(100, 31, 20, multiple=2)
    with pytest.raises(ValueError, match="at least 2"):
        plan_batches(1, 16, 16, multiple=2)
