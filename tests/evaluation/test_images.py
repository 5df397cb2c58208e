from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from lightly_mim import EvalTransform, masked_encoder
from lightly_mim.data import ImageDataset, TransformedDataset
from lightly_mim.evaluation import load_encoder
from lightly_mim.evaluation.fingerprints import data_fingerprint
from lightly_mim.evaluation.images import EvaluationImages, image_notes
from lightly_mim.evaluation.splits import hold_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training images of class a, 10 of class b, all of different grey; 2 others."""
    root = tmp_path_factory.mktemp("images")
    grey = 0
    for part, counts in (("train", {"a": 30, "b": 10}), ("val", {"a": 1, "b": 1})):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (4, 4), grey)
                image.save(root / part / name / f"{number:02}.png")
                grey += 1
    return root


class Greys(Dataset[Any]):
    classes = ("a", "b")
    fingerprint: Any = None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (4, 4), index), int(index >= 30)


def grey(image: Image.Image) -> int:
    return int(image.getpixel((0, 0)))  # type: ignore[arg-type]


def contents(images: Dataset[Any]) -> list[tuple[int, int]]:
    count = len(images)  # type: ignore[arg-type]
    return [images[index][:2] for index in range(count)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_holdout__cuts_the_training_images_in_two(folder: Path, share: float) -> None:
    images = EvaluationImages(folder, None, grey, 1, share)
    train, test = contents(images.train), contents(images.test)
    assert len(test) == 40 * share
    # Every training image once, with its label, and no test image.
    assert sorted(train + test) == [(n, int(n >= 30)) for n in range(40)]
    assert abs(sum(label for _, label in test) - 10 * share) < 1
    # Protocols that augment read the same ones.
    again = images.labelled().train(lambda image: grey(image) + 100)
    assert contents(again) == [(n + 100, label) for n, label in train]


def test_holdout__small_classes_take_turns() -> None:
    labels = torch.arange(100) % 20  # 5 images each, of which a tenth is half an image
    drawn = [set(labels[hold_out(labels, 0.1, seed)].tolist()) for seed in range(40)]
    assert all(len(classes) == 10 for classes in drawn)
    assert set.union(*drawn) == set(range(20))
    alone = torch.tensor([0] * 9 + [1])
    held_out = [hold_out(alone, 0.2, seed) for seed in range(20)]
    assert not any(each[9] for each in held_out)
    assert {int(each.sum()) for each in held_out} <= {1, 2}


def test_holdout__is_a_function_of_the_seed(folder: Path) -> None:
    first, same, other = (
        contents(EvaluationImages(folder, None, grey, 1, 0.2, seed).test)
        for seed in (0, 0, 1)
    )
    assert first == same != other


def test_holdout__data_sets(folder: Path) -> None:
    tensor = pil_to_tensor  # labels of a data set are read with its images
    images = EvaluationImages(Greys(), None, tensor, 1, 0.25, num_workers=0)
    ours = EvaluationImages(folder, None, grey, 1, 0.25)
    held_out = [(int(image[0, 0, 0]), label) for image, label, _ in images.test]  # type: ignore[attr-defined]
    assert held_out == contents(ours.test)
    assert images.train.classes == ["a", "b"]  # type: ignore[attr-defined]
    assert len(contents(images.labelled().train(grey))) == 30
    # A folder without val/ is enough.
    alone = EvaluationImages(folder / "train", None, grey, 1, 0.25)
    assert contents(alone.test) == contents(ours.test)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_holdout__out_of_range(folder: Path, share: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1, got holdout"):
        EvaluationImages(folder, None, grey, 1, share)


def test_holdout__leaves_none(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holdout=0.0001 of 40 .* none on one side"):
        EvaluationImages(folder, None, grey, 1, 0.0001)


def test_data_fingerprint__parts(folder: Path) -> None:
    whole = ImageDataset(folder / "train", in_chans=1)
    assert data_fingerprint(whole.take(range(40))) == data_fingerprint(whole)
    assert data_fingerprint(whole.take([1, 2])) != data_fingerprint(whole.take([2, 1]))
    assert data_fingerprint(Subset(Greys(), [0])) is None
    known = Greys()
    known.fingerprint = 1
    # How a transform or a subclass changes the images, nobody can tell.
    files = ImageDataset(folder / "train", grey, in_chans=1)
    assert data_fingerprint(TransformedDataset(files, None)) is None
    assert data_fingerprint(Subset(files, [0])) is None

    class Relabelled(Subset[Any]):
        pass

    assert data_fingerprint(Relabelled(known, [0])) is None
    found = [data_fingerprint(Subset(known, part)) for part in ([0], [0], [1], [0, 1])]
    assert found[0] == found[1]
    assert len({str(each) for each in found}) == 3


class Sized(Dataset[Any]):
    """Pictures of given (width, height)."""

    classes = ("a", "b")

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", self.sizes[index]), index % 2


def notes_of(
    images: Dataset[Any], size: tuple[int, int] = (32, 32), **options: Any
) -> list[str]:
    encoder = load_encoder(
        "vit_tiny_patch16_224", img_size=size, pretrained=False, **options
    )
    return image_notes(images, EvalTransform(size, normalize=None), encoder)


@pytest.mark.parametrize(
    ("pictures", "size", "lost"),
    [
        ([(64, 32), (32, 64), (40, 40)], (32, 32), 0),  # 2:1 itself is not beyond it
        ([(65, 32), (32, 65), (40, 40)], (32, 32), 2),
        ([(40, 40), (900, 100)], (32, 32), 1),
        ([(96, 32), (32, 32)], (16, 48), 1),  # the square one loses two thirds
        ([(32, 96), (96, 32)], (48, 16), 1),
    ],
)
def test_image_notes__wide_pictures(
    pictures: list[tuple[int, int]], size: tuple[int, int], lost: int
) -> None:
    notes = notes_of(TransformedDataset(Sized(*pictures), None), size)
    assert len(notes) == (lost > 0)
    if lost:
        assert notes[0].startswith(f"{lost} of {len(pictures)} test images")
        assert f"{size[0]} x {size[1]} pixels of the central crop" in notes[0]
        assert "crop_ratio=1 cuts" in notes[0]
        assert "img_size=(height, width) takes" in notes[0]


def test_image_notes__of_a_folder(tmp_path: Path) -> None:
    for number in range(80):
        wide = Image.new("RGB", (60, 20) if number % 2 else (20, 20))
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        wide.save(tmp_path / str(number % 2) / f"{number:02}.png")
    (tmp_path / "0" / "00.png").write_bytes(b"no picture")
    encoder = load_encoder("vit_tiny_patch16_224", img_size=32, pretrained=False)
    images = ImageDataset(tmp_path, transform=len, on_error="skip")
    state = torch.get_rng_state()
    (note,) = image_notes(images, EvalTransform(32, normalize=None), encoder)
    # From all over the folder; the broken one is for others to tell.
    assert note.startswith("16 of 31 test images")
    assert images.transform is len
    assert images.on_error == "skip"
    assert torch.equal(torch.get_rng_state(), state)


def test_image_notes__tensors_of_the_users_own() -> None:
    class Floats(Sized):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.zeros(3, 32, 32), 0

    assert notes_of(TransformedDataset(Floats((9, 1)), None)) == []


def test_image_notes__normalisation() -> None:
    images = TransformedDataset(Sized((32, 32)), None)
    assert notes_of(images) == []
    transform = EvalTransform(32, normalize=None)
    options: dict[str, Any] = {
        "img_size": 32,
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
    }
    for name, expected in (
        ("vit_tiny_patch16_224", "mean 0.5, 0.5, 0.5 and deviation 0.5, 0.5, 0.5"),
        ("vit_base_patch16_224.mae", "mean 0.485, 0.456, 0.406 and deviation 0.229"),
        ("vit_base_patch16_clip_224", "mean 0.4815, 0.4578, 0.4082 and deviation"),
    ):
        encoder = load_encoder(timm.create_model(name, **options))
        (note,) = image_notes(images, transform, encoder)
        assert expected in note
    named = masked_encoder("vit_tiny_patch16_224", **options)
    named.mean = (0.1, 0.2, 0.3)
    (note,) = image_notes(images, transform, named)
    assert "mean 0.1, 0.2, 0.3 and" in note
