"""A method with two views and a moving teacher: one file, and no other is touched."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.models.utils import get_at_index
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

import lightly_mim
from lightly_mim import MaskedImageModel, MIMOutput, SimMIM, SimMIMTransform
from lightly_mim.encoders import masked_encoder
from lightly_mim.masking import RandomMasking
from lightly_mim.targets import Pixels

from .conftest import SHORT_RUN, TINY_VIT


class TwoViews:
    def __init__(self, transform: SimMIMTransform) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Tensor]:
        return [*self.transform(image), *self.transform(image)]


class Teacher(MaskedImageModel):
    """Predicts the mean token that a moving average of the encoder gives another view.

    BYOL's target (https://arxiv.org/abs/2006.07733) for masked images.
    """

    num_views = 2
    recipes = SimMIM.recipes

    def __init__(self, momentum: float = 0.9, **options: Any) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoder = masked_encoder(**options)
        self.encoder.add_mask_token()
        self.masking = RandomMasking(8, 0.5)
        self.target = Pixels()
        self.head = nn.Linear(self.encoder.embed_dim, self.encoder.embed_dim)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.progress: list[float] = []

    def forward(self, images: Any, mask: Any = None) -> MIMOutput:
        (student, other), (mask, _) = images, mask
        tokens = self.encoder.cell_tokens(self.encoder.encode_masked(student, mask))
        index, _ = mask.on(self.encoder.grid).index()
        prediction = self.head(get_at_index(tokens, index))
        with torch.no_grad():
            target = self.teacher.embed(other)[:, None].expand_as(prediction)
        loss = F.mse_loss(prediction.float(), target.float())
        return MIMOutput(loss, prediction, target, index, None, mask)

    def reconstruct(self, images: Tensor, mask: Any = None) -> Tensor:
        return images  # it does not predict pixels

    def transform(self, normalize: Any = None, **options: Any) -> TwoViews:
        size = self.encoder.img_size
        return TwoViews(SimMIMTransform(size, normalize=normalize, **options))

    def after_step(self, progress: float) -> None:
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        pairs = zip(self.teacher.parameters(), self.encoder.parameters(), strict=True)
        for old, new in pairs:
            old.lerp_(new, 1 - momentum)
        self.progress.append(progress)


OPTIONS = {k: v for k, v in TINY_VIT.items() if k != "mask_patch_size"}


def build() -> Teacher:
    return Teacher(**OPTIONS)


class Cut(Callback):
    """Ends a run within an epoch, after a save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(
                Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            )
            raise RuntimeError("cut")


def weights(run: Path) -> dict[str, Tensor]:
    path = run / "checkpoints" / "last.ckpt"
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher__pretrained_cut_resumed_evaluated(
    photos: Path, tmp_path: Path, accumulate: int
) -> None:
    options = SHORT_RUN | {"accumulate": accumulate}
    whole = lightly_mim.pretrain(tmp_path / "whole", photos, build, **options)
    assert isinstance(whole, Teacher)
    # One call per optimiser step, of 3 epochs of 4 steps, up to the end of the run.
    assert whole.progress == pytest.approx([(i + 1) / 12 for i in range(12)])
    # The teacher moved, and is not the student.
    start = build()
    student, teacher = whole.encoder.state_dict(), whole.teacher.state_dict()
    name = "vit.blocks.0.mlp.fc1.weight"
    assert not torch.equal(teacher[name], start.teacher.state_dict()[name])
    assert not torch.equal(teacher[name], student[name])

    with pytest.raises(RuntimeError, match="cut"):
        lightly_mim.pretrain(
            tmp_path / "cut", photos, build, callbacks=[Cut(6)], **options
        )
    resumed = lightly_mim.pretrain(
        tmp_path / "cut", photos, build, callbacks=[Cut(0)], resume=True, **options
    )
    assert isinstance(resumed, Teacher)
    assert resumed.progress == pytest.approx([(i + 1) / 12 for i in range(6, 12)])
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key

    results = lightly_mim.evaluate(
        tmp_path / "cut", data=photos, protocols=["knn"], num_workers=0
    )
    assert 0 <= results.rows[0].top1 <= 1


def test_teacher__batch_with_another_number_of_views(
    photos: Path, tmp_path: Path
) -> None:
    class OneView(Teacher):
        def transform(self, normalize: Any = None, **options: Any) -> Any:
            return super().transform(normalize, **options).transform

    with pytest.raises(ValueError, match=r"takes 2 view\(s\).*the batch has 1"):
        lightly_mim.pretrain(
            tmp_path / "a", photos, lambda: OneView(**OPTIONS), **SHORT_RUN
        )


def test_methods_with_one_view__refuse_two(photos: Path, tmp_path: Path) -> None:
    class Two(SimMIM):
        def transform(self, normalize: Any = None, **options: Any) -> Any:
            return TwoViews(super().transform(normalize, **options))

    with pytest.raises(ValueError, match=r"takes 1 view\(s\).*the batch has 2"):
        lightly_mim.pretrain(
            tmp_path / "a", photos, lambda: Two(**TINY_VIT), **SHORT_RUN
        )
