from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightly_mim.checkpoints import save_encoder
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation import (
    KNN,
    Features,
    Linear,
    Results,
    evaluate,
    wilson_interval,
)
from lightly_mim.evaluation.protocol import rank_classes

OPTIONS = {"depth": 2, "embed_dim": 24, "num_heads": 2}
FAST = {"num_workers": 0, "device": "cpu", "linear": Linear(epochs=5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy stripes, upright and lying: 24 training and 12 test images."""
    root = tmp_path_factory.mktemp("stripes")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 6)):
        for name in ("lying", "upright"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                stripes = torch.arange(32).div(4, rounding_mode="floor") % 2 * 120
                image = stripes.expand(32, 32) + torch.randint(
                    100, (32, 32), generator=generator
                )
                image = image.T if name == "lying" else image
                Image.fromarray(image.to(torch.uint8).numpy()).save(
                    root / part / name / f"{number}.png"
                )
    return root


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, **OPTIONS)


class Labelled(Dataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def noise(num_images: int, num_classes: int, seed: int = 0) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_images, 3, 32, 32, generator=generator)
    labels = torch.arange(num_images) % num_classes
    return Labelled(images + labels[:, None, None, None] / num_classes, labels)


def test_evaluate__rows(folder: Path, encoder: MaskedEncoder, tmp_path: Path) -> None:
    results = evaluate(
        encoder,
        folder,
        layers=[0, -1],
        baselines=["random", "pixels"],
        out=tmp_path / "new" / "out",
        **FAST,
    )
    assert [(row.model, row.protocol) for row in results.rows] == [
        ("vit_tiny_patch16_224", "knn"),
        ("vit_tiny_patch16_224", "linear"),
        ("random initialisation", "knn"),
        ("random initialisation", "linear"),
        ("raw pixels", "knn"),
        ("raw pixels", "linear"),
    ]
    for row in results.rows:
        assert (row.num_train, row.num_test) == (24, 12)
        assert 0 <= row.top1_low <= row.top1 <= row.top1_high <= 1
        assert (row.top1 * 12) % 1 == pytest.approx(0)
        assert row.top5 is None  # two classes
        assert row.seconds > 0
        assert row.feature_seconds > 0
        chosen = {"layer": row.layer, "pooling": row.pooling, **row.hyperparameters}
        best = max(row.selection, key=lambda entry: entry["accuracy"])
        assert chosen.items() <= best.items() or row.protocol == "linear"
        assert any(chosen.items() <= entry.items() for entry in row.selection)
        if row.model == "raw pixels":
            assert (row.layer, row.pooling, len(row.selection)) == (None, "pixels", 1)
        else:
            keys = [(entry["layer"], entry["pooling"]) for entry in row.selection]
            assert keys == [(0, "mean"), (0, "cls"), (1, "mean"), (1, "cls")]
    # Stripes are easy: the features, labels and test images belong together.
    assert results.rows[0].top1 == 1
    assert results.rows[1].top1 == 1

    written = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results.to_dict()))
    assert written["rows"][0]["model"] == "vit_tiny_patch16_224"
    assert written["arguments"]["layers"] == [0, -1]
    assert written["arguments"]["linear"]["epochs"] == 5
    assert written["arguments"]["data"] == str(folder)
    assert written["encoder"]["options"]["depth"] == 2
    assert written["data"] == {
        "classes": ["lying", "upright"],
        "num_train": 24,
        "num_test": 12,
    }
    assert written["versions"]["timm"] == timm.__version__
    assert "pytest" in written["command"]


def test_evaluate__is_a_function_of_the_seed(tmp_path: Path) -> None:
    save_encoder(
        masked_encoder("vit_tiny_patch16_224", img_size=32, **OPTIONS),
        tmp_path / "encoder.safetensors",
    )

    def rows(seed: int, batch_size: int) -> list[dict[str, Any]]:
        results = evaluate(
            tmp_path,
            noise(40, 4),
            val=noise(10, 4, seed=1),
            baselines=["random"],
            seed=seed,
            batch_size=batch_size,
            **FAST,
        )
        table = results.to_dict()["rows"]
        for row in table:
            del row["seconds"], row["feature_seconds"]
        return list(table)

    first = rows(seed=0, batch_size=7)
    assert first[0]["model"] == str(tmp_path)
    torch.manual_seed(1)
    assert rows(seed=0, batch_size=7) == first
    assert rows(seed=1, batch_size=7)[2:] != first[2:]


def test_evaluate__chooses_without_test_images(encoder: MaskedEncoder) -> None:
    train = noise(40, 4)
    first = evaluate(encoder, train, val=noise(10, 4, seed=1), layers=[0, 1], **FAST)
    other = evaluate(encoder, train, val=noise(16, 4, seed=2), layers=[0, 1], **FAST)
    for a, b in zip(first.rows, other.rows, strict=True):
        assert a.selection == b.selection
        assert (a.layer, a.pooling, a.hyperparameters) == (
            b.layer,
            b.pooling,
            b.hyperparameters,
        )


def test_evaluate__data_sets_and_top5(encoder: MaskedEncoder) -> None:
    results = evaluate(
        encoder,
        noise(60, 6),
        val=noise(18, 6, seed=1),
        baselines=["pixels"],
        pixel_size=4,
        knn=KNN(ks=[3, 7], temperatures=[0.1]),
        **FAST,
    )
    for row in results.rows:
        assert row.top5 is not None
        assert row.top1 <= row.top5 <= 1
    assert results.rows[0].hyperparameters["k"] in (3, 7)
    assert results.record["data"]["classes"] == ["0", "1", "2", "3", "4", "5"]
    assert results.notes == []


def test_top_k__equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 8, generator=generator)
    labels = torch.randint(8, (50,), generator=generator)
    hits = rank_classes(logits, 5) == labels[:, None]
    for k, share in ((1, hits[:, 0]), (5, hits.any(dim=1))):
        metric = MulticlassAccuracy(8, top_k=k, average="micro")
        torch.testing.assert_close(share.float().mean(), metric(logits, labels))


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (5, 5), (500, 656), (1, 1)])
def test_wilson_interval__equals_scipy(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval__bad_input(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="do not make an accuracy"):
        wilson_interval(correct, total)


def test_evaluate__notes(folder: Path) -> None:
    plain = masked_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        class_token=False,
        global_pool="avg",
        **OPTIONS,
    )
    results = evaluate(plain, folder, ["knn"], **FAST)
    assert results.notes == [
        "kNN: with 24 training images, k is one of [1, 5, 10, 20].",
        "The encoder has no class token: features are means of patches.",
    ]
    assert [entry["pooling"] for entry in results.rows[0].selection] == ["mean"]
    for text in (str(results), printed(results)):
        assert "vit_tiny_patch16_224" in text
        assert "no class token" in text
    with pytest.raises(ValueError, match="this encoder has none"):
        evaluate(plain, folder, ["knn"], pools=["cls"], **FAST)


def printed(results: Results) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(results)
    return capture.get()


def test_evaluate__one_class(encoder: MaskedEncoder) -> None:
    train, test = noise(10, 1), noise(4, 1, seed=1)
    with pytest.raises(ValueError, match="names no classes"):
        evaluate(encoder, train, val=test, **FAST)
    train.classes = test.classes = ["cell"]  # type: ignore[attr-defined]
    results = evaluate(encoder, train, val=test, **FAST)
    assert [row.top1 for row in results.rows] == [1, 1]
    assert "one class" in results.notes[-1]


def test_evaluate__refuses_to_overwrite(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(ValueError, match=r"results\.json is there already"):
        evaluate(encoder, folder, ["knn"], out=tmp_path, **FAST)
    with pytest.raises(ValueError, match="is a file: pass a directory"):
        evaluate(encoder, folder, ["knn"], out=tmp_path / "results.json", **FAST)
    assert (tmp_path / "results.json").read_text() == "precious"
    evaluate(encoder, folder, ["knn"], out=tmp_path, overwrite=True, **FAST)
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_evaluate__no_test_images(folder: Path, encoder: MaskedEncoder) -> None:
    with pytest.raises(ValueError, match=r"no test images for .*train"):
        evaluate(encoder, folder / "train", **FAST)
    results = evaluate(encoder, folder / "train", ["knn"], val=folder / "val", **FAST)
    assert results.rows[0].num_test == 12


def test_evaluate__no_labels(folder: Path, encoder: MaskedEncoder) -> None:
    flat = folder / "train" / "lying"
    with pytest.raises(ValueError, match="lying' have no labels"):
        evaluate(encoder, flat, val=flat, **FAST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocols": ["attentive"]}, "protocols is a list of knn, linear"),
        ({"protocols": []}, "protocols is a list"),
        ({"protocols": "knn"}, "protocols is a list"),
        ({"baselines": ["chance"]}, "baselines is a list of random, pixels"),
        ({"layers": [2]}, "layers is one or more of 0 to 1"),
        ({"pools": ["max"]}, "pool is one of"),
        ({"precision": "16"}, "precision is one of"),
        ({"crop_ratio": 0.0}, "crop_ratio"),
        ({"knn": KNN(ks=[24])}, "23 training image"),
        ({"knn": KNN(temperatures=[0.0])}, "positive"),
        ({"knn": KNN(chunk_size=0)}, "chunk_size"),
        ({"linear": Linear(learning_rates=[])}, "at least one learning rate"),
        ({"linear": Linear(num_folds=1)}, "num_folds=1 for 24"),
        ({"linear": Linear(epochs=0)}, "at least 1"),
        ({"img_size": 64}, "img_size"),
    ],
)
def test_evaluate__bad_arguments(
    folder: Path,
    encoder: MaskedEncoder,
    tmp_path: Path,
    arguments: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(encoder, folder, **(FAST | {"out": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


def test_evaluate__labels_beyond_the_classes(encoder: MaskedEncoder) -> None:
    train, test = noise(12, 3), noise(8, 4)
    train.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"labels go up to 3.*names 3"):
        evaluate(encoder, train, val=test, **FAST)


def test_evaluate__settings_matter() -> None:
    # The protocols see features only: no encoder, no images.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    values = torch.randn(30, 4, generator=generator) + labels[:, None]
    features = Features({(0, "mean"): values, (1, "mean"): -values}, labels, [], 0.0)
    outcome = KNN(ks=[1])(features, features, 3)
    assert outcome.hyperparameters["k"] == 1
    assert outcome.key == (0, "mean")  # both are equally good: the first one
    assert torch.equal(outcome.ranked[:, 0], labels)  # each is its own neighbour
    assert outcome.ranked.shape == (30, 3)
    few = Linear(learning_rates=[0.01], epochs=1)(features, features, 3, seed=4)
    many = Linear(learning_rates=[0.01], epochs=9)(features, features, 3, seed=4)
    assert few.hyperparameters == {"learning_rate": 0.01}
    assert many.selection[0]["loss"] < few.selection[0]["loss"]


def test_evaluate__command_line(folder: Path, tmp_path: Path) -> None:
    save_encoder(
        masked_encoder("vit_tiny_patch16_224", img_size=32, **OPTIONS),
        tmp_path / "encoder.safetensors",
    )
    results = auto_cli(
        evaluate,
        as_positional=False,
        args=[
            f"--encoder={tmp_path}",
            f"--data={folder}",
            "--protocols=[linear,knn]",
            "--layers=[0,-1]",
            "--pools=[mean]",
            "--baselines=[pixels]",
            "--linear.epochs=3",
            "--knn.ks=[2,3]",
            "--num_workers=0",
            f"--out={tmp_path}",
        ],
    )
    assert [row.protocol for row in results.rows] == ["linear", "knn"] * 2
    assert results.rows[1].hyperparameters["k"] in (2, 3)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["arguments"]["linear"]["epochs"] == 3
    assert written["arguments"]["encoder"] == str(tmp_path)
