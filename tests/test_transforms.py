from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from lightly.transforms import MAETransform as LightlyMAETransform
from lightly.transforms.torchvision_v2_compatibility import (
    torchvision_transforms as T,
)
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as torchvision_v1
from torchvision.transforms import v2

from lightly_mim.transforms import EvalTransform, MAETransform, SimMIMTransform


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


def _seeded(transform: Any, image: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transform(image)


class TestSimMIMTransform:
    @pytest.mark.parametrize("size", [192, (96, 160)])
    def test_call__equals_torchvision(self, photo: Image.Image, size: Any) -> None:
        theirs = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(size, scale=(0.67, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]),
            ]
        )
        for seed in range(5):
            (ours,) = _seeded(SimMIMTransform(size), photo, seed)
            torch.testing.assert_close(ours, _seeded(theirs, photo, seed))

    def test_call__close_to_the_official_pil_pipeline(self, photo: Image.Image) -> None:
        # data_simmim.py resizes with PIL's bilinear filter.
        official = torchvision_v1.Compose(
            [
                torchvision_v1.RandomResizedCrop(192, scale=(0.67, 1.0)),
                torchvision_v1.RandomHorizontalFlip(),
                torchvision_v1.PILToTensor(),
            ]
        )
        for seed in range(5):
            (ours,) = _seeded(SimMIMTransform(192, normalize=None), photo, seed)
            theirs = _seeded(official, photo, seed)
            assert (ours.int() - theirs.int()).abs().max() <= 1

    def test_call__is_bilinear_unlike_mae(self, photo: Image.Image) -> None:
        (ours,) = _seeded(SimMIMTransform(192), photo)
        (mae,) = _seeded(MAETransform(192, min_scale=0.67), photo)
        assert 0.02 < (ours - mae).abs().max() < 2

    def test_call__tensor_in_and_uint8_out(self, photo: Image.Image) -> None:
        transform = SimMIMTransform(64, normalize=None)
        pixels = v2.functional.pil_to_tensor(photo)
        (from_pil,) = _seeded(transform, photo)
        (from_tensor,) = _seeded(transform, pixels.contiguous())
        assert from_pil.dtype == torch.uint8
        assert from_pil.is_contiguous()
        assert torch.equal(from_pil, from_tensor)

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_call__any_channels(self, channels: int) -> None:
        image = torch.randint(0, 256, (channels, 40, 50), dtype=torch.uint8)
        normalize = {"mean": [0.4] * channels, "std": [0.2] * channels}
        assert SimMIMTransform(32, normalize=normalize)(image)[0].shape == (
            channels,
            32,
            32,
        )
        with pytest.raises(ValueError, match=f"3 channels.*image has {channels}"):
            SimMIMTransform(32)(image)

    def test_call__grey_pil(self, photo: Image.Image) -> None:
        (view,) = SimMIMTransform(32, normalize={"mean": [0.5], "std": [0.5]})(
            photo.convert("L")
        )
        assert view.shape == (1, 32, 32)
        assert view.min() >= -1
        assert view.max() <= 1

    def test_call__single_pixel(self) -> None:
        (view,) = SimMIMTransform(32, normalize=None)(Image.new("RGB", (1, 1), "red"))
        assert view.flatten(1).unique(dim=1).tolist() == [[255], [0], [0]]

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (Image.new("P", (8, 8)), "mode L or RGB, got P"),
            (Image.new("I;16", (8, 8)), "mode L or RGB, got I;16"),
            (torch.zeros(3, 8, 8), "torch.float32 tensor with shape"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"shape \(1, 3, 8, 8\)"),
            (np.zeros((8, 8, 3), np.uint8), "got a ndarray"),
        ],
    )
    def test_call__refuses(self, image: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SimMIMTransform(32)(image)
        with pytest.raises(ValueError, match=message):
            EvalTransform(32)(image)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"input_size": 0},
            {"min_scale": 0},
            {"min_scale": 1.1},
            {"ratio": (2, 1)},
            {"normalize": {"mean": [0.5, 0.5], "std": [1.0]}},
            {"normalize": {"mean": [0.5], "std": [0.0]}},
            {"normalize": {}},
        ],
    )
    def test_init__refuses(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            SimMIMTransform(**arguments)

    def test_in_lightly(self, photo: Image.Image, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            photo.save(tmp_path / name / "x.jpg")
        transform: Any = SimMIMTransform(48, normalize=None)
        dataset: Any = LightlyDataset(str(tmp_path), transform)
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=2, collate_fn=MultiViewCollate()
        )
        (views, labels, filenames) = next(iter(loader))
        assert len(views) == 1
        assert views[0].shape == (2, 3, 48, 48)
        assert views[0].dtype == torch.uint8
        assert labels.tolist() == [0, 1]
        assert filenames == ["a/x.jpg", "b/x.jpg"]

    def test_pickle(self, photo: Image.Image) -> None:
        transform = SimMIMTransform(32)
        copy = pickle.loads(pickle.dumps(transform))
        assert torch.equal(_seeded(transform, photo)[0], _seeded(copy, photo)[0])

    def test_decode_size(self) -> None:
        transform = SimMIMTransform(192)
        assert transform.decode_size((427, 640)) == (427, 640)
        height, width = transform.decode_size((3000, 4000))
        assert height / width == pytest.approx(0.75, rel=1e-2)
        # The smallest crop, widest or tallest, keeps twice the input's pixels.
        area = 0.67 * height * width
        assert (area / (4 / 3)) ** 0.5 == pytest.approx(2 * 192, rel=1e-2)


class TestMAETransform:
    @pytest.mark.parametrize("size", [224, (96, 160)])
    def test_call__equals_torchvision(self, photo: Image.Image, size: Any) -> None:
        theirs = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(
                    size,
                    scale=(0.2, 1.0),
                    interpolation=v2.InterpolationMode.BICUBIC,
                    antialias=True,
                ),
                v2.RandomHorizontalFlip(),
            ]
        )
        for seed in range(5):
            (ours,) = _seeded(MAETransform(size, normalize=None), photo, seed)
            assert ours.dtype == torch.uint8
            assert torch.equal(ours, _seeded(theirs, photo, seed))

    def test_call__close_to_lightlys(self, photo: Image.Image) -> None:
        # lightly resizes the PIL image: the same filter with PIL's rounding, which in
        # some crops moves a pixel in a thousand by more than one grey level.
        std = torch.tensor(IMAGENET_NORMALIZE["std"])[:, None, None]
        for seed in range(5):
            (ours,) = _seeded(MAETransform(), photo, seed)
            (theirs,) = _seeded(LightlyMAETransform(), photo, seed)
            assert ours.dtype == theirs.dtype == torch.float32
            difference = ((ours - theirs) * std * 255).abs()
            assert difference.mean() < 0.25
            assert (difference > 1.01).float().mean() < 0.002

    @pytest.mark.parametrize(
        "arguments", [{"input_size": 0}, {"min_scale": 1.1}, {"normalize": {}}]
    )
    def test_init__refuses(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            MAETransform(**arguments)

    def test_decode_size(self) -> None:
        # The smallest crop is smaller than SimMIM's: the picture is decoded larger.
        assert MAETransform(64).decode_size((427, 640)) > (
            SimMIMTransform(64).decode_size((427, 640))
        )
        height, width = MAETransform(64).decode_size((3000, 4000))
        assert (0.2 * height * width / (4 / 3)) ** 0.5 == pytest.approx(128, rel=1e-2)


class TestEvalTransform:
    @pytest.mark.parametrize("input_size", [224, 192, 96])
    @pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 500), (60, 400)])
    def test_call__equals_torchvision_on_squares(
        self, photo: Image.Image, input_size: int, size: tuple[int, int]
    ) -> None:
        theirs = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(
                    int(256 / 224 * input_size),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.CenterCrop(input_size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_NORMALIZE["mean"], IMAGENET_NORMALIZE["std"]),
            ]
        )
        image = photo.resize(size)
        torch.testing.assert_close(EvalTransform(input_size)(image), theirs(image))

    @pytest.mark.parametrize("size", [(640, 427), (100, 300), (31, 17)])
    @pytest.mark.parametrize("input_size", [(96, 160), (160, 96), (64, 64)])
    @pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
    def test_call__non_square_covers_without_padding(
        self, size: Any, input_size: Any, crop_ratio: Any
    ) -> None:
        # centre_crop pads with 0 where the image is too small.
        image = Image.new("RGB", size, (9, 9, 9))
        view = EvalTransform(input_size, crop_ratio, normalize=None)(image)
        assert view.shape == (3, *input_size)
        assert (view == 9).all()

    def test_call__grey(self, photo: Image.Image) -> None:
        transform = EvalTransform(64, normalize=None)
        view = transform(photo.convert("L"))
        assert view.shape == (1, 64, 64)
        assert view.dtype == torch.uint8
        with pytest.raises(ValueError, match="3 channels, but the image has 1"):
            EvalTransform(64)(photo.convert("L"))

    @pytest.mark.parametrize(
        "arguments", [{"crop_ratio": 0}, {"crop_ratio": 1.2}, {"input_size": (1, 2, 3)}]
    )
    def test_init__refuses(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            EvalTransform(**arguments)

    def test_decode_size(self) -> None:
        assert EvalTransform(224).decode_size((375, 500)) == (375, 500)
        assert EvalTransform(224).decode_size((3000, 4000)) == (512, 683)


@pytest.mark.parametrize("shape", [(1, 65000), (65000, 1), (3, 40001), (9000, 7)])
def test_eval__very_long_pictures_take_little_memory(shape: tuple[int, int]) -> None:
    # Resized whole, 1 x 65,000 pixels take 12.8 GB.
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    long = shape.index(max(shape)) + 1
    image.narrow(long, max(shape) // 2, max(shape) - max(shape) // 2).fill_(200)
    mask = (image[0] > 0).to(torch.int16)
    transform = EvalTransform(224, normalize=None)
    sizes = []
    resize = T.functional.resize

    def watched(pixels: Tensor, size: Any, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(size[0] * size[1])
        resized: Tensor = resize(pixels, size, *arguments, **options)
        return resized

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(T.functional, "resize", watched)
        view, part = transform(image), transform.crop_mask(mask)
    assert view.shape == (3, 224, 224)
    assert part.shape == (224, 224)
    assert max(sizes) < 20 * 256 * 256
    # The middle stays in the middle: half of it is dark, half bright.
    for half in (view.float().mean() / 200, part.float().mean()):
        assert 0.28 < half < 0.72  # a pixel of the file is up to 85 wide


@pytest.mark.parametrize("shape", [(40, 300), (500, 70), (64, 64), (30, 230)])
def test_eval__long_pictures_are_resized_whole(shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    short = min(shape)
    size = [side * 256 // short for side in shape]
    bicubic = T.InterpolationMode.BICUBIC
    whole = T.functional.resize(image, size, bicubic, antialias=True)
    expected = T.functional.center_crop(whole, [224, 224])
    assert torch.equal(EvalTransform(224, normalize=None)(image), expected)


def test_eval__the_middle_of_a_very_long_picture_is_that_of_the_whole() -> None:
    image = torch.randint(0, 256, (3, 40, 2000), dtype=torch.uint8)
    bicubic = T.InterpolationMode.BICUBIC
    whole = T.functional.resize(image, [64, 3200], bicubic, antialias=True)
    expected = T.functional.center_crop(whole, [64, 64])
    view = EvalTransform(64, 1.0, normalize=None)(image)
    assert (view.int() - expected.int()).abs().float().mean() < 1
