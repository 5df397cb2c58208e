"""What an encoder makes of some images: small files that a report shows.

`write_gallery` looks at images with a method, and keeps beside the run

gallery/gallery.json       what was found, and where it stands in the pictures
gallery/thumbnails.webp    the images
gallery/patches.webp       some of them, and the colours of their patch features
gallery/reconstructed.png  the best, typical and worst reconstructions

so that `lightly_mim.reporting` makes a page of them without encoder and images.
"""

from __future__ import annotations

import base64
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Generator, Tensor
from torch.utils.data import Dataset

from lightly_mim.data import KeyedLoader, seed_from
from lightly_mim.data.sources import spread_out
from lightly_mim.evaluation.features import batch_images, normalize_images
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.files import atomic_write, printable
from lightly_mim.masking import Mask
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring.images import undisturbed
from lightly_mim.reporting.figures import reconstruction_grid
from lightly_mim.reporting.page.reading import GALLERY, GALLERY_FILE

NUM_IMAGES = 300  # in the map and among the neighbours
NUM_QUERIES = 8  # images whose neighbours are shown
NUM_NEIGHBOURS = 6
NUM_PATCH_IMAGES = 6  # images whose patches are coloured
NUM_RECONSTRUCTED = 128  # images of which the best and the worst are looked for
MAX_SIDE = 28  # patches in a row or column that are compared; more are averaged

_THUMBNAIL = 56  # pixels
_PICTURE = 224
_BATCH = 64
_COLUMNS = 20
_QUANTILES = (0.02, 0.98)  # of a component, the darkest and the brightest colour
# Each twice: the ends and the middle of the images in the order of their errors.
_KINDS = ("best", "typical", "worst")


def write_gallery(
    directory: Path | str,
    method: MaskedImageModel,
    images: Dataset[Any],
    name: str,
) -> None:
    """Looks at images with a method, and writes what a report shows of it.

    Args:
        directory:
            The run directory.
        method:
            The method. Its mode, its weights and all random states stay as they are.
        images:
            Data set of (image, label, filename), uint8 images of the encoder's size or
            normalised ones, without augmentation. At most `NUM_IMAGES`, from all over
            it, are looked at. Labels, where there are any, are shown.
        name:
            What the page calls these images, such as "validation images".

    Raises:
        OSError: If it cannot be written.
    """
    folder = Path(directory) / GALLERY
    few = spread_out(images, NUM_IMAGES)
    loader = KeyedLoader(
        few, min(_BATCH, len(few)), training=False, num_workers=0, labels=None
    )
    batches = list(loader)
    shown = torch.cat([batch_images(batch) for batch in batches])
    labels = torch.cat([batch[1] for batch in batches]).tolist()
    files = [printable(str(file)) for batch in batches for file in batch[2]]
    encoder = method.encoder
    normalised = normalize_images(shown, encoder.mean, encoder.std)
    pixels = _to_unit(normalised, method)
    classes = list(getattr(images, "classes", None) or [])
    found: dict[str, Any] = {
        "version": 1,
        "from": name,
        "of": len(images),  # type: ignore[arg-type]
        "files": files,
        "labels": labels if classes else None,
        "classes": [printable(str(c)) for c in classes],
        "thumbnails": {"side": _THUMBNAIL, "columns": _COLUMNS},
    }
    with undisturbed(method) as device, torch.no_grad():
        parts = torch.split(normalised, _BATCH)
        features = torch.cat(
            [
                encoder.embed(part.to(device), pool="mean").float().cpu()
                for part in parts
            ]
        )
        chosen = _spread(len(shown), NUM_PATCH_IMAGES)
        maps = encoder.feature_map(normalised[chosen].to(device)).float().cpu()
        drawn = _reconstruct(method, normalised[:NUM_RECONSTRUCTED], device)
    found |= {"map": _map(features), "neighbours": _neighbours(features)}
    found["patches"] = _patches(maps, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    _save(_sheet(pixels, _THUMBNAIL, _COLUMNS), folder / "thumbnails.webp")
    _save(_patch_sheet(pixels[chosen], maps), folder / "patches.webp")
    if drawn is not None:
        found["reconstructed"] = _draw(pixels, *drawn, method, folder)
    else:
        (folder / "reconstructed.png").unlink(missing_ok=True)
    # Last: a page is made of what this file names.
    with atomic_write(folder / GALLERY_FILE) as temporary:
        temporary.write_text(json.dumps(found, allow_nan=False))


def _to_unit(images: Tensor, method: MaskedImageModel) -> Tensor:
    """Returns normalised images with values in [0, 1]."""
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (method.encoder.mean, method.encoder.std)
    )
    return (images * std + mean).clamp(0, 1)


def _spread(total: int, count: int) -> list[int]:
    count = min(count, total)
    return [total * number // count for number in range(count)]


def _standardised(features: Tensor) -> Tensor:
    """Returns features that are centred, scaled, and of unit length."""
    return F.normalize(Standardizer.fit(features)(features), dim=-1)


def _map(features: Tensor) -> dict[str, Any] | None:
    """Returns a place in the plane for each image, None if they are too few."""
    count = len(features)
    if count < 5:
        return None
    values = _standardised(features).numpy()
    # A collapsed encoder gives all images one place, of which t-SNE makes nothing.
    if float(np.ptp(values, axis=0).max()) < 1e-6:
        return None
    perplexity = min(30, (count - 1) / 3)
    places = TSNE(
        perplexity=perplexity, init="pca", metric="cosine", random_state=0
    ).fit_transform(values)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    return {
        "x": [round(float(x), 4) for x in places[:, 0]],
        "y": [round(float(y), 4) for y in places[:, 1]],
        "how": f"t-SNE (cosine, perplexity {perplexity:.3g}) of the mean of the last "
        "layer's patch tokens",
    }


def _neighbours(features: Tensor) -> list[dict[str, Any]]:
    values = _standardised(features)
    similar = values @ values.T
    similar.fill_diagonal_(-math.inf)
    count = min(NUM_NEIGHBOURS, len(values) - 1)
    found = []
    for query in _spread(len(values), NUM_QUERIES) if count else []:
        cosine, near = similar[query].topk(count)
        found.append(
            {
                "image": query,
                "near": near.tolist(),
                "cosine": [round(value, 4) for value in cosine.tolist()],
            }
        )
    return found


def _reconstruct(
    method: MaskedImageModel, images: Tensor, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Returns images with their masked pixels painted, in [0, 1], and the masks."""
    if not getattr(method.target, "drawable", False):
        return None
    generator = Generator().manual_seed(seed_from(0, "gallery"))
    painted, masks = [], []
    for part in torch.split(images, _BATCH):
        mask = Mask.of(method.draw_mask(part, generator))
        pasted = method.reconstruct(part.to(device), mask.to(device))
        painted.append(_to_unit(pasted.float().cpu(), method))
        masks.append(mask.pixels((part.shape[-2], part.shape[-1])))
    return torch.cat(painted), torch.cat(masks)


def _draw(
    pixels: Tensor,
    painted: Tensor,
    masked: Tensor,
    method: MaskedImageModel,
    folder: Path,
) -> dict[str, Any]:
    """Writes the best, typical and worst reconstructions, and returns their errors."""
    pixels = pixels[: len(painted)]
    squares = (painted - pixels).square().mean(dim=1, keepdim=True) * masked
    errors = squares.sum(dim=(1, 2, 3)) / masked.sum(dim=(1, 2, 3)).clamp(min=1)
    order = errors.argsort(stable=True).tolist()
    count = len(order)
    middle = max(count // 2 - 1, 0)
    places = [0, 1, middle, middle + 1, count - 2, count - 1]
    rows = (
        [
            {"kind": _KINDS[number // 2], "image": order[place]}
            for number, place in enumerate(places)
        ]
        if count >= len(places)
        else [{"kind": "any", "image": image} for image in order]
    )
    chosen = [row["image"] for row in rows]
    for row in rows:
        row["error"] = float(f"{errors[row['image']].sqrt():.4g}")
    reconstruction_grid(
        pixels[chosen],
        painted[chosen],
        masked[chosen],
        folder / "reconstructed.png",
        title=f"best, typical and worst of {count} images",
        note=getattr(method.target, "picture_note", ""),
    )
    return {
        "rows": rows,
        "of": count,
        "note": getattr(method.target, "picture_note", ""),
    }


# Patches.


def _patches(maps: Tensor, chosen: Sequence[int]) -> dict[str, Any]:
    """Returns how similar each patch of an image is to each other one.

    Features are centred over the patches of all images here, since those of one image
    have much in common. Similarities from -1 to 1 are whole numbers from 0 to 255.
    """
    height, width = maps.shape[-2:]
    side = min(height, MAX_SIDE), min(width, MAX_SIDE)
    if side != (height, width):
        maps = F.adaptive_avg_pool2d(maps, side)
    tokens = maps.flatten(2).transpose(1, 2)  # (images, patches, dim)
    tokens = _standardised(tokens.flatten(0, 1)).view_as(tokens)
    similar = (tokens @ tokens.transpose(1, 2) + 1) * 127.5
    values = similar.round().clamp(0, 255).to(torch.uint8).numpy()
    return {
        "images": list(chosen),
        "grid": list(side),
        "averaged_from": [height, width] if side != (height, width) else None,
        "similarity": [base64.b64encode(v.tobytes()).decode() for v in values],
    }


def _patch_sheet(pixels: Tensor, maps: Tensor) -> Image.Image:
    """Returns rows of an image, its patches' colours jointly and by themselves."""
    tokens = maps.flatten(2).transpose(1, 2).numpy()
    grid = (maps.shape[-2], maps.shape[-1])
    joint = _colours(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:2], 3)
    own = [_colours(part) for part in tokens]
    height, width = pixels.shape[-2:]
    scale = _PICTURE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    sheet = Image.new("RGB", (3 * size[0], len(pixels) * size[1]))
    for row, image in enumerate(_as_pictures(pixels)):
        sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (0, row * size[1]))
        for column, colours in enumerate((joint[row], own[row]), start=1):
            cell = Image.fromarray(colours.reshape(*grid, 3)).resize(
                size, Image.Resampling.NEAREST
            )
            sheet.paste(cell, (column * size[0], row * size[1]))
    return sheet


def _colours(tokens: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns three principal components of features as red, green and blue.

    The sign of a component is the one that scikit-learn fixes: its largest loading is
    positive.
    """
    count = min(3, *tokens.shape)
    with warnings.catch_warnings():  # of features that are all the same
        warnings.simplefilter("ignore", RuntimeWarning)
        values = PCA(count, random_state=0, svd_solver="full").fit_transform(tokens)
    low, high = np.quantile(values, _QUANTILES, axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-9)
    colours = np.full((len(tokens), 3), 0.5)
    colours[:, :count] = np.nan_to_num(scaled.clip(0, 1))
    return (255 * colours).round().astype(np.uint8)


# Pictures.


def _as_pictures(images: Tensor) -> list[Image.Image]:
    shown = (
        images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    )
    values = shown.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in values.contiguous().numpy()]


def _sheet(images: Tensor, side: int, columns: int) -> Image.Image:
    """Returns small squares of the images' middles, side by side."""
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for number, image in enumerate(_as_pictures(images)):
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
        place = (number % columns * side, number // columns * side)
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)
    return sheet


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="WEBP", quality=85, method=4)
