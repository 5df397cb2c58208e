"""What pretraining does for parts: targets that learn, pictures, AvgDist, records."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from torch import Tensor

import lightly_mim
from lightly_mim import MAE, SimMIM
from lightly_mim.cli import main
from lightly_mim.evaluation.features import normalize_images
from lightly_mim.masking import BlockMasking, RandomMasking, average_distance
from lightly_mim.targets import HOG, ColorBins, ColorClusters
from lightly_mim.transforms import EvalTransform

from .conftest import SHORT_RUN, TINY_VIT

NO_MASK = {k: v for k, v in TINY_VIT.items() if k != "mask_patch_size"}


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def state(run: Path) -> dict[str, Tensor]:
    path = run / "checkpoints" / "last.ckpt"
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def plain_images(photos: Path) -> Tensor:
    """All training images, whole, and normalised by what they are as a whole."""
    from PIL import Image

    transform = EvalTransform(32, normalize=None)
    files = sorted((photos / "train").rglob("*.jpg"))
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(transform(image))
    values = torch.stack(images).numpy()
    mean, std = values.mean((0, 2, 3)) / 255, values.std((0, 2, 3)) / 255
    return normalize_images(torch.from_numpy(values), mean.round(4), std.round(4))


def test_learned_target__learns_from_plain_training_images(
    photos: Path, tmp_path: Path
) -> None:
    build = partial(SimMIM, **TINY_VIT, target=ColorBins(4))
    method = lightly_mim.pretrain(tmp_path / "a", photos, build, **SHORT_RUN)
    expected = ColorBins(4)
    expected.fit(plain_images(photos))
    assert isinstance(method.target, ColorBins)
    torch.testing.assert_close(method.target.low, expected.low)
    torch.testing.assert_close(method.target.high, expected.high)


def test_learned_target__that_has_learned_is_left_alone(
    photos: Path, tmp_path: Path
) -> None:
    target = ColorBins(4)
    target.fit(torch.tensor([-9.0, 9.0]).expand(1, 3, 1, 2))
    method = SimMIM(**TINY_VIT, target=target)
    lightly_mim.pretrain(tmp_path / "a", photos, method, **SHORT_RUN | {"epochs": 1})
    # The method has a copy of its own: two runs share nothing.
    assert isinstance(method.target, ColorBins) and method.target is not target
    assert method.target.low.tolist() == [-9.0] * 3


def test_learned_target__of_two_runs_is_two(photos: Path, tmp_path: Path) -> None:
    target = ColorBins(4)
    build = partial(SimMIM, **TINY_VIT, target=target)
    lightly_mim.pretrain(tmp_path / "a", photos, build, **SHORT_RUN | {"epochs": 1})
    assert not target.fitted


def test_learned_target__that_cannot_learn_costs_no_run(
    photos: Path, tmp_path: Path
) -> None:
    options = SHORT_RUN | {"epochs": 1}
    lightly_mim.pretrain(tmp_path / "a", photos, partial(SimMIM, **TINY_VIT), **options)
    before = state(tmp_path / "a")
    build = partial(SimMIM, **TINY_VIT, target=ColorClusters(40_000))
    ways: dict[str, dict[str, Any]] = {"a": {"overwrite": True}, "b": {}}
    for out, more in ways.items():
        with pytest.raises(ValueError, match="different colours"):
            lightly_mim.pretrain(tmp_path / out, photos, build, **options, **more)
    assert all(torch.equal(t, before[n]) for n, t in state(tmp_path / "a").items())
    assert not (tmp_path / "b").exists()


class Cut(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("cut")


@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_learned_target__resumes_bitwise(
    photos: Path, tmp_path: Path, method: Any
) -> None:
    options = NO_MASK if method is MAE else TINY_VIT
    build = partial(method, **options, target=ColorClusters(8, factor=4))
    lightly_mim.pretrain(
        tmp_path / "whole", photos, build, callbacks=[Cut(-1)], **SHORT_RUN
    )
    with pytest.raises(RuntimeError, match="cut"):
        lightly_mim.pretrain(
            tmp_path / "cut", photos, build, callbacks=[Cut(2)], **SHORT_RUN
        )
    lightly_mim.pretrain(
        tmp_path / "cut", photos, build, callbacks=[Cut(-1)], resume=True, **SHORT_RUN
    )
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert whole["method.target.centroids"].shape == (8, 3)
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_target_without_a_picture__is_said_and_the_run_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = partial(SimMIM, **TINY_VIT, target=HOG(pixels_per_cell=4))
    lightly_mim.pretrain(tmp_path / "a", photos, build, **SHORT_RUN | {"epochs": 1})
    assert "No pictures of reconstructions: HOG" in capsys.readouterr().out
    assert not (tmp_path / "a" / "reconstructions").exists()
    assert (tmp_path / "a" / "encoder.safetensors").exists()


def test_avg_dist__is_that_of_the_masks(photos: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Noted(SimMIM):
        def forward(self, images: Any, mask: Any = None) -> Any:
            output = super().forward(images, mask)
            if self.training:
                seen.append(average_distance(output.mask, (32, 32)).mean().item())
            return output

    build = partial(Noted, **NO_MASK, masking=BlockMasking(8, 0.5))
    lightly_mim.pretrain(tmp_path / "a", photos, build, avg_dist=True, **SHORT_RUN)
    logged = [
        float(row["avg_dist"]) for row in rows_of(tmp_path / "a") if row["avg_dist"]
    ]
    assert logged == pytest.approx(seen[1::2], rel=1e-5)  # every second step
    lightly_mim.pretrain(tmp_path / "b", photos, build, **SHORT_RUN | {"epochs": 1})
    assert "avg_dist" not in rows_of(tmp_path / "b")[0]


def test_config__says_the_parts_and_builds_them_again(
    photos: Path, tmp_path: Path
) -> None:
    words = ["pretrain", "--out", str(tmp_path / "a"), "--data", str(photos)]
    words += ["--method", "SimMIM", "--epochs", "1", "--batch_size", "8"]
    for name, value in NO_MASK.items():
        words += [f"--method.{name}", str(value)]
    words += ["--method.masking", "BlockMasking", "--method.masking.ratio", "0.5"]
    words += ["--method.masking.mask_patch_size", "8"]
    words += ["--method.head", "MLPHead", "--method.head.hidden_dim", "16"]
    words += ["--method.loss", "SmoothL1", "--method.loss.beta", "0.5"]
    words += ["--tensorboard", "false", "--num_workers", "0"]
    main(words)
    config = tmp_path / "a" / "config.yaml"
    method = yaml.safe_load(config.read_text())["method"]
    assert method["class_path"] == "lightly_mim.SimMIM"
    parts = {name: method["init_args"][name] for name in ("masking", "head", "loss")}
    assert parts == {
        "masking": {
            "class_path": "lightly_mim.masking.BlockMasking",
            "init_args": {"mask_patch_size": 8, "ratio": 0.5},
        },
        "head": {
            "class_path": "lightly_mim.heads.MLPHead",
            "init_args": {"hidden_dim": 16},
        },
        "loss": {
            "class_path": "lightly_mim.losses.SmoothL1",
            "init_args": {"beta": 0.5},
        },
    }
    # What was left open is recorded, too.
    assert method["init_args"]["target"] == {
        "class_path": "lightly_mim.targets.LocallyNormalizedPixels",
        "init_args": {"window_size": 7},
    }
    assert method["init_args"]["init"] == "mae"
    main(["pretrain", "--config", str(config), "--out", str(tmp_path / "b")])
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_config__old_arguments_are_refused_with_what_to_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {
        "out": str(tmp_path / "a"),
        "data": str(photos),
        "method": {
            "class_path": "lightly_mim.methods.simmim.SimMIM",
            "init_args": {"encoder": "vit_tiny_patch16_224", "norm_target_window": 47},
        },
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--config", str(tmp_path / "old.yaml")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "pass target=LocallyNormalizedPixels(47)" in message
    assert not (tmp_path / "a").exists()


def test_shorthand__is_random_masking() -> None:
    for method, size in ((SimMIM, 8), (MAE, 8)):
        options = NO_MASK if method is MAE else {**NO_MASK, "img_size": 64}
        default = method(**options).masking
        assert type(default) is RandomMasking
        assert default.mask_patch_size == (size, size)
        masking = method(**options, mask_patch_size=16, mask_ratio=0.5).masking
        assert type(masking) is RandomMasking
        assert (masking.mask_patch_size, masking.ratio) == ((16, 16), 0.5)
