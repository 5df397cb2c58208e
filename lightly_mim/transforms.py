"""From a picture to the encoder's input, by paper.

The transforms follow lightly: argument names as in `lightly.transforms.MAETransform`,
and a training transform returns a list of views. They work on uint8 tensors, which
torchvision resizes about twice as fast as PIL images, and with `normalize=None` they
return them: a quarter of the bytes to copy to the device, which then normalises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from lightly.transforms.torchvision_v2_compatibility import (
    torchvision_transforms as T,
)
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL.Image import Image
from torch import Tensor

from lightly_mim.arguments import PositiveFloat, Share, checked
from lightly_mim.patches import Size, to_pair

Normalize = Mapping[str, Sequence[float]]

_LONG = 8  # times the target: of longer pictures, only the middle is resized


class _CropAndFlip:
    """A random resized crop, antialiased, and a random horizontal flip."""

    def __init__(
        self,
        input_size: Size,
        min_scale: float,
        ratio: tuple[float, float],
        normalize: Normalize | None,
        interpolation: T.InterpolationMode,
    ) -> None:
        if ratio[0] > ratio[1]:
            raise ValueError(
                "ratio is the smallest and the largest width / height of a crop, got "
                f"{ratio}."
            )
        self.input_size = to_pair(input_size, "input_size")
        self.min_scale = min_scale
        self.ratio = (ratio[0], ratio[1])
        self.normalize = _check_normalize(normalize)
        self.crop = T.RandomResizedCrop(
            self.input_size,
            scale=(min_scale, 1.0),
            ratio=self.ratio,
            interpolation=interpolation,
            antialias=True,
        )
        self.flip = T.RandomHorizontalFlip()

    def __call__(self, image: Image | Tensor) -> list[Tensor]:
        """Returns a list of one view of the image."""
        view = self.flip(self.crop(_to_uint8_tensor(image)))
        return [_normalize(view, self.normalize)]

    def decode_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size from which a picture may be decoded without visible loss.

        Args:
            image_size:
                (height, width) of the picture in its file.

        Returns:
            (height, width), never more than that of the file.
        """
        height, width = image_size
        area = self.min_scale * height * width
        smallest_crop = math.sqrt(area / self.ratio[1]), math.sqrt(area * self.ratio[0])
        return _scaled_down(image_size, smallest_crop, self.input_size)


@checked
class SimMIMTransform(_CropAndFlip):
    """Implements the view augmentation for SimMIM [0].

    Input to this transform:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height,
        width).

    Output of this transform:
        List of one tensor with shape (channels, height, width).

    Applies the following augmentations:
        - Random resized crop, bilinear with antialiasing
        - Random horizontal flip, probability 0.5

    Differs from `MAETransform` in the scale and in the interpolation, which is bicubic
    there. The defaults are those of SimMIM's `data/data_simmim.py`.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886

    Attributes:
        input_size:
            (height, width) of the view in pixels.
        min_scale:
            Smallest area of the random crop, as a part of the picture's.
        ratio:
            Smallest and largest width / height of the random crop.
        normalize:
            Dictionary with "mean" and "std", one number per channel, for images in
            [0, 1]; views are then float32. None gives uint8 views in 0..255.

    Raises:
        ValueError: If an argument is out of its range, and on a call with a picture
            whose kind or number of channels does not fit.
    """

    def __init__(
        self,
        input_size: Size = 224,
        min_scale: Share = 0.67,
        ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3),
        normalize: Normalize | None = IMAGENET_NORMALIZE,
    ) -> None:
        bilinear = T.InterpolationMode.BILINEAR
        super().__init__(input_size, min_scale, ratio, normalize, bilinear)


@checked
class MAETransform(_CropAndFlip):
    """Implements the view augmentation for MAE [0].

    Input to this transform:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height,
        width).

    Output of this transform:
        List of one tensor with shape (channels, height, width).

    Applies the following augmentations:
        - Random resized crop, bicubic with antialiasing
        - Random horizontal flip, probability 0.5

    The same views as lightly's `MAETransform`, which returns floats also with
    `normalize=None`; here that gives uint8. The defaults are the paper's (appendix A.1)
    and those of its reference code, `main_pretrain.py`.

    - [0]: Masked Autoencoder, 2021, https://arxiv.org/abs/2111.06377

    Attributes:
        input_size:
            (height, width) of the view in pixels.
        min_scale:
            Smallest area of the random crop, as a part of the picture's.
        ratio:
            Smallest and largest width / height of the random crop.
        normalize:
            Dictionary with "mean" and "std", one number per channel, for images in
            [0, 1]; views are then float32. None gives uint8 views in 0..255.

    Raises:
        ValueError: If an argument is out of its range, and on a call with a picture
            whose kind or number of channels does not fit.
    """

    def __init__(
        self,
        input_size: Size = 224,
        min_scale: Share = 0.2,
        ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3),
        normalize: Normalize | None = IMAGENET_NORMALIZE,
    ) -> None:
        bicubic = T.InterpolationMode.BICUBIC
        super().__init__(input_size, min_scale, ratio, normalize, bicubic)


@checked
class EvalTransform:
    """Resizes and crops the centre, as for the evaluations of MAE [0] and SimMIM [1].

    The picture is resized, bicubic with antialiasing, until it just covers `input_size
    / crop_ratio`, and `input_size` is cut from its centre; for a square input this is
    "short side to 256, centre crop of 224".

    Input to this transform:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height,
        width).

    Output of this transform:
        Tensor with shape (channels, height, width): not a list, since lightly's
        evaluations (`KNNClassifier`, `LinearClassifier`) take batches of plain images,
        collated by torch's default.

    - [0]: Masked Autoencoder, 2021, https://arxiv.org/abs/2111.06377, main_linprobe.py
    - [1]: SimMIM, 2021, https://arxiv.org/abs/2111.09886, data/data_finetune.py

    Attributes:
        input_size:
            (height, width) of the result in pixels.
        crop_ratio:
            Crop size over resized size, in (0, 1]. 1 cuts nothing from the short side.
        normalize:
            Dictionary with "mean" and "std", one number per channel, for images in
            [0, 1]; the result is then float32. None gives uint8 in 0..255.

    Raises:
        ValueError: If an argument is out of its range, and on a call with a picture
            whose kind or number of channels does not fit.
    """

    def __init__(
        self,
        input_size: Size = 224,
        crop_ratio: Share = 224 / 256,
        normalize: Normalize | None = IMAGENET_NORMALIZE,
    ) -> None:
        self.input_size = to_pair(input_size, "input_size")
        self.crop_ratio = crop_ratio
        self.normalize = _check_normalize(normalize)
        height, width = self.input_size
        # 224 / (224 / 256) may be a hair below 256: floor after rounding that away.
        self.resize_size = (
            math.floor(round(height / crop_ratio, 6)),
            math.floor(round(width / crop_ratio, 6)),
        )

    def __call__(self, image: Image | Tensor) -> Tensor:
        """Returns the centre of the image."""
        pixels = _middle(_to_uint8_tensor(image), self.resize_size)
        size = _cover(pixels.shape[-2:], self.resize_size)
        view = T.functional.resize(
            pixels, size, T.InterpolationMode.BICUBIC, antialias=True
        )
        view = T.functional.center_crop(view, list(self.input_size))
        return _normalize(view, self.normalize)

    def crop_mask(self, mask: Tensor) -> Tensor:
        """Returns the same part of a mask, where each pixel takes the nearest value.

        Args:
            mask:
                Tensor of whole numbers with shape (height, width), those of the image.

        Returns:
            Tensor with shape `input_size`.
        """
        mask = _middle(mask, self.resize_size)
        size = _cover(mask.shape, self.resize_size)
        nearest = T.InterpolationMode.NEAREST_EXACT
        view = T.functional.resize(mask[None], size, nearest)
        cropped: Tensor = T.functional.center_crop(view, list(self.input_size))[0]
        return cropped

    def decode_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size from which a picture may be decoded without visible loss.

        Args:
            image_size:
                (height, width) of the picture in its file.

        Returns:
            (height, width), never more than that of the file.
        """
        return _scaled_down(image_size, image_size, self.resize_size)


def _scaled_down(
    image_size: tuple[int, int],
    crop_size: tuple[float, float],
    target_size: tuple[int, int],
) -> tuple[int, int]:
    """Returns the size at which the crop still has twice the target's pixels a side.

    Twice, as PIL's `thumbnail` does by default (`reducing_gap=2.0`): a JPEG decoder
    that halves the picture first and then resizes by 2 or more is hard to tell from
    one that resizes the whole picture.
    """
    factor = max(2 * target_size[0] / crop_size[0], 2 * target_size[1] / crop_size[1])
    height, width = (math.ceil(min(factor, 1.0) * side) for side in image_size)
    return height, width


def _middle(pixels: Tensor, target_size: tuple[int, int]) -> Tensor:
    """Returns the middle of a very long picture, all others as they are.

    What is cut off lies outside the central crop of the resized picture, which would
    take gigabytes: 1 x 65,000 pixels, resized to a height of 256, 12.8 of them.
    """
    for side in (-2, -1):
        covered = _cover(pixels.shape[-2:], target_size)[side]
        if covered > _LONG * target_size[side]:
            length = pixels.shape[side]
            kept = math.ceil(length * _LONG * target_size[side] / covered)
            kept += (length - kept) % 2  # the middle stays where it is
            pixels = pixels.narrow(side, (length - kept) // 2, kept)
    return pixels


def _cover(image_size: Sequence[int], target_size: tuple[int, int]) -> list[int]:
    """Returns the smallest size of the image's aspect that covers the target.

    For a square target this rounds as torchvision's Resize(short side) does.
    """
    (height, width), (target_height, target_width) = image_size, target_size
    if target_height * width >= target_width * height:
        return [target_height, max(target_height * width // height, target_width)]
    return [max(target_width * height // width, target_height), target_width]


def _check_normalize(normalize: Normalize | None) -> Normalize | None:
    if normalize is None:
        return None
    mean, std = normalize.get("mean", ()), normalize.get("std", ())
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise ValueError(
            'normalize is None or {"mean": [...], "std": [...]} with one number per '
            f"channel each and every std above 0, got {normalize}."
        )
    return normalize


def _to_uint8_tensor(image: Image | Tensor) -> Tensor:
    """Returns a tensor with shape (channels, height, width), in PIL's memory order."""
    if isinstance(image, Image):
        if image.mode not in ("L", "RGB"):
            raise ValueError(
                f"The transform takes PIL images of mode L or RGB, got {image.mode}. "
                f'Convert it, for example with image.convert("RGB"), or read files '
                f"with lightly_mim.data.decode_image, which does."
            )
        pixels: Tensor = T.functional.pil_to_tensor(image)
        return pixels
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        given = (
            f"a {image.dtype} tensor with shape {tuple(image.shape)}"
            if isinstance(image, Tensor)
            else f"a {type(image).__name__}"
        )
        raise ValueError(
            f"The transform takes a PIL image or a uint8 tensor with shape (channels, "
            f"height, width), got {given}."
        )
    return image


def _normalize(image: Tensor, normalize: Normalize | None) -> Tensor:
    image = image.contiguous()
    if normalize is None:
        return image
    mean, std = list(normalize["mean"]), list(normalize["std"])
    if len(mean) != len(image):
        raise ValueError(
            f"normalize has {len(mean)} channels, but the image has {len(image)}. "
            f"Give one mean and one std per channel."
        )
    scaled: Tensor = T.functional.to_dtype(image, torch.float32, scale=True)
    normalized: Tensor = T.functional.normalize(scaled, mean, std)
    return normalized
