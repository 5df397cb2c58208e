"""Classifiers that outlive their evaluation: saved, loaded, and used on other images.

They lie in OUT/classifiers/<protocol>.safetensors, see `classifier_files.py`. Such a
file is data: an encoder that it names is taken from this machine, if it is there and
its weights are the same, and never fetched.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lightly_mim.arguments import PositiveInt, Workers, checked
from lightly_mim.checkpoints import Weights
from lightly_mim.checkpoints.spec import read_spec
from lightly_mim.data import ImageDataset, KeyedLoader
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.opening import is_memory_error
from lightly_mim.encoders import Encoder
from lightly_mim.evaluation.broken import find_readable
from lightly_mim.evaluation.classifier_files import CLASSIFIERS, Said, read_classifier
from lightly_mim.evaluation.features import evaluating, normalize_images
from lightly_mim.evaluation.fingerprints import encoder_fingerprint
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.loading import build_saved, load_encoder
from lightly_mim.evaluation.provenance import choose_device
from lightly_mim.evaluation.supervised.finetune import FineTuned
from lightly_mim.files import atomic_write, printable
from lightly_mim.transforms import EvalTransform

_LARGER = 8  # times the encoder's own size may the images be that a file asks for
_SHOWN = 20  # images in a printed table


class Classifier(nn.Module):
    """Gives normalised images logits.

    Attributes:
        classes:
            Names of the classes.
        accuracy:
            Accuracy on held-out training images, None if none were held out.
        transform:
            How images are prepared.
        value_range:
            See `lightly_mim.data.open_data`.
        encoder:
            The encoder, whose mean and standard deviation normalise images.
    """

    def __init__(self, encoder: AnyEncoder, model: nn.Module, said: Said) -> None:
        super().__init__()
        self.classes = list(said.classes)
        self.accuracy = said.accuracy
        height, width = said.img_size
        self.transform = EvalTransform((height, width), said.crop_ratio, normalize=None)
        levels = said.value_range
        self.value_range = None if levels is None else (levels[0], levels[1])
        self.encoder = encoder
        self._model = model
        # Layer and pooling that a probe reads.
        self._key = None if said.key is None else (said.key[0], said.key[1])

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits with shape (batch_size, num_classes)."""
        if self._key is None:
            logits: Tensor = self._model(images)
            return logits
        layer, pool = self._key
        pools: Any = [pool]
        found: Any = self.encoder.embed_layers(images, [layer], pools)
        logits = self._model(found[self._key].float())
        return logits


@checked
def load_classifier(
    model: Path | str, encoder: Encoder | Path | None = None
) -> Classifier:
    """Reads a classifier.

    Args:
        model:
            A file that an evaluation has left in classifiers/, or the directory of the
            evaluation: of several, the one that was best on held-out training images.
        encoder:
            What a probe's features come from, see `load_encoder`. By default where the
            file says that it was.

    Returns:
        The classifier, in evaluation mode on the CPU.

    Raises:
        ValueError: If there is no such file, if it is damaged, or if the encoder is not
            the one that the probe was fitted on.
        OSError: If the file cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        return _best_of(path, encoder)
    said, tensors = read_classifier(path)
    if said.key is None and encoder is not None:
        raise ValueError(
            f"{path} holds the whole fine-tuned network: leave encoder out."
        )
    found = None if said.key is None else _find_encoder(path, said, encoder)
    # Whether what a file says fits together, an image tells.
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if found is None:
                classifier = _build_finetuned(path, said, tensors).eval()
            else:
                classifier = _build_probe(found, said, tensors).eval()
            classifier(torch.zeros(1, classifier.encoder.in_chans, *said.img_size))
    except Exception as error:  # whatever PyTorch makes of shapes in a file
        if is_memory_error(error):
            raise
        raise ValueError(f"{path} cannot be built: {error}") from error
    return classifier


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of images. `rich.print` shows it as a table.

    Attributes:
        filenames:
            Name of each image.
        classes:
            Names of the classes.
        probabilities:
            Tensor with shape (num_images, num_classes).
        top:
            How many classes of an image are shown and written, the most probable first.
        notes:
            What a reader should know.
    """

    filenames: list[str]
    classes: list[str]
    probabilities: Tensor
    top: int
    notes: list[str]

    def rows(self) -> Iterator[list[str]]:
        """Yields the name of an image, and classes and probabilities in turn."""
        best = self.probabilities.topk(self.top, dim=1)
        for name, values, numbers in zip(self.filenames, *best, strict=True):
            row = [name]
            for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
                row += [self.classes[number], f"{value:.6f}"]
            yield row

    def header(self) -> list[str]:
        """Returns the names of the columns of `rows`."""
        numbers = range(1, self.top + 1)
        pairs = ([f"class {n}", f"probability {n}"] for n in numbers)
        return ["file", *(name for pair in pairs for name in pair)]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.header():
            table.add_column(name, overflow="fold")
        for number, row in enumerate(self.rows()):
            if number == _SHOWN:
                break
            table.add_row(*(Text(printable(cell)) for cell in row))
        yield table
        if (more := len(self.filenames) - _SHOWN) > 0:
            yield Text(f"and {more} more images; out writes all of them.")
        yield from map(Text, self.notes)


@checked
def predict(
    model: Path | str,
    images: Path | str,
    *,
    encoder: Encoder | Path | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    top: PositiveInt = 3,
    batch_size: PositiveInt = 64,
    num_workers: Workers | None = None,
    device: str | None = None,
    on_error: OnError = "raise",
    progress: bool | None = None,
) -> Predictions:
    """Tells the classes of images by a classifier that an evaluation has saved.

    Args:
        model:
            A file that an evaluation has left in classifiers/, or the directory of the
            evaluation: of several, the one that was best on held-out training images.
        images:
            An image, or a folder of images, also in sub-folders.
        encoder:
            What a probe's features come from. By default where the file says.
        out:
            A CSV file to write, with the name of each image, and its most probable
            classes and their probabilities.
        overwrite:
            Replace a file that is there.
        top:
            How many classes of an image to show and to write.
        batch_size:
            Number of images at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        on_error:
            What an image does that cannot be read: "raise" an error that names it, or
            "skip", which leaves it out and says how many, by reason.
        progress:
            Show a progress bar. By default on a terminal.

    Returns:
        The probabilities of all classes.

    Raises:
        ValueError: If there is no such model, encoder or image, or if `out` is there
            already.
        OSError: If a file cannot be read or written.
    """
    if out is not None:
        refuse_file(Path(out), (".csv",), overwrite)
    classifier = load_classifier(model, encoder)
    show = sys.stdout.isatty() if progress is None else progress
    data, notes = open_images(
        Path(images),
        classifier.transform,
        classifier.encoder.in_chans,
        classifier.value_range,
        on_error,
        num_workers,
        show,
    )
    place = choose_device(device)
    loader = KeyedLoader(data, batch_size, training=False, num_workers=num_workers)
    parts, filenames = [], []
    mean, std = classifier.encoder.mean, classifier.encoder.std
    with evaluating(classifier, place), torch.inference_mode():
        for batch in track(loader, "Predicting", disable=not show):
            pixels = normalize_images(batch[0].to(place), mean, std)
            parts.append(classifier(pixels).softmax(dim=1).cpu())
            filenames += batch[2]
    top = min(top, len(classifier.classes))
    found = Predictions(filenames, classifier.classes, torch.cat(parts), top, notes)
    if out is not None:
        with atomic_write(out) as temporary:
            with temporary.open(
                "w", newline="", encoding="utf-8", errors="surrogateescape"
            ) as file:
                csv.writer(file).writerows([found.header(), *found.rows()])
    return found


def refuse_file(path: Path, endings: tuple[str, ...], overwrite: bool) -> None:
    """Raises a ValueError if no file with one of these endings can be written there."""
    if path.suffix not in endings:
        raise ValueError(f"out ends with {' or '.join(endings)}, got out={path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file as out.")
    if path.exists() and not overwrite:
        raise ValueError(
            f"{path} is there already: pass overwrite, or another file as out."
        )


def open_images(
    images: Path,
    transform: EvalTransform,
    in_chans: int,
    value_range: ValueRange | None,
    on_error: OnError,
    num_workers: int | None,
    progress: bool,
) -> tuple[ImageDataset, list[str]]:
    """Opens an image, or a folder of images, which need no labels.

    Returns the data set of (image, label, filename), and notes of images left out.
    """
    if not images.exists():
        raise ValueError(f"There is no file or folder {printable(str(images))}.")
    alone = not images.is_dir()
    root = images.absolute().parent if alone else images
    data = ImageDataset(
        root, transform, in_chans=in_chans, value_range=value_range, on_error="raise"
    )
    if alone:
        if images.name not in data.filenames:
            raise ValueError(f"{printable(str(images))} is no image.")
        data = data.take([data.filenames.index(images.name)])
    if on_error == "raise":
        return data, []
    found = find_readable(data, "given", num_workers, progress)
    return data.take(found.indices), found.notes


def _best_of(folder: Path, encoder: Encoder | Path | None) -> Classifier:
    """Returns the classifier of an evaluation that was best on training images."""
    place = folder / CLASSIFIERS if (folder / CLASSIFIERS).is_dir() else folder
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no classifier. Evaluate with out={folder} and one of the "
            "protocols linear, logistic and finetune."
        )
    if len(files) == 1:
        return load_classifier(files[0], encoder)
    said = {path: read_classifier(path)[0].accuracy for path in files}
    accuracies = {path: value for path, value in said.items() if value is not None}
    if len(accuracies) < len(files):
        names = ", ".join(str(path) for path in files)
        raise ValueError(
            "Fine-tuning holds out no training images that classifiers could be "
            f"compared by. Pass one of {names}."
        )
    return load_classifier(max(files, key=lambda path: accuracies[path]), encoder)


def _find_encoder(path: Path, said: Said, given: Encoder | Path | None) -> AnyEncoder:
    """Returns the encoder of a probe, on this machine and with the same weights."""
    source = said.source
    if given is None:
        if not source or not Path(source).exists():
            raise ValueError(
                f"{path} belongs to the encoder "
                f"{source or 'that was passed as a module'}, which is not a file on "
                "this machine. Pass it as encoder."
            )
        place: Encoder | Path = Path(source)
    else:
        place = given
    found = load_encoder(place)
    height, width = said.img_size
    if tuple(found.img_size) != (height, width):
        sides = zip((height, width), found.img_size, strict=True)
        if any(side > _LARGER * own for side, own in sides):
            raise ValueError(
                f"{path} takes images of {height} x {width} pixels, and the encoder "
                f"is made for {found.img_size[0]} x {found.img_size[1]}. Load it at "
                "that size, and pass it as encoder."
            )
        found = load_encoder(place, img_size=(height, width))
    expected, is_now = said.fingerprint or {}, encoder_fingerprint(found)
    if is_now is None or is_now["weights"] != expected.get("weights"):
        raise ValueError(
            f"{path} was fitted on other weights than those of "
            f"{place if given is None else 'the given encoder'}. Pass the encoder "
            "that it was fitted on as encoder, or evaluate once more."
        )
    return found


def _build_probe(
    encoder: AnyEncoder, said: Said, tensors: dict[str, Tensor]
) -> Classifier:
    head = nn.Linear(tensors["weight"].shape[1], len(said.classes))
    head.load_state_dict(tensors)
    return Classifier(encoder, head, said)


def _build_finetuned(path: Path, said: Said, tensors: dict[str, Tensor]) -> Classifier:
    prefix = "encoder.vit."
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    spec = read_spec(json.dumps(said.encoder), own)
    if spec["img_size"] != list(said.img_size) or said.pool is None:
        raise ValueError(f"its encoder takes images of {spec['img_size']} pixels")
    encoder = build_saved(Weights("ours", spec, {}), path, strict=False)
    built = FineTuned(encoder, len(said.classes), said.pool, 1.0)
    built.load_state_dict(tensors)
    return Classifier(built.encoder, built, said)
