from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from sklearn.metrics import jaccard_score
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation import DenseKNN, DenseLinear, evaluate_dense
from lightly_mim.evaluation.dense.iou import class_iou, count_pixels, miou_interval
from lightly_mim.evaluation.dense.protocols import (
    DenseProtocol,
    PatchBank,
    patch_labels,
)
from lightly_mim.evaluation.dense.runner import grid_of
from lightly_mim.files import sealed

COLOURS = {0: (90, 90, 90), 3: (200, 30, 30), 7: (30, 30, 200)}
FAST: dict[str, Any] = {"num_workers": 0, "device": "cpu", "batch_size": 4}


def draw(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """Writes noisy discs and bars in colour, and index masks with their classes."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name / "a").mkdir(parents=True)
    width, height = size
    for number in range(count):
        mask = Image.new("L", size)
        pen = ImageDraw.Draw(mask)
        x, y = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        pen.ellipse((x, y, x + width // 2, y + height // 2), fill=3)
        x = int(rng.integers(width // 2, width - 12))
        pen.rectangle((x, 0, x + 12, height), fill=7)
        classes = np.asarray(mask)
        pixels = np.array([COLOURS.get(v, (0, 0, 0)) for v in range(8)])[classes]
        pixels = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255)
        labels = classes.copy()
        labels[:2] = 255  # no class
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / "images" / "a" / f"{number}.png")
        Image.fromarray(labels).save(folder / "masks" / "a" / f"{number}.png")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 6 test images of 96 x 64 pixels."""
    root = tmp_path_factory.mktemp("shapes")
    draw(root / "train", 12, (96, 64), 0)
    draw(root / "val", 6, (96, 64), 1)
    return root


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return masked_encoder(
        "vit_tiny_patch16_224",
        img_size=(64, 96),
        patch_size=8,
        depth=2,
        embed_dim=48,
        num_heads=2,
    )


def test_evaluate_dense__random_vit_sees_colours(
    shapes: Path, vit: Any, tmp_path: Path
) -> None:
    vit.train()
    results = evaluate_dense(
        vit, shapes, layers=[0, -1], random_baseline=True, out=tmp_path / "new", **FAST
    )
    assert vit.training
    assert [(row.model, row.protocol) for row in results.rows] == [
        ("vit_tiny_patch16_224", "knn"),
        ("vit_tiny_patch16_224", "linear"),
        ("random initialisation", "knn"),
        ("random initialisation", "linear"),
    ]
    for row in results.rows:
        # Everything background would be right for two thirds of the pixels, 0.22 mIoU.
        assert row.miou > 0.5, row
        assert row.miou_low <= row.miou <= row.miou_high
        assert list(row.iou) == ["0", "3", "7"]
        values = [value for value in row.iou.values() if value is not None]
        assert row.miou == pytest.approx(sum(values) / 3)
        assert row.pixel_accuracy > 0.75
        assert (row.num_train, row.num_test) == (12, 6)
        assert row.num_patches == 12 * 96
        assert [entry["layer"] for entry in row.selection] == [0, 1]
        best = max(row.selection, key=lambda entry: entry["miou"])
        assert {"layer": row.layer, **row.hyperparameters}.items() <= best.items()
    saved = json.loads((tmp_path / "new" / "dense.json").read_text())
    assert saved == json.loads(json.dumps(sealed(results.to_dict())))
    assert saved["data"]["classes"] == ["0", "3", "7"]
    assert saved["arguments"]["layers"] == [0, -1]
    assert saved["encoder"]["name"] == "vit_tiny_patch16_224"
    console = Console(width=140)
    with console.capture() as capture:
        console.print(results)
    text = capture.get()
    assert f"{100 * results.rows[0].miou:.1f} [" in text
    assert "IoU %" in text

    with pytest.raises(ValueError, match=r"dense.json is there already: .*overwrite"):
        evaluate_dense(vit, shapes, out=tmp_path / "new", **FAST)
    again = evaluate_dense(
        vit, shapes, ["knn"], layers=[0, -1], out=tmp_path / "new", overwrite=True
    )
    assert again.rows[0].miou == results.rows[0].miou


class Cut(DenseLinear):
    """Ends the evaluation, as a kill does."""

    def predictors(self, *args: Any, **options: Any) -> Any:
        raise InterruptedError


def test_evaluate_dense__cut_and_again(
    shapes: Path, vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is read again; other masks, settings or weights are not."""
    whole = evaluate_dense(vit, shapes, **FAST)
    out = tmp_path / "out"
    with pytest.raises(InterruptedError):
        evaluate_dense(vit, shapes, ["knn", Cut()], out=out, **FAST)
    assert not (out / "dense.json").exists()
    seen: list[int] = []
    encode = vit.embed_layers

    def count(images: Tensor, *args: Any) -> Any:
        seen.append(len(images))
        return encode(images, *args)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("kNN is run again")

    monkeypatch.setattr(vit, "embed_layers", count)
    with monkeypatch.context() as patch:
        patch.setattr(DenseKNN, "predictors", refuse)
        found = evaluate_dense(vit, shapes, out=out, **FAST)
    assert not seen
    assert [(row.miou, row.iou, row.selection) for row in found.rows] == [
        (row.miou, row.iou, row.selection) for row in whole.rows
    ]
    assert not list((out / "rows").glob("*"))
    page = (out / "report.html").read_text()
    assert all(f"<b>{100 * row.miou:.1f}</b>" in page for row in found.rows)
    # With the features of the other evaluation, which are of the same images.
    few = [DenseKNN(ks=[1])]
    evaluate_dense(vit, shapes, few, cache=out / "features", layers=[-1], **FAST)
    assert not seen
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)  # with the times of change
    mask = copy / "val" / "masks" / "a" / "0.png"
    Image.fromarray(np.full((64, 96), 3, np.uint8)).save(mask)
    (other,) = evaluate_dense(vit, copy, ["knn"], out=out, overwrite=True, **FAST).rows
    assert not seen  # the images are the same
    assert other.miou != whole.rows[0].miou
    torch.nn.init.normal_(vit.vit.blocks[1].mlp.fc2.weight)
    evaluate_dense(vit, shapes, ["knn"], cache=out / "features", **FAST)
    assert sum(seen) >= 18


@pytest.mark.parametrize("layer", [0, -1])
def test_evaluate_dense__stages_of_a_swin(shapes: Path, layer: int) -> None:
    torch.manual_seed(0)
    swin = masked_encoder(
        "swin_tiny_patch4_window7_224",
        img_size=(64, 96),
        patch_size=4,
        window_size=4,
        depths=(1, 1),
        num_heads=(2, 2),
        embed_dim=16,
    )
    results = evaluate_dense(swin, shapes, ["linear"], layers=[layer], **FAST)
    (row,) = results.rows
    assert row.num_patches == 12 * (96 * 64 // (16 if layer == 0 else 64))
    assert row.miou > 0.5


def test_evaluate_dense__convolutional_net(shapes: Path) -> None:
    """A timm model that is not one of our encoders."""
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False)
    (row,) = evaluate_dense(net, shapes, ["knn"], layers=[0], img_size=64, **FAST).rows
    assert row.miou > 0.4


def test_evaluate_dense__flat_folder_and_names(shapes: Path, vit: Any) -> None:
    names = [f"class {number}" for number in range(8)]
    few = [DenseKNN(ks=[1], temperatures=[0.07])]
    options: dict[str, Any] = FAST | {"max_patches": 100}
    results = evaluate_dense(
        vit, shapes / "train", few, classes=names, ignore_index=(255, 0), **options
    )
    (row,) = results.rows
    assert (row.num_train, row.num_test, row.num_patches) == (10, 2, 100)
    assert "2 of 12 images were held out" in results.notes[0]
    assert list(row.iou) == names[1:]  # 0 is ignored
    assert row.iou["class 1"] is None  # neither there nor predicted
    assert row.iou["class 3"] is not None
    assert row.miou > 0.6
    with_val = evaluate_dense(vit, shapes / "train", few, val=shapes / "val", **options)
    assert (with_val.rows[0].num_train, with_val.rows[0].num_test) == (12, 6)
    assert not with_val.notes


def perfect(images: Tensor) -> Tensor:
    """One-hot colours of 8 x 8 patches, the features that say it all."""
    cells = images.unflatten(2, (-1, 8)).unflatten(4, (-1, 8))[:, :, :, 0, :, 0]
    classes = (cells[:, 0] > 0).long() + 2 * (cells[:, 2] > 0).long()
    return torch.nn.functional.one_hot(classes.flatten(1), 4).float()


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_evaluate_dense__perfect_features(
    tmp_path: Path, vit: Any, monkeypatch: pytest.MonkeyPatch, protocol: Any
) -> None:
    """Stripes of whole patches."""
    for part, count in (("train", 6), ("val", 3)):
        for name in ("images", "masks"):
            (tmp_path / part / name).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((64, 96), np.uint8)
            mask[8 * number :] = 1
            mask[56 - 8 * (number % 2) :] = 2
            pixels = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)[mask]
            Image.fromarray(pixels).save(tmp_path / part / "images" / f"{number}.png")
            palette = Image.fromarray(mask).convert("P")
            palette.save(tmp_path / part / "masks" / f"{number}.png")

    def embed_layers(images: Tensor, layers: Any, pools: Any) -> Any:
        assert pools == ["tokens"]
        return {(layer, "tokens"): perfect(images) for layer in layers}

    monkeypatch.setattr(vit, "embed_layers", embed_layers)
    (row,) = evaluate_dense(vit, tmp_path, [protocol], **FAST).rows
    assert row.miou == 1
    assert (row.miou_low, row.miou_high, row.pixel_accuracy) == (1, 1, 1)


def masks(shape: tuple[int, ...], num_classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_classes, shape, generator=generator)


def test_counts__equal_scikit_learn_and_torchmetrics() -> None:
    target, predicted = masks((5, 8, 12), 4), masks((5, 8, 12), 4, 1).clamp(min=0)
    counts = torch.stack(
        [count_pixels(p, t, 4) for p, t in zip(predicted, target, strict=True)]
    )
    valid = target >= 0
    expected = jaccard_score(target[valid], predicted[valid], average=None)
    np.testing.assert_allclose(class_iou(counts.sum(dim=0)), expected, rtol=1e-12)
    metric = MulticlassJaccardIndex(4, average="macro", ignore_index=-1)
    for p, t in zip(predicted, target, strict=True):
        metric.update(p, t)
    mean = float(class_iou(counts.sum(dim=0)).nanmean())
    assert mean == pytest.approx(float(metric.compute()), rel=1e-6)
    # A class that is nowhere does not count.
    wide = class_iou(count_pixels(predicted[0], target[0], 9))
    assert wide[4:].isnan().all()
    wide_metric = MulticlassJaccardIndex(9, average="macro", ignore_index=-1)
    assert float(wide.nanmean()) == pytest.approx(
        float(wide_metric(predicted[:1], target[:1])), rel=1e-6
    )


def test_bootstrap__plain_restatement() -> None:
    target, predicted = masks((40, 6, 6), 3), masks((40, 6, 6), 3, 1).clamp(min=0)
    counts = torch.stack(
        [count_pixels(p, t, 3) for p, t in zip(predicted, target, strict=True)]
    )
    low, high = miou_interval(counts, 0)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        drawn = torch.from_numpy(rng.integers(0, 40, 40))
        means.append(float(class_iou(counts[drawn].sum(dim=0)).nanmean()))
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=0.1 * np.ptp(expected))


@pytest.mark.parametrize("grid", [(1, 1), (4, 3), (2, 6), (8, 12)])
def test_patch_labels__plain_restatement(grid: tuple[int, int]) -> None:
    given = masks((3, 8, 12), 4)
    labels = patch_labels(given, grid, 4)
    h, w = 8 // grid[0], 12 // grid[1]
    for b in range(3):
        for i in range(grid[0]):
            for j in range(grid[1]):
                cell = given[b, i * h : i * h + h, j * w : j * w + w].flatten()
                votes = [int((cell == number).sum()) for number in range(4)]
                expected = votes.index(max(votes)) if max(votes) else -1
                assert labels[b, i, j] == expected
    with pytest.raises(ValueError, match="3 x 4 patches do not divide masks of 8 x 12"):
        patch_labels(given, (3, 4), 4)


def test_grid__of_any_aspect() -> None:
    class Encoder:
        img_size = (64, 96)

    assert grid_of(Encoder(), 6) == (2, 3)
    assert grid_of(Encoder(), 8 * 12) == (8, 12)
    Encoder.grid = (8, 6)  # type: ignore[attr-defined]  # patches of 8 x 16
    assert grid_of(Encoder(), 48) == (8, 6)
    assert grid_of(Encoder(), 12) == (4, 3)
    with pytest.raises(ValueError, match="47 patch tokens are no grid"):
        grid_of(Encoder(), 47)


@pytest.mark.parametrize("settings", [DenseKNN(), DenseLinear(epochs=3)])
def test_predictors__alone_as_in_the_grid(settings: DenseProtocol) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = PatchBank(torch.randn(60, 5, generator=generator), torch.arange(60) % 3)
    tokens = torch.randn(2, 3, 4, 5, generator=generator)
    for chosen, predict in settings.predictors(bank, 3):
        alone = settings.predictor(bank, 3, chosen)
        predicted = predict(tokens, (6, 8))
        assert predicted.shape == (2, 6, 8)
        agree = (alone(tokens, (6, 8)) == predicted).double().mean()
        assert agree > 0.99  # a sum in another order may decide a tie


def test_knn__remembers_no_other_tokens() -> None:
    bank = PatchBank(torch.randn(60, 5), torch.arange(60) % 3)
    ((_, predict),) = DenseKNN([3], [0.07]).predictors(bank, 3)
    for _ in range(20):  # each may lie where the one before lay
        tokens = torch.randn(1, 3, 4, 5)
        ((_, fresh),) = DenseKNN([3], [0.07]).predictors(bank, 3)
        assert torch.equal(predict(tokens, (3, 4)), fresh(tokens, (3, 4)))
        del tokens


# Bad input: nothing is written.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path / "data", 6, (48, 32), 0)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["svm"]}, "protocols of .* each one of 'knn', 'linear' or"),
        ({"protocols": []}, "protocols of .* one or more"),
        ({"layers": [2]}, "layers is one or more of 0 to 1"),
        ({"layers": []}, "layers of .* one or more"),
        ({"max_patches": 0}, "at least 1, got max_patches=0"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"protocols": [DenseKNN]}, "protocols has the class DenseKNN"),
        ({"protocols": ["knn", DenseKNN([1])]}, "Two protocols are called 'knn'"),
        ({"classes": ["a", "b"]}, "holds the value.s. 3, 7, which name no class"),
        ({"classes": ["a"] * 8}, "names of the classes differ"),
        ({"ignore_index": (0, 3, 255)}, r"hold only \['7'\]"),
    ],
)
def test_evaluate_dense__refuses(
    folder: Path, vit: Any, options: dict[str, Any], message: str
) -> None:
    out = folder.parent / "out"
    with pytest.raises(ValueError, match=message):
        evaluate_dense(vit, folder, out=out, **(FAST | options))
    assert not out.exists()


def test_settings__refuse(folder: Path, vit: Any) -> None:
    with pytest.raises(TypeError, match=r"no argument 'knn'. .*protocols=\[DenseKNN"):
        evaluate_dense(vit, folder, knn=DenseKNN())
    with pytest.raises(ValueError, match="ks of DenseKNN is a list of one or more"):
        DenseKNN(ks=[0])
    with pytest.raises(ValueError, match="learning_rates of DenseLinear is a list"):
        DenseLinear(learning_rates=[])


def break_folder(folder: Path, how: str) -> None:
    mask = folder / "masks" / "a" / "2.png"
    if how == "missing":
        mask.unlink()
    elif how == "no image":
        (folder / "images" / "a" / "2.png").unlink()
    elif how == "size":
        Image.new("L", (48, 31)).save(mask)
    elif how == "colours":
        Image.new("RGB", (48, 32)).save(mask)
    elif how == "truncated":
        mask.write_bytes(mask.read_bytes()[:60])
    elif how == "twice":
        Image.new("RGB", (48, 32)).save(folder / "images" / "a" / "2.jpg")
    elif how == "no masks":
        (folder / "masks").rename(folder / "labels")
    elif how == "few":
        for number in range(2, 6):
            (folder / "images" / "a" / f"{number}.png").unlink()
            (folder / "masks" / "a" / f"{number}.png").unlink()
    elif how == "test ignored":
        for name in ("images", "masks"):
            (folder / "train" / name).mkdir(parents=True)
            (folder / "val" / name).mkdir(parents=True)
            (folder / name / "a").rename(folder / "train" / name / "a")
        Image.new("RGB", (48, 32)).save(folder / "val" / "images" / "0.png")
        Image.new("L", (48, 32), 255).save(folder / "val" / "masks" / "0.png")
    elif how == "ignored":
        for path in (folder / "masks" / "a").iterdir():
            Image.new("L", (48, 32), 255).save(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"no mask in .* for images/a/2.png: an image and its mask"),
        ("no image", r"no image in .* for masks/a/2.png"),
        ("size", r"2.png has 31 x 48 pixels, and its image 32 x 48"),
        ("colours", r"2.png has colours \(mode RGB\)"),
        ("truncated", r"Cannot read the mask .*2.png"),
        ("twice", r"images/a/2.* the same name but for the ending"),
        ("no masks", "holds no folder masks"),
        ("few", "has 2 image.s., of which a fifth"),
        ("ignored", "hold only pixels without a class"),
        ("test ignored", "No pixel of the test images has a class"),
    ],
)
def test_evaluate_dense__refuses_folders(
    folder: Path, vit: Any, how: str, message: str
) -> None:
    break_folder(folder, how)
    with pytest.raises(ValueError, match=message):
        evaluate_dense(vit, folder, out=folder.parent / "out", **FAST)
    assert not (folder.parent / "out").exists()


def test_cli(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightly_mim.cli import main

    model = ["--encoder", "vit_tiny_patch16_224", "--pretrained", "false"]
    options = ["--img_size", "32", "--num_workers", "0", "--protocols", "knn"]
    words = ["--data", str(shapes), *model, *options, "--ignore_index", "255", "254"]
    main(["evaluate-dense", *words, "--knn.ks", "1", "--out", str(tmp_path)])
    assert "mIoU" in capsys.readouterr().out
    saved = json.loads((tmp_path / "dense.json").read_text())
    assert saved["arguments"]["ignore_index"] == [255, 254]
    assert saved["rows"][0]["hyperparameters"]["k"] == 1
