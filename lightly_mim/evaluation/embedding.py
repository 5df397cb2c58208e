"""`embed(...)`: features of images, written with the names of their files."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightly_mim.arguments import NonEmpty, PositiveInt, Share, Workers, checked
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.encoders import Encoder, Pool
from lightly_mim.evaluation.feature_files import key_name
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Encoding,
    Features,
    Precision,
)
from lightly_mim.evaluation.loading import load_encoder
from lightly_mim.evaluation.prediction import open_images, refuse_file
from lightly_mim.evaluation.provenance import choose_device
from lightly_mim.files import atomic_write
from lightly_mim.transforms import EvalTransform


@checked
def embed(
    encoder: Encoder | Path,
    images: Path | str,
    out: Path | str,
    *,
    layers: NonEmpty[int] = (-1,),
    pools: NonEmpty[Pool] | None = None,
    overwrite: bool = False,
    batch_size: PositiveInt = 64,
    num_workers: Workers | None = None,
    device: str | None = None,
    precision: Precision = "32",
    on_error: OnError = "raise",
    value_range: ValueRange | None = None,
    crop_ratio: Share = 224 / 256,
    progress: bool | None = None,
    **loading: Any,
) -> Features:
    """Writes features of images, with the names of their files.

    Args:
        encoder:
            What `evaluate` takes: a run, a file of weights, the name of a timm model,
            or a module.
        images:
            An image, or a folder of images, also in sub-folders.
        out:
            The file to write. Its ending says what it is: `.parquet` (one list per
            layer and pooling; needs the package pyarrow), `.csv` (one column per
            number), or `.npz` (arrays by the names "filenames", "layer11-mean"). If the
            images lie in folders of classes, "class" has their names.
        layers:
            Layers to take: blocks of a ViT or stages of a Swin, from 0, or from the end
            if negative.
        pools:
            Any of "mean", "cls" and "cls+mean". By default "mean".
        overwrite:
            Replace a file that is there.
        batch_size:
            Number of images at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        precision:
            "32", or "bf16" to encode in bfloat16 autocast.
        on_error:
            What an image does that cannot be read: "raise" an error that names it, or
            "skip", which leaves it out and says how many, by reason.
        value_range:
            The values of 16-bit pictures that become 0 and 255. By default those that a
            run was pretrained with, else (0, 65535).
        crop_ratio:
            Side of the central crop over that of the resized image.
        progress:
            Show a progress bar. By default on a terminal.
        loading:
            Other arguments of `load_encoder`, such as `img_size=224`.

    Returns:
        The features, in float32, held in memory as a whole.

    Raises:
        ValueError: If there is no such encoder, image, layer or pooling, if the ending
            is another or its package is missing, or if `out` is there already.
        OSError: If a file cannot be read or written.
    """
    out = Path(out)
    refuse_file(out, tuple(_WRITERS), overwrite)
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{out} takes the package pyarrow: install it, or write .csv or .npz."
        )
    model = load_encoder(encoder, **loading)
    if getattr(model, "names_features", False):
        function = EncoderFeatures(model)
    else:
        function = EncoderFeatures(model, layers, ("mean",) if pools is None else pools)
    if value_range is None:
        value_range = getattr(model, "value_range", None)
    transform = EvalTransform(model.img_size, crop_ratio, normalize=None)
    show = sys.stdout.isatty() if progress is None else progress
    data, notes = open_images(
        Path(images),
        transform,
        model.in_chans,
        value_range,
        on_error,
        num_workers,
        show,
    )
    how = Encoding(batch_size, num_workers, choose_device(device), precision, show)
    with how.ready([function]):
        made = how.collect({"encoder": function}, data, "Encoding")["encoder"]
    classes = data.classes and [data.classes[n] for n in made.labels.tolist()]
    with atomic_write(out) as temporary:
        _WRITERS[out.suffix](temporary, made, classes)
    for note in notes:
        print(note)
    named = ", ".join(map(key_name, made.values))
    print(f"{len(made)} images in {out}: {named}. Read it by {_READERS[out.suffix]}.")
    return made


_READERS = {
    ".npz": "numpy.load",
    ".csv": "pandas.read_csv",
    ".parquet": "pandas.read_parquet",
}


def _columns(features: Features, classes: list[str]) -> dict[str, Any]:
    columns: dict[str, Any] = {"filename": features.filenames}
    if classes:
        columns["class"] = classes
    return columns


def _write_csv(path: Path, features: Features, classes: list[str]) -> None:
    columns = _columns(features, classes)
    header = [*columns]
    for key, values in features.values.items():
        header += [f"{key_name(key)}-{number}" for number in range(values.shape[1])]
    matrix = torch.cat(list(features.values.values()), dim=1).numpy()
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for *words, row in zip(*columns.values(), matrix, strict=True):
            # As many digits as tell one float32 from the next.
            writer.writerow([*words, *(np.format_float_scientific(v) for v in row)])


def _write_npz(path: Path, features: Features, classes: list[str]) -> None:
    columns = _columns(features, classes)
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    arrays |= {key_name(key): v.numpy() for key, v in features.values.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _write_parquet(path: Path, features: Features, classes: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = _columns(features, classes)
    for key, values in features.values.items():
        flat = pyarrow.array(values.flatten().numpy())
        columns[key_name(key)] = pyarrow.FixedSizeListArray.from_arrays(
            flat, values.shape[1]
        )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


_WRITERS: dict[str, Callable[[Path, Features, list[str]], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".npz": _write_npz,
}
