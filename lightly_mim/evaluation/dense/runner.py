"""Encodes the images of a segmentation, and runs protocols on their patch tokens.

Shapes: N images, C classes, (H, W) pixels, (h, w) patches, D features, P = h * w.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from lightly_mim.data import KeyedLoader, seed_from
from lightly_mim.data.segmentation import IGNORED, SegmentationDataset
from lightly_mim.evaluation.cache import cached_features
from lightly_mim.evaluation.dense.iou import class_iou, count_pixels, miou_interval
from lightly_mim.evaluation.dense.protocols import (
    DenseProtocol,
    PatchBank,
    Predictor,
    patch_labels,
)
from lightly_mim.evaluation.dense.results import DenseResult
from lightly_mim.evaluation.feature_files import FeatureStore
from lightly_mim.evaluation.features import (
    TOKENS,
    EncoderFeatures,
    Encoding,
    Features,
)
from lightly_mim.evaluation.fingerprints import files_fingerprint, hash_key
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.provenance import probe_device
from lightly_mim.evaluation.resume import Kept, Task

_HELD_OUT_PART = 5  # one of so many training images
_MAX_HELD_OUT = 100  # images: bounds memory and the time of the choice
_AT_A_TIME = 8  # images whose pixels are predicted: a number per pixel and class

Grid = tuple[int, int]


class Views(Dataset[tuple[list[Tensor], int, str]]):
    """The images of a segmentation alone, or their masks alone.

    Yields ([view], 0, filename) with a view of `SegmentationDataset`.
    """

    def __init__(
        self, data: SegmentationDataset, view: Literal["image", "mask"]
    ) -> None:
        self.data = data
        self.view = view

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells these files, and how they are read, from others."""
        data = self.data
        names = data.files.images if self.view == "image" else data.files.masks
        paths = [data.files.root / name for name in names]
        read = (
            {"in_chans": data.in_chans, "value_range": data.value_range}
            if self.view == "image"
            else {"values": data.values}
        )
        files = files_fingerprint(names, paths, [0] * len(names))
        return hash_key({"files": files, **read})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        view: Tensor = getattr(self.data, self.view)(index)
        return [view], 0, self.data.files.images[index]


class _Choice(NamedTuple):
    layer: int
    hyperparameters: dict[str, float]
    selection: list[dict[str, Any]]
    num_patches: int
    predict: Predictor


class _Layer(NamedTuple):
    """Patches of the training images, of one layer.

    `bank` is drawn from all of them, `fit` says which of it are not of held-out images,
    of which `held_out` has all tokens, (N, h, w, D).
    """

    bank: PatchBank
    fit: Tensor
    held_out: Tensor


@dataclass
class DenseRunner:
    """Makes the patch tokens that tasks need, and runs them."""

    models: Mapping[str, AnyEncoder]
    protocols: Mapping[str, DenseProtocol]
    train: SegmentationDataset
    test: SegmentationDataset
    classes: Sequence[str]
    kept: Kept
    how: Encoding
    layers: Sequence[int]
    max_patches: int
    seed: int
    stack: ExitStack
    features: list[dict[str, Features]] = field(default_factory=list)
    labels: dict[Grid, Tensor] = field(default_factory=dict)
    held_out: list[int] = field(default_factory=list)
    held_out_masks: list[Tensor] = field(default_factory=list)

    @property
    def home(self) -> torch.device:
        """Where protocols compute."""
        return probe_device(self.how.device)

    def encode(self, tasks: Sequence[Task]) -> None:
        """Passes over training and test images, or reads what was found before."""
        self.held_out = _held_out(len(self.train), self.seed)
        functions = {
            name: EncoderFeatures(encoder, self.layers, ["tokens"])
            for name, encoder in self.models.items()
            if name in {task.model for task in tasks}
        }
        # Without a directory they lie in a temporary one: memory would not hold them.
        root = self.kept.cache or Path(
            self.stack.enter_context(tempfile.TemporaryDirectory())
        )
        with self.how.ready(functions.values()):
            for part, data in enumerate((self.train, self.test)):
                stores = {
                    name: self.kept.store(name, part, len(data))
                    if self.kept.cache
                    else FeatureStore(root, {"model": name, "part": part}, len(data))
                    for name in functions
                }
                found = cached_features(
                    functions,
                    stores,
                    Views(data, "image"),
                    description=f"Encoding {('training', 'test')[part]} images",
                    **vars(self.how),
                )
                self.features.append(found)
        self._read_training_masks()

    def _read_training_masks(self) -> None:
        """Keeps the class of every training patch, and the masks of held-out images."""
        grids = {
            self._grid(name, tokens.shape[1])
            for name, features in self.features[0].items()
            for tokens in features.values.values()
        }
        labels: dict[Grid, list[Tensor]] = {grid: [] for grid in grids}
        held_out, number = {*self.held_out}, 0
        for masks in self._masks(self.train):
            for grid in grids:
                labels[grid].append(patch_labels(masks, grid, len(self.classes)))
            for mask in masks:
                if number in held_out:
                    self.held_out_masks.append(mask.short())
                number += 1
        self.labels = {grid: torch.cat(parts) for grid, parts in labels.items()}

    def _masks(self, data: SegmentationDataset) -> Iterator[Tensor]:
        """Yields the masks of a few images at a time, int64 with shape (N, H, W)."""
        loader = KeyedLoader(
            Views(data, "mask"),
            _AT_A_TIME,
            training=False,
            num_workers=self.how.num_workers,
        )
        for views, _, _ in loader:
            yield views[0].long()

    def run(self, task: Task) -> dict[str, Any]:
        """Runs a protocol for a model, and returns its row.

        Raises:
            ValueError: If no pixel of the test images has a class.
        """
        start = time.perf_counter()
        choice = self._choose(task)
        counts = self._score(task.model, choice)
        seconds = time.perf_counter() - start
        if not counts.any():
            raise ValueError("No pixel of the test images has a class.")
        low, high = miou_interval(counts, self.seed)
        ious = class_iou(counts.sum(dim=0))
        row = DenseResult(
            model=task.model,
            protocol=task.protocol,
            layer=choice.layer,
            hyperparameters=choice.hyperparameters,
            miou=float(ious.nanmean()),
            miou_low=low,
            miou_high=high,
            iou={
                name: None if iou.isnan() else float(iou)
                for name, iou in zip(self.classes, ious, strict=True)
            },
            pixel_accuracy=float(counts[..., 0].sum() / counts[..., [0, 2]].sum()),
            feature_seconds=sum(part[task.model].seconds for part in self.features),
            seconds=seconds,
            num_train=len(self.train),
            num_test=len(self.test),
            num_patches=choice.num_patches,
            selection=choice.selection,
        )
        return {"rows": [asdict(row)]}

    def _choose(self, task: Task) -> _Choice:
        """Chooses layer and hyper-parameters, and fits them on the whole bank."""
        settings = self.protocols[task.protocol]
        seed = seed_from(self.seed, "dense")
        num_classes = len(self.classes)
        found: list[dict[str, Any]] = []
        banks: dict[int | None, PatchBank] = {}
        for key in self.features[0][task.model].values:
            layer = self._layer(task.model, key[0])
            index = layer.fit.nonzero().flatten().to(self.home)
            part = PatchBank(layer.bank.tokens[index], layer.bank.labels[index])
            candidates = settings.predictors(part, num_classes, seed=seed)
            counts = torch.zeros(len(candidates), num_classes, 3)
            whole = torch.stack(self.held_out_masks)
            parts = [torch.split(each, _AT_A_TIME) for each in (layer.held_out, whole)]
            for tokens, mask in zip(*parts, strict=True):
                tokens, mask = tokens.to(self.home), mask.to(self.home).long()
                for i, (_, predict) in enumerate(candidates):
                    predicted = predict(tokens, (mask.shape[1], mask.shape[2]))
                    counts[i] += count_pixels(predicted, mask, num_classes).cpu()
            ious = [float(class_iou(each).nanmean()) for each in counts]
            # NaN if no pixel that was held out has a class.
            i = max(
                range(len(ious)), key=lambda i: -1 if math.isnan(ious[i]) else ious[i]
            )
            found.append({"layer": key[0], **candidates[i][0], "miou": ious[i]})
            banks[key[0]] = layer.bank
        best = max(found, key=lambda entry: entry["miou"])
        bank = banks[best["layer"]]
        chosen = {k: v for k, v in best.items() if k not in ("layer", "miou")}
        predict = settings.predictor(bank, num_classes, chosen, seed=seed)
        return _Choice(best["layer"], chosen, found, len(bank.labels), predict)

    def _layer(self, model: str, number: int | None) -> _Layer:
        """Draws patches of all training images, and takes held-out images whole."""
        tokens = self.features[0][model].values[number, TOKENS]
        grid = self._grid(model, tokens.shape[1])
        labels = self.labels[grid].flatten(1)
        kept = max(self.max_patches // len(tokens), 1)
        drawn = [
            _draw(each, kept, seed_from(self.seed, "patches", n))
            for n, each in enumerate(labels)
        ]
        counts = torch.tensor([len(each) for each in drawn])
        is_fit = torch.ones(len(tokens), dtype=torch.bool)
        is_fit[self.held_out] = False
        fit = is_fit.repeat_interleave(counts)
        if not bool(fit.any()):
            raise ValueError(
                "No pixel of the training images has a class: look at the masks "
                "and at ignore_index."
            )
        bank = PatchBank(
            torch.cat([tokens[n][each] for n, each in enumerate(drawn)]).float(),
            torch.cat([labels[n][each] for n, each in enumerate(drawn)]),
        )
        held_out = _on_grid(tokens[self.held_out], grid)
        return _Layer(PatchBank(*(part.to(self.home) for part in bank)), fit, held_out)

    def _score(self, model: str, choice: _Choice) -> Tensor:
        """Returns counts of pixels, (N, C, 3), see `count_pixels`."""
        tokens = self.features[1][model].values[choice.layer, TOKENS]
        grid = self._grid(model, tokens.shape[1])
        counts: list[Tensor] = []
        for masks in self._masks(self.test):
            part = _on_grid(tokens[len(counts) : len(counts) + len(masks)], grid)
            size = (masks.shape[1], masks.shape[2])
            predicted = choice.predict(part.to(self.home), size)
            counts += [
                count_pixels(*pair, len(self.classes)).cpu()
                for pair in zip(predicted, masks.to(self.home), strict=True)
            ]
        return torch.stack(counts)

    def _grid(self, model: str, num_tokens: int) -> Grid:
        return grid_of(self.models[model], num_tokens)


def grid_of(encoder: Any, num_tokens: int) -> Grid:
    """Returns how many patches lie along (height, width), in the images' aspect.

    Raises:
        ValueError: If that is no grid.
    """
    height, width = getattr(encoder, "grid", encoder.img_size)
    h = round(math.sqrt(num_tokens * height / width))
    w = num_tokens // max(h, 1)
    if h * w != num_tokens:
        raise ValueError(
            f"{num_tokens} patch tokens are no grid of the aspect of "
            f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels."
        )
    return h, w


def _on_grid(tokens: Tensor, grid: Grid) -> Tensor:
    return tokens.float().view(len(tokens), *grid, -1)


def _held_out(num_images: int, seed: int) -> list[int]:
    if num_images < 2:
        raise ValueError(
            "Hyper-parameters are chosen on held-out training images, which takes at "
            f"least 2, got {num_images}."
        )
    count = min(max(num_images // _HELD_OUT_PART, 1), _MAX_HELD_OUT)
    generator = Generator().manual_seed(seed_from(seed, "segmentation", "held out"))
    return sorted(torch.randperm(num_images, generator=generator)[:count].tolist())


def _draw(labels: Tensor, count: int, seed: int) -> Tensor:
    """Returns the numbers of some patches that have a class."""
    valid = (labels != IGNORED).nonzero().flatten()
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(valid), generator=generator)[:count]
    return valid[order]
