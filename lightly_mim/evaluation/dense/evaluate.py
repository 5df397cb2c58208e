"""Segmentation with frozen patch tokens: kNN and a linear classifier, scored by mIoU.

- [0]: CAPI, 2025, https://arxiv.org/abs/2502.08769 (`eval_segmentation.py`: kNN with
  k of 1, 3, 10 and 30 and a logistic regression on the patch tokens)
- [1]: DINOv2, 2023, https://arxiv.org/abs/2304.07193 (section 7.4: a linear layer on
  the patch tokens, its logits upsampled bilinearly)

Nothing of the encoder is trained. A patch has the class of most of its pixels. kNN
gives all pixels of a patch one class; the linear classifier's logits are upsampled to
the pixels. Both are scored on every pixel that has a class. The layer and the
hyper-parameters are chosen on a held-out fifth of the training images; then all of them
are used, and the test images are scored once.

What differs from published numbers: images are resized to the encoder's size and
cropped at the centre, with their masks, and scored at that size, in one pass without
sliding windows; the classifier is fitted on the classes of patches, not of pixels.

Shapes: B images, C classes, (H, W) pixels, (h, w) patches, D features, P patches.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Generator, Tensor

from lightly_mim.arguments import (
    NonEmpty,
    PositiveInt,
    Seed,
    Workers,
    checked,
)
from lightly_mim.data import KeyedLoader, keyed_random_state, seed_from
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.overlap import overlap_notes
from lightly_mim.data.segmentation import (
    IGNORED,
    MaskedFiles,
    SegmentationDataset,
    check_masks,
    open_segmentation,
)
from lightly_mim.encoders import Encoder, MaskedEncoder
from lightly_mim.encoders.tables import Tables
from lightly_mim.evaluation.broken import Part, find_readable
from lightly_mim.evaluation.dense.protocols import (
    DenseKNN,
    DenseLinear,
    DenseProtocol,
    PatchBank,
    Predictor,
    patch_labels,
)
from lightly_mim.evaluation.dense.results import (
    RESULTS_FILE,
    DenseResult,
    DenseResults,
    class_iou,
    count_pixels,
    miou_interval,
)
from lightly_mim.evaluation.features import Precision, evaluating, normalize_images
from lightly_mim.evaluation.loading import (
    at_random,
    describe_encoder,
    load_encoder,
    origin_notes,
)
from lightly_mim.evaluation.provenance import (
    choose_device,
    model_name,
    package_versions,
    to_json,
)
from lightly_mim.evaluation.results import RANDOM, results_file, to_text
from lightly_mim.files import atomic_write
from lightly_mim.patches import Size
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.training.machine import autocast, check_precision
from lightly_mim.transforms import EvalTransform

DenseProtocolName = Literal["knn", "linear"]

_HELD_OUT_PART = 5  # one of so many training images
_MAX_HELD_OUT = 100  # images: bounds memory and the time of the choice
_AT_A_TIME = 8  # images whose pixels are predicted


@checked
def evaluate_dense(
    encoder: Encoder | Path,
    data: str | Path,
    protocols: NonEmpty[DenseProtocolName] = ("knn", "linear"),
    *,
    val: str | Path | None = None,
    classes: Sequence[str] | None = None,
    ignore_index: Sequence[int] = (255,),
    layers: NonEmpty[int] = (-1,),
    random_baseline: bool = False,
    out: Path | str | None = None,
    overwrite: bool = False,
    seed: Seed = 0,
    batch_size: PositiveInt = 32,
    num_workers: Workers | None = None,
    device: str | None = None,
    precision: Precision = "32",
    on_error: OnError = "raise",
    value_range: ValueRange | None = None,
    img_size: Size | None = None,
    tables: Tables | None = None,
    in_chans: PositiveInt = 3,
    pretrained: bool = True,
    max_patches: PositiveInt = 50_000,
    knn: DenseKNN = DenseKNN(),  # noqa: B008, frozen
    linear: DenseLinear = DenseLinear(),  # noqa: B008, frozen
    progress: bool | None = None,
) -> DenseResults:
    """Evaluates a frozen encoder on images whose pixels have classes.

    The images go through the encoder once, resized so that the short side fits and
    cropped at the centre, as are their masks (which are read once more before, to find
    mistakes early). The layer and the hyper-parameters are chosen on a fifth of the
    training images, 100 at most; the test images are scored once with that choice, at
    the size of the encoder's images.

    Args:
        encoder:
            The directory of a pretraining run or its `encoder.safetensors`; the name of
            a timm model; or, in Python, a timm model or one of our encoders.
        data:
            A folder that holds train/ and val/, or the training images; each of these
            holds images/ and masks/. The mask of images/a/b.jpg is masks/a/b.png, with
            one channel or a palette. Without test images, a fifth is held out by the
            seed.
        protocols:
            Any of "knn" and "linear".
        val:
            The test images, if they do not come with `data`.
        classes:
            Names of the classes, whose numbers in the masks are 0, 1, 2, and so on. By
            default every value that occurs is a class.
        ignore_index:
            Values in the masks that are no class; ADE20K ignores 0 and 255.
        layers:
            Layers to choose from: blocks of a ViT or stages of a Swin, from 0, or from
            the end if negative. The earlier stages of a Swin have more patches.
        random_baseline:
            Evaluate the same encoder at random initialisation, too.
        out:
            Directory that `dense.json` is written to.
        overwrite:
            Replace a `dense.json` that is there.
        seed:
            Seed of what is held out and drawn, and of the random initialisation.
        batch_size:
            Number of images that are encoded at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        precision:
            "32", "bf16" to encode in bfloat16 autocast, or on GPUs "16".
        on_error:
            What an image or a mask does that cannot be read: "raise" an error that
            names it, or "skip", which leaves both out and says how many, by reason. All
            are read once more for that.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits. By default those that a run was pretrained with, else
            (0, 65535).
        img_size:
            For a run and the name of a timm model: size of the images in pixels, one
            number or height and width. By default the size that the model was made for.
            The encoder of a run is resized.
        tables:
            See `lightly_mim.evaluation.evaluate`.
        in_chans:
            For the name of a timm model: number of image channels.
        pretrained:
            For the name of a timm model: load timm's pretrained weights.
        max_patches:
            Number of training patches that are kept, drawn evenly from all images, at
            least one of each. Bounds the memory, with the patches of the held-out
            images.
        knn:
            Settings of kNN.
        linear:
            Settings of the linear classifier.
        progress:
            Show a progress bar while encoding. By default on a terminal.

    Returns:
        One row per encoder and protocol, notes, and what it takes to run it again.

    Raises:
        ValueError: If an argument is out of range, if masks are missing or do not fit
            their images or classes, or if `out` holds results already. Nothing has been
            written then.
    """
    arguments = {name: to_json(value) for name, value in locals().items()}
    file = None if out is None else results_file(Path(out), overwrite, RESULTS_FILE)
    settings: dict[str, DenseProtocol] = {"knn": knn, "linear": linear}
    for name, setting in settings.items():
        if name not in protocols and setting != type(setting)():
            warnings.warn(
                f"{name} does nothing here: protocols={list(protocols)} does not name "
                "it.",
                stacklevel=3,
            )
    with keyed_random_state(seed, "evaluation", "encoder"):
        model = load_encoder(
            encoder,
            img_size=img_size,
            tables=tables,
            in_chans=in_chans,
            pretrained=pretrained,
        )
    chosen_layers = _check_layers(layers, model.num_layers)
    train_files, test_files, held_out = open_segmentation(
        data, val, seed=seed, in_chans=model.in_chans
    )
    if value_range is None:
        value_range = getattr(model, "value_range", None)
    transform = EvalTransform(model.img_size, crop_ratio=1.0, normalize=None)
    notes = origin_notes(model, resized=img_size is not None)
    show = sys.stdout.isatty() if progress is None else progress
    if on_error == "skip":

        def whole(files: MaskedFiles, part: Part) -> MaskedFiles:
            pairs = SegmentationDataset(
                files, transform, (), model.in_chans, value_range
            )
            found = find_readable(pairs, part, num_workers, show)
            notes.extend(found.notes)
            return files.take(found.indices)

        train_files = whole(train_files, "training")
        test_files = whole(test_files, "test")
    both = train_files, test_files
    names, values = _classes(*both, classes, ignore_index, model)
    train, test = (
        SegmentationDataset(files, transform, values, model.in_chans, value_range)
        for files in both
    )
    if held_out:
        notes.append(
            f"{len(test)} of {len(train) + len(test)} images were held out for testing."
        )
    notes += overlap_notes(
        *([files.root / name for name in files.images] for files in both)
    )
    encoders = {model_name(encoder, model): model}
    if random_baseline:
        encoders[RANDOM] = at_random(model, seed)

    place = choose_device(device)
    check_precision(precision, place)
    rows: list[DenseResult] = []
    with ExitStack() as stack:
        for each in encoders.values():
            if isinstance(each, MaskedEncoder):
                each.choose_attention(place, bf16=precision == "bf16")
            stack.enter_context(evaluating(each, place))
        study = _Study(encoders, place, precision, batch_size, num_workers, show)
        banks = study.read_training(train, chosen_layers, len(names), max_patches, seed)
        predictors: dict[tuple[str, str], tuple[_Choice, float]] = {}
        for title, by_layer in banks.items():
            for name in protocols:
                start = time.perf_counter()
                choice = _choose(settings[name], by_layer, len(names), seed)
                seconds = time.perf_counter() - start
                predictors[title, name] = (choice, seconds)
        scores = study.score(test, predictors, len(names))
        for key, (choice, seconds) in predictors.items():
            title, protocol = key
            counts, predicting = scores[key]
            low, high = miou_interval(counts, seed)
            if not counts.any():
                raise ValueError("No pixel of the test images has a class.")
            ious = class_iou(counts.sum(dim=0))
            rows.append(
                DenseResult(
                    model=title,
                    protocol=protocol,
                    layer=choice.layer,
                    hyperparameters=choice.hyperparameters,
                    miou=float(ious.nanmean()),
                    miou_low=low,
                    miou_high=high,
                    iou={
                        each: None if iou.isnan() else float(iou)
                        for each, iou in zip(names, ious, strict=True)
                    },
                    pixel_accuracy=float(
                        counts[..., 0].sum() / counts[..., [0, 2]].sum()
                    ),
                    feature_seconds=study.seconds[title],
                    seconds=seconds + predicting,
                    num_train=len(train),
                    num_test=len(test),
                    num_patches=len(banks[title][choice.layer].bank.labels),
                    selection=choice.selection,
                )
            )
    record = {
        "command": shlex.join(sys.orig_argv),
        "arguments": arguments,
        "encoder": describe_encoder(model),
        "data": {"classes": names, "num_train": len(train), "num_test": len(test)},
        "versions": package_versions(),
    }
    results = DenseResults(rows, notes, record)
    if file is not None:
        with atomic_write(file) as temporary:
            temporary.write_text(to_text(results.to_dict()))
        write_page_or_warn(file.parent)
    return results


class _Layer(NamedTuple):
    """Patches of the training images, of one layer.

    `bank` is drawn from all of them, `fit` says which of it are not of held-out images,
    of which `held_out` has all tokens, (B, h, w, D), and `masks` the pixels, (B, H, W).
    """

    bank: PatchBank
    fit: Tensor
    held_out: Tensor
    masks: Tensor


class _Choice(NamedTuple):
    layer: int
    hyperparameters: dict[str, float]
    selection: list[dict[str, Any]]
    predict: Predictor


class _Study:
    """Passes over the images with several encoders at once."""

    def __init__(
        self,
        encoders: Mapping[str, Any],
        device: torch.device,
        precision: Precision,
        batch_size: int,
        num_workers: int | None,
        show: bool,
    ) -> None:
        self.encoders = encoders
        self.device = device
        # Classifiers compute in float64 in places; Apple's accelerator does not.
        self.home = device if device.type == "cuda" else torch.device("cpu")
        self.precision = precision
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.show = show
        self.seconds = dict.fromkeys(encoders, 0.0)

    def batches(
        self, data: SegmentationDataset, layers: Mapping[str, Sequence[int]], what: str
    ) -> Iterator[tuple[Tensor, dict[tuple[str, int], Tensor]]]:
        """Yields masks, (B, H, W), and tokens, (B, h, w, D), by encoder and layer."""
        loader = KeyedLoader(
            data, self.batch_size, training=False, num_workers=self.num_workers
        )
        for views, _, _ in track(
            loader, f"Encoding {what} images", disable=not self.show
        ):
            images = views[0].to(self.device)
            tokens = {}
            for name, encoder in self.encoders.items():
                start = time.perf_counter()
                pixels = normalize_images(images, encoder.mean, encoder.std)
                with torch.no_grad(), autocast(self.device, self.precision):
                    found = encoder.embed_layers(pixels, layers[name], ["tokens"])
                for (layer, _), value in found.items():
                    if not bool(value.isfinite().all()):
                        raise ValueError(
                            f"The tokens of layer {layer} hold NaN or infinite values: "
                            "the weights of the encoder are broken, or the images are."
                        )
                    grid = _grid(encoder, value.shape[1])
                    tokens[name, layer] = value.float().to(self.home).unflatten(1, grid)
                self.seconds[name] += time.perf_counter() - start
            yield views[1].to(self.home).long(), tokens

    def read_training(
        self,
        data: SegmentationDataset,
        layers: Sequence[int],
        num_classes: int,
        max_patches: int,
        seed: int,
    ) -> dict[str, dict[int, _Layer]]:
        """Keeps patches of all training images, and held-out images as a whole."""
        held_out = _held_out(len(data), seed)
        kept = max(max_patches // len(data), 1)
        parts: dict[tuple[str, int], list[list[Tensor]]] = {}
        number = 0
        wanted = dict.fromkeys(self.encoders, layers)
        for masks, tokens in self.batches(data, wanted, "training"):
            numbers = range(number, number + len(masks))
            number += len(masks)
            out = [i for i, n in enumerate(numbers) if n in held_out]
            for key, value in tokens.items():
                labels = patch_labels(
                    masks, (value.shape[1], value.shape[2]), num_classes
                )
                places = parts.setdefault(key, [[], [], [], [], []])
                for i, n in enumerate(numbers):
                    key_of_draw = seed_from(seed, "patches", n)
                    drawn = _draw(labels[i].flatten(), kept, key_of_draw)
                    places[0].append(value[i].flatten(0, 1)[drawn].cpu())
                    places[1].append(labels[i].flatten()[drawn].cpu())
                    places[2].append(torch.full((len(drawn),), n not in held_out))
                places[3].append(value[out].cpu())
                places[4].append(masks[out].short().cpu())
        banks: dict[str, dict[int, _Layer]] = {name: {} for name in self.encoders}
        for (name, layer), places in parts.items():
            bank, labels, fit, whole, masks = (torch.cat(part) for part in places)
            if not len(labels) or not bool(fit.any()):
                raise ValueError(
                    "No pixel of the training images has a class: look at the masks "
                    "and at ignore_index."
                )
            moved = bank.to(self.home), labels.to(self.home)
            banks[name][layer] = _Layer(PatchBank(*moved), fit, whole, masks)
        return banks

    def score(
        self,
        data: SegmentationDataset,
        predictors: Mapping[tuple[str, str], tuple[_Choice, float]],
        num_classes: int,
    ) -> dict[tuple[str, str], tuple[Tensor, float]]:
        """Returns counts, (num_images, C, 3), see `_counts`, and seconds."""
        layers: dict[str, list[int]] = {name: [] for name in self.encoders}
        for (name, _), (choice, _) in predictors.items():
            layers[name] = sorted({*layers[name], choice.layer})
        counts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in predictors}
        seconds = dict.fromkeys(predictors, 0.0)
        for masks, tokens in self.batches(data, layers, "test"):
            for key, (choice, _) in predictors.items():
                start = time.perf_counter()
                size = (masks.shape[1], masks.shape[2])
                parts = _split(tokens[key[0], choice.layer], masks)
                for part, part_masks in parts:
                    classes = choice.predict(part, size)
                    for predicted, mask in zip(classes, part_masks, strict=True):
                        counts[key].append(
                            count_pixels(predicted, mask, num_classes).cpu()
                        )
                seconds[key] += time.perf_counter() - start
        return {key: (torch.stack(counts[key]), seconds[key]) for key in predictors}


def _grid(encoder: Any, num_tokens: int) -> tuple[int, int]:
    """Returns how many patches lie along (height, width), in the images' aspect."""
    height, width = getattr(encoder, "grid", encoder.img_size)
    h = round(math.sqrt(num_tokens * height / width))
    w = num_tokens // max(h, 1)
    if h * w != num_tokens:
        raise ValueError(
            f"{num_tokens} patch tokens are no grid of the aspect of "
            f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels."
        )
    return h, w


def _held_out(num_images: int, seed: int) -> set[int]:
    if num_images < 2:
        raise ValueError(
            "Hyper-parameters are chosen on held-out training images, which takes at "
            f"least 2, got {num_images}."
        )
    count = min(max(num_images // _HELD_OUT_PART, 1), _MAX_HELD_OUT)
    generator = Generator().manual_seed(seed_from(seed, "segmentation", "held out"))
    return set(torch.randperm(num_images, generator=generator)[:count].tolist())


def _draw(labels: Tensor, count: int, seed: int) -> Tensor:
    """Returns the numbers of some patches that have a class."""
    valid = (labels != IGNORED).nonzero().flatten()
    generator = Generator().manual_seed(seed)
    order = torch.randperm(len(valid), generator=generator)[:count]
    return valid[order.to(valid.device)]


def _choose(
    settings: DenseProtocol, layers: Mapping[int, _Layer], num_classes: int, seed: int
) -> _Choice:
    """Chooses layer and hyper-parameters, and fits them on the whole bank."""
    seed = seed_from(seed, "dense")
    found: list[dict[str, Any]] = []
    for layer, (bank, fit, held_out, masks) in layers.items():
        index = fit.nonzero().flatten().to(bank.labels.device)
        part = PatchBank(bank.tokens[index], bank.labels[index])
        candidates = settings.predictors(part, num_classes, seed=seed)
        counts = torch.zeros(len(candidates), num_classes, 3)
        for tokens, mask in _split(held_out, masks):
            tokens, mask = tokens.to(bank.tokens.device), mask.to(bank.tokens.device)
            size = (mask.shape[1], mask.shape[2])
            for i, (_, predict) in enumerate(candidates):
                predicted = predict(tokens, size)
                counts[i] += count_pixels(predicted, mask.long(), num_classes).cpu()
        ious = [float(class_iou(each).nanmean()) for each in counts]
        # NaN if no pixel that was held out has a class.
        i = max(range(len(ious)), key=lambda i: -1 if math.isnan(ious[i]) else ious[i])
        found.append({"layer": layer, **candidates[i][0], "miou": ious[i]})
    best = max(found, key=lambda entry: entry["miou"])
    layer = best["layer"]
    chosen = {k: v for k, v in best.items() if k not in ("layer", "miou")}
    predict = settings.predictor(layers[layer].bank, num_classes, chosen, seed=seed)
    return _Choice(layer, chosen, found, predict)


def _split(tokens: Tensor, masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a few images at a time: their logits have a number per pixel and class."""
    parts = torch.split(tokens, _AT_A_TIME), torch.split(masks, _AT_A_TIME)
    yield from zip(*parts, strict=True)


def _check_layers(layers: Sequence[int], count: int) -> list[int]:
    if not layers or not all(-count <= layer < count for layer in layers):
        raise ValueError(
            f"layers is one or more of 0 to {count - 1} (or -{count} to -1, from the "
            f"end), got {list(layers)}."
        )
    return list(dict.fromkeys(layer % count for layer in layers))


def _classes(
    train: MaskedFiles,
    test: MaskedFiles,
    names: Sequence[str] | None,
    ignored: Sequence[int],
    model: Any,
) -> tuple[list[str], list[int]]:
    """Returns names and values of the classes, and checks all masks."""
    known = None if names is None else {*range(len(names)), *ignored}
    found: set[int] = set()
    for files in (train, test):
        found |= check_masks(files, model.in_chans, known)
    if names is not None:
        values = [value for value in range(len(names)) if value not in ignored]
        titles = [str(names[value]) for value in values]
    else:
        values = sorted(found - set(ignored))
        titles = [str(value) for value in values]
    if len(values) < 2:
        raise ValueError(
            f"A segmentation has at least two classes, and the masks of {train.root} "
            f"hold only {titles or 'pixels without a class'} (besides ignore_index="
            f"{list(ignored)})."
        )
    if len(set(titles)) < len(titles):
        raise ValueError(f"The names of the classes differ, got {list(names or [])}.")
    return titles, values
