"""Our encoders and transforms inside lightly's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.utils.benchmarking import (
    KNNClassifier,
    LinearClassifier,
    OnlineLinearClassifier,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_mim import EvalTransform, SimMIM, SimMIMTransform, masked_encoder
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation import extract_features, knn_predict_grid

from .conftest import TINY_VIT

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:The number of training batches"
)

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {
        "encoder": "vit_tiny_patch16_224",
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    },
    "beit": {
        "encoder": "beit_base_patch16_224",
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    },
    "swin": {
        "encoder": "swin_tiny_patch4_window7_224",
        "window_size": 2,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder(**ENCODERS[request.param], img_size=32)


def loader(root: Path, **options: Any) -> DataLoader[Any]:
    dataset = LightlyDataset(str(root), transform=EvalTransform(input_size=32))
    return DataLoader(dataset, **({"batch_size": 8} | options))  # type: ignore[arg-type]


def trainer(path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_knn_classifier(encoder: MaskedEncoder, photos: Path, tmp_path: Path) -> None:
    loaders = [loader(photos / "train"), loader(photos / "val")]
    classifier = KNNClassifier(
        encoder.eval(),
        num_classes=2,
        knn_k=5,
        knn_t=0.1,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=(1,),
    )
    fit = trainer(tmp_path)
    fit.validate(classifier, dataloaders=loaders, verbose=False)
    (theirs,) = (v for k, v in fit.callback_metrics.items() if "val_knn_top1" in k)

    # The same features, neighbours and votes as ours.
    train = extract_features(encoder, loaders[0])
    val = extract_features(encoder, loaders[1])
    key = (encoder.num_layers - 1, "mean")
    (prediction,) = knn_predict_grid(
        val.values[key], train.values[key], train.labels, 2, [5], [0.1]
    )
    accuracy = (prediction[0, :, 0] == val.labels).float().mean()
    assert theirs.item() == pytest.approx(accuracy.item())


def test_linear_classifier(
    encoder: MaskedEncoder, photos: Path, tmp_path: Path
) -> None:
    classifier = LinearClassifier(
        encoder,
        batch_size_per_device=8,
        feature_dim=encoder.embed_dim,
        num_classes=2,
        topk=(1,),
    )
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    head = classifier.classification_head.weight.detach().clone()
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(classifier, loader(photos / "train", shuffle=True), loader(photos / "val"))
    assert 0 <= fit.callback_metrics["val_top1"] <= 1
    assert not torch.equal(classifier.classification_head.weight, head)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_online_linear_classifier(photos: Path, tmp_path: Path) -> None:
    class Benchmark(pl.LightningModule):
        """lightly's way to write a benchmark."""

        def __init__(self) -> None:
            super().__init__()
            self.method = SimMIM(**TINY_VIT)
            self.online = OnlineLinearClassifier(
                feature_dim=32, num_classes=2, topk=(1,)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, targets = batch[0], batch[1]
            loss = self.method(views[0]).loss
            features = self.method.encoder(views[0]).detach()
            online_loss, log = self.online.training_step((features, targets), batch_idx)
            self.log_dict(log, batch_size=len(targets))
            total: Tensor = loss + online_loss
            return total

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    dataset = LightlyDataset(str(photos / "train"), transform=SimMIMTransform(32))
    batches = DataLoader(dataset, batch_size=8, collate_fn=MultiViewCollate())  # type: ignore[arg-type]
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(Benchmark(), batches)
    assert "train_online_cls_top1" in fit.callback_metrics


def test_from_torch_dataset(photos: Path) -> None:
    folder = torchvision.datasets.ImageFolder(str(photos / "train"))
    dataset = LightlyDataset.from_torch_dataset(folder, transform=SimMIMTransform(32))
    batches = DataLoader(dataset, batch_size=4, collate_fn=MultiViewCollate())  # type: ignore[arg-type]
    views, targets, _ = next(iter(batches))
    assert len(views) == 1
    assert views[0].shape == (4, 3, 32, 32)
    assert targets.tolist() == [0, 0, 0, 0]
    assert SimMIM(**TINY_VIT)(views[0]).loss.isfinite()
