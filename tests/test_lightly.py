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
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from lightly.utils.benchmarking import (
    KNNClassifier,
    LinearClassifier,
    OnlineLinearClassifier,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_mim import (
    MAE,
    EvalTransform,
    Pretraining,
    SimMIM,
    SimMIMTransform,
    masked_encoder,
)
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.encoders.transformer import MaskedTransformer
from lightly_mim.evaluation import extract_features, knn_predict_grid
from lightly_mim.evaluation.features import normalize_images
from lightly_mim.methods import MaskedImageModel

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
    transform: Any = EvalTransform(input_size=32)
    dataset: Any = LightlyDataset(str(root), transform=transform)
    return DataLoader(dataset, **({"batch_size": 8} | options))


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
    train = extract_features(encoder, loaders[0], pools=[encoder.pool])
    val = extract_features(encoder, loaders[1], pools=[encoder.pool])
    key = (encoder.num_layers - 1, encoder.pool)
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
    linear: Any = classifier.classification_head
    head = linear.weight.detach().clone()
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(classifier, loader(photos / "train", shuffle=True), loader(photos / "val"))
    assert 0 <= fit.callback_metrics["val_top1"] <= 1
    assert not torch.equal(linear.weight, head)
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

    transform: Any = SimMIMTransform(32)
    dataset: Any = LightlyDataset(str(photos / "train"), transform=transform)
    batches = DataLoader(dataset, batch_size=8, collate_fn=MultiViewCollate())
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(Benchmark(), batches)
    assert "train_online_cls_top1" in fit.callback_metrics


def test_from_torch_dataset(photos: Path) -> None:
    folder = torchvision.datasets.ImageFolder(str(photos / "train"))
    transform = SimMIMTransform(32)
    dataset: Any = LightlyDataset.from_torch_dataset(folder, transform=transform)
    batches = DataLoader(dataset, batch_size=4, collate_fn=MultiViewCollate())
    views, targets, _ = next(iter(batches))
    assert len(views) == 1
    assert views[0].shape == (4, 3, 32, 32)
    assert targets.tolist() == [0, 0, 0, 0]
    assert SimMIM(**TINY_VIT)(views[0]).loss.isfinite()


def dark_and_bright(count: int = 32) -> list[tuple[Tensor, int, str]]:
    """Two classes that any feature of an image tells apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 32, 32, generator=generator) * 0.2
    return [(noise[n] + 2 * (n % 2) - 1, n % 2, str(n)) for n in range(count)]


class BenchmarkMAE(pl.LightningModule):
    """What lightly's `benchmarks/imagenet/vitb16/mae.py` does with a backbone.

    Its online head is trained on token 0 of the encoded visible tokens and validated on
    `forward`, the features that the evaluations take afterwards.
    """

    def __init__(self, backbone: MaskedTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.online = OnlineLinearClassifier(
            feature_dim=backbone.feature_dim, num_classes=2, topk=(1,)
        )
        self.decoder_embed = torch.nn.Linear(backbone.embed_dim, 16)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=backbone.sequence_length - 1,
            embed_dim=16,
            depth=1,
            num_heads=2,
        )
        self.prediction = torch.nn.Linear(16, 8 * 8 * 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch[0], batch[1]
        length = self.backbone.sequence_length
        idx_keep, idx_mask = utils.random_token_mask(
            size=(len(images), length), mask_ratio=0.75, device=images.device
        )
        encoded = self.backbone.encode(images, idx_keep=idx_keep)
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, idx_keep, self.decoder_embed(encoded))
        decoded = utils.get_at_index(self.decoder(tokens), idx_mask)
        target = utils.get_at_index(utils.patchify(images, 8), idx_mask - 1)
        loss = torch.nn.functional.mse_loss(self.prediction(decoded), target)
        features = encoded[:, 0].detach()
        online_loss, _ = self.online.training_step((features, targets), batch_idx)
        total: Tensor = loss + online_loss
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch[0], batch[1]
        features = self.forward(images).flatten(start_dim=1)
        _, log = self.online.validation_step((features, targets), batch_idx)
        self.log_dict(log, batch_size=len(targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"no_embed_class": True}),
        ("beit_base_patch16_224", {"global_pool": "token"}),
    ],
)
def test_benchmark_mae(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **changes}
    encoder = masked_encoder(name, img_size=32, **options)
    assert isinstance(encoder, MaskedTransformer)
    images: Any = dark_and_bright()
    batches = DataLoader(images, batch_size=16)
    fit = trainer(tmp_path, max_epochs=25, log_every_n_steps=1)
    module = BenchmarkMAE(encoder)
    fit.fit(module, batches, batches)
    assert fit.callback_metrics["val_online_cls_top1"] == 1
    # What the head was trained on is what `forward` gives.
    module.eval()
    one = images[0][0][None]
    torch.testing.assert_close(module(one), encoder.encode(one)[:, 0])


def build(method: type[MaskedImageModel]) -> MaskedImageModel:
    torch.manual_seed(0)
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    return method(**TINY_VIT, **(decoder if method is MAE else {}))


@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_classifiers_take_pretraining(
    method: type[MaskedImageModel], photos: Path, tmp_path: Path
) -> None:
    module = Pretraining(build(method))
    encoder = module.method.encoder
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalized = normalize_images(images, encoder.mean, encoder.std)
    expected = encoder.embed(normalized, encoder.pool)
    torch.testing.assert_close(module(images), expected)
    torch.testing.assert_close(module(normalized), expected)

    loaders = [loader(photos / "train"), loader(photos / "val")]
    knn = KNNClassifier(
        module,
        num_classes=2,
        knn_k=5,
        knn_t=0.1,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=(1,),
    )
    fit = trainer(tmp_path)
    fit.validate(knn, dataloaders=loaders, verbose=False)
    found = [v for k, v in fit.callback_metrics.items() if "val_knn_top1" in k]
    alone = KNNClassifier(encoder, 2, 5, 0.1, 0, 1, topk=(1,))
    fit.validate(alone, dataloaders=loaders, verbose=False)
    assert found == [v for k, v in fit.callback_metrics.items() if "val_knn" in k]

    before = {name: p.clone() for name, p in module.named_parameters()}
    linear = LinearClassifier(
        module, 8, feature_dim=encoder.feature_dim, num_classes=2, topk=(1,)
    )
    fit = trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(linear, loader(photos / "train", shuffle=True), loader(photos / "val"))
    assert 0 <= fit.callback_metrics["val_top1"] <= 1
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_online_linear_classifier__on_the_output(
    method: type[MaskedImageModel],
) -> None:
    """The features of the training step are those that validation sees."""
    model = build(method)
    online = OnlineLinearClassifier(feature_dim=32, num_classes=2, topk=(1,))
    optimizer = torch.optim.AdamW([*model.parameters(), *online.parameters()], lr=3e-3)
    samples = dark_and_bright()
    images = torch.stack([image for image, _, _ in samples])
    labels = torch.tensor([label for _, label, _ in samples])
    for step in range(40):
        output = model(images)
        loss, _ = online.training_step((output.features, labels), step)
        optimizer.zero_grad()
        (output.loss + loss).backward()
        optimizer.step()
    _, log = online.validation_step((model.encoder(images).detach(), labels), 0)
    assert log["val_online_cls_top1"] == 1
