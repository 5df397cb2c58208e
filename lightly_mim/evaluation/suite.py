"""`evaluate(...)`: several protocols on the same features, and baselines beside them.

Every choice (layer, pooling, k, temperature, learning rate) is made on training images;
the test images are scored once per protocol, with that choice.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from rich.console import Group
from rich.progress import track
from torch import nn
from torch.utils.data import Dataset

from lightly_mim.checkpoints import encoder_spec
from lightly_mim.data import ImageDataset, KeyedLoader, open_data, seed_from
from lightly_mim.data.sources import Data
from lightly_mim.encoders import Encoder, MaskedEncoder, Pool
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    FeatureFunction,
    Features,
    PixelFeatures,
    Precision,
    collect_features,
    evaluating,
)
from lightly_mim.evaluation.knn import KNN
from lightly_mim.evaluation.linear import Linear
from lightly_mim.evaluation.loading import at_random, load_encoder
from lightly_mim.evaluation.protocol import FeatureProtocol
from lightly_mim.files import atomic_write
from lightly_mim.patches import Size
from lightly_mim.reporting import results_table, results_text
from lightly_mim.transforms import EvalTransform

ProtocolName = Literal["knn", "linear"]
Baseline = Literal["random", "pixels"]

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Result:
    """What one protocol says of one model: a row of the table and of `results.json`.

    Attributes:
        model:
            The encoder, or the baseline.
        protocol:
            "knn" or "linear".
        layer:
            The chosen layer, from 0. None for raw pixels.
        pooling:
            The chosen pooling.
        hyperparameters:
            The chosen `k` and `temperature`, or `learning_rate`.
        top1:
            Accuracy on the test images, in [0, 1].
        top1_low:
            Lower end of its 95 % interval (Wilson). It covers the draw of the test
            images, but not that of training images or seeds.
        top1_high:
            Upper end.
        top5:
            Share of test images whose class is among the five most probable, in [0, 1].
            None with five classes or fewer.
        feature_seconds:
            Time spent on the features of training and test images, reading the images
            excluded.
        seconds:
            Time spent on the protocol, features excluded.
        num_train:
            Number of training images.
        num_test:
            Number of test images.
        selection:
            For each layer and pooling its best hyper-parameters and their `accuracy` on
            the training images (leave-one-out for kNN, cross-validation for linear).
    """

    model: str
    protocol: str
    layer: int | None
    pooling: str
    hyperparameters: dict[str, float]
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    feature_seconds: float
    seconds: float
    num_train: int
    num_test: int
    selection: list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """All that an evaluation found. `rich.print` shows it as a table.

    Attributes:
        rows:
            One result per model and protocol.
        notes:
            What a reader of the table should know, one sentence each.
        record:
            What it takes to run it again: `command` (of the process), `arguments` (of
            `evaluate`), `encoder` (see `lightly_mim.checkpoints.EncoderCheckpoint`),
            `data` (names of the classes, numbers of images) and `versions`.
    """

    rows: list[Result]
    notes: list[str]
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns what `results.json` holds: `rows`, `notes`, and the record's keys."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "notes": self.notes, **self.record}

    def __rich__(self) -> Group:
        return Group(results_table([asdict(row) for row in self.rows]), *self.notes)

    def __str__(self) -> str:
        table = results_text([asdict(row) for row in self.rows])
        return "\n".join([table.rstrip(), *self.notes])


def evaluate(
    encoder: Encoder | Path,
    data: Data,
    protocols: Sequence[ProtocolName] = ("knn", "linear"),
    *,
    val: Data | None = None,
    layers: Sequence[int] = (-1,),
    pools: Sequence[Pool] | None = None,
    baselines: Sequence[Baseline] = (),
    out: Path | str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | None = None,
    precision: Precision = "32",
    crop_ratio: float = 224 / 256,
    pixel_size: int = 32,
    img_size: Size | None = None,
    in_chans: int = 3,
    pretrained: bool = True,
    knn: KNN = KNN(),  # noqa: B008, frozen
    linear: Linear = Linear(),  # noqa: B008, frozen
    progress: bool | None = None,
) -> Results:
    """Evaluates a frozen encoder on labelled images.

    The images go through the encoder once, resized and cropped at the centre, without
    augmentation. Layer, pooling and hyper-parameters are chosen on the training images;
    the test images are scored once with that choice.

    Args:
        encoder:
            The directory of a pretraining run or its `encoder.safetensors`; the name of
            a timm model; or, in Python, a timm model or one of our encoders.
        data:
            A folder with train/ and val/ and one folder per class in each; the name of
            a data set; or a data set of (image, label, filename). See
            `lightly_mim.data.open_data`.
        protocols:
            Any of "knn" (weighted k nearest neighbours) and "linear" (linear probe).
        val:
            The test images, if they do not come with `data`.
        layers:
            Layers to choose from: blocks of a ViT or stages of a Swin, from 0, or from
            the end if negative.
        pools:
            Poolings to choose from: "mean" of the patch tokens, "cls" for the class
            token, "cls+mean" for both. By default "mean", and "cls" if there is one.
        baselines:
            Any of "random" (the same encoder at random initialisation) and "pixels",
            which go through the same protocols.
        out:
            Directory that `results.json` is written to.
        overwrite:
            Replace a `results.json` that is there.
        seed:
            Seed of the random initialisation and of the linear probe.
        batch_size:
            Number of images that are encoded at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        precision:
            "32", or "bf16" to encode in bfloat16 autocast, several times as fast where
            the hardware computes in it.
        crop_ratio:
            Side of the central crop over that of the resized image. 1 for pictures
            whose margin counts.
        pixel_size:
            Side that images are resized to for the baseline "pixels".
        img_size:
            For the name of a timm model: size of the images in pixels, one number or
            height and width. By default the size that the model was made for.
        in_chans:
            For the name of a timm model: number of image channels.
        pretrained:
            For the name of a timm model: load timm's pretrained weights.
        knn:
            Settings of kNN.
        linear:
            Settings of the linear probe.
        progress:
            Show a progress bar while encoding. By default on a terminal.

    Returns:
        One row per model and protocol, notes, and what it takes to run it again.

    Raises:
        ValueError: If an argument is out of range, if the data has no labels or no test
            images, or if `out` holds results already. Nothing has been written then.
    """
    arguments = {name: _to_json(value) for name, value in locals().items()}
    _check_choice("protocols", protocols, get_args(ProtocolName))
    _check_choice("baselines", baselines or ["pixels"], get_args(Baseline))
    file = None if out is None else _results_file(Path(out), overwrite)
    settings: dict[str, FeatureProtocol] = {"knn": knn, "linear": linear}
    model = load_encoder(
        encoder, img_size=img_size, in_chans=in_chans, pretrained=pretrained
    )
    train, test = _open_labelled(data, val, model, crop_ratio)
    num_train = len(train)  # type: ignore[arg-type]
    notes = [note for name in protocols for note in settings[name].check(num_train)]
    taken: Sequence[Pool] = ("mean", "cls") if pools is None else pools
    if pools is None and not model.has_class_token:
        taken = ("mean",)
        notes.append("The encoder has no class token: features are means of patches.")

    encoders = {_model_name(encoder, model): model}
    if "random" in baselines:
        encoders["random initialisation"] = at_random(model, seed)
    functions: dict[str, FeatureFunction] = {
        name: EncoderFeatures(each, layers, taken) for name, each in encoders.items()
    }
    if "pixels" in baselines:
        functions["raw pixels"] = PixelFeatures(pixel_size)

    place = _device(device)
    show = sys.stdout.isatty() if progress is None else progress
    features: list[dict[str, Features]] = []
    with ExitStack() as stack:
        for each in encoders.values():
            each.choose_attention(place, bf16=precision == "bf16")
            stack.enter_context(evaluating(each, place))
        for images, part in ((train, "training"), (test, "test")):
            loader = KeyedLoader(
                images, batch_size, training=False, num_workers=num_workers
            )
            features.append(
                collect_features(
                    functions,
                    track(loader, f"Encoding {part} images", disable=not show),
                    model.mean,
                    model.std,
                    device=place,
                    precision=precision,
                )
            )
    classes = _class_names(train, *features)
    if len(classes) == 1:
        notes.append("All images are of one class, so every accuracy is 1.")
    rows = [
        _run(
            name,
            protocol,
            settings[protocol],
            features[0][name],
            features[1][name],
            len(classes),
            seed_from(seed, "evaluation", protocol),
            # Probes compute in float64 in places, which Apple's accelerator does not.
            place if place.type == "cuda" else torch.device("cpu"),
        )
        for name in functions
        for protocol in protocols
    ]
    counts = {"num_train": rows[0].num_train, "num_test": rows[0].num_test}
    record = {
        "command": shlex.join(sys.orig_argv),
        "arguments": arguments,
        "encoder": encoder_spec(model),
        "data": {"classes": classes, **counts},
        "versions": _versions(),
    }
    results = Results(rows, notes, record)
    if file is not None:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    return results


def wilson_interval(
    correct: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the interval of an accuracy that Wilson's score gives.

    Unlike the normal approximation it stays in [0, 1] and does not shrink to nothing at
    the ends.

    - [0]: Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953

    Args:
        correct:
            Number of images that were right.
        total:
            Number of images.
        confidence:
            Share of such intervals that hold the true accuracy.

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: If there are no images.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} of {total} images do not make an accuracy.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    accuracy = correct / total
    centre = accuracy + z**2 / (2 * total)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / total + z**2 / (4 * total**2))
    shrink = 1 + z**2 / total
    low, high = (centre - spread) / shrink, (centre + spread) / shrink
    return max(low, 0.0), min(high, 1.0)


def _run(
    name: str,
    protocol: str,
    settings: FeatureProtocol,
    train: Features,
    test: Features,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Result:
    start = time.perf_counter()
    outcome = settings(train, test, num_classes, seed=seed, device=device)
    seconds = time.perf_counter() - start
    hits = outcome.ranked == test.labels[:, None]  # (num_test, num_ranks)
    correct, total = int(hits[:, 0].sum()), len(test)
    low, high = wilson_interval(correct, total)
    layer, pooling = outcome.key
    return Result(
        model=name,
        protocol=protocol,
        layer=layer,
        pooling=pooling,
        hyperparameters=outcome.hyperparameters,
        top1=correct / total,
        top1_low=low,
        top1_high=high,
        top5=int(hits.any(dim=1).sum()) / total if num_classes > 5 else None,
        feature_seconds=train.seconds + test.seconds,
        seconds=seconds,
        num_train=len(train),
        num_test=total,
        selection=outcome.selection,
    )


def _results_file(out: Path, overwrite: bool) -> Path:
    file = out / RESULTS_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: pass a directory as out.")
    if file.exists() and not overwrite:
        raise ValueError(
            f"{file} is there already: pass overwrite, or another directory as out."
        )
    return file


def _open_labelled(
    data: Data, val: Data | None, encoder: MaskedEncoder, crop_ratio: float
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Opens training and test images, and makes sure that there are both, with labels.

    A data set in Python may have labels without naming classes; `_class_names` sees to
    that once the labels have been read.
    """
    transform = EvalTransform(encoder.img_size, crop_ratio, normalize=None)
    train, test = open_data(data, val, transform=transform, in_chans=encoder.in_chans)
    if test is None:
        raise ValueError(
            f"There are no test images for {_describe(data)}. Give a folder that holds "
            "train/ and val/, or the test images as val."
        )
    for part, source in ((train, data), (test, data if val is None else val)):
        if isinstance(part, ImageDataset) and not part.classes:
            raise ValueError(
                f"The images of {_describe(source)} have no labels: an evaluation "
                "needs one folder per class."
            )
    return train, test


def _class_names(train: Dataset[Any], *features: Mapping[str, Features]) -> list[str]:
    """Returns the names of the classes, numbers if the data does not tell."""
    names: list[str] = list(getattr(train, "classes", []))
    labels = [next(iter(part.values())).labels for part in features]
    largest = max(int(part.max()) for part in labels)
    if not names and largest == 0:
        raise ValueError(
            "The images have no labels: all are of class 0, and the data set names no "
            "classes. Give a data set of (image, label, filename)."
        )
    if names and largest >= len(names):
        raise ValueError(
            f"The labels go up to {largest}, but the data set names {len(names)} "
            f"classes: {', '.join(names)}."
        )
    return names or [str(number) for number in range(largest + 1)]


def _model_name(encoder: Encoder | Path, model: MaskedEncoder) -> str:
    if isinstance(encoder, nn.Module):
        return model.name or type(model.vit).__name__
    return str(encoder)


def _device(device: str | None) -> torch.device:
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"PyTorch cannot compute on device={device!r} here: {error}"
            ) from error
        return torch.device(device)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def _check_choice(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if isinstance(given, str) or not given or not set(given) <= set(allowed):
        raise ValueError(f"{name} is a list of {', '.join(allowed)}, got {given!r}.")


def _describe(data: Data) -> str:
    if isinstance(data, (str, os.PathLike)):
        return f"'{os.fspath(data)}'"
    return f"the {type(data).__name__}"


def _to_json(value: Any) -> Any:
    """Returns what a record shows of an argument."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _to_json(entry) for name, entry in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, os.PathLike) else _describe(value)


def _versions() -> dict[str, str]:
    packages = ("lightly-mim", "lightly", "timm", "torch", "torchvision")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}
