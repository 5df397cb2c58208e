"""What features and results depend on, in a form that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from lightly_mim.checkpoints import hash_tensors
from lightly_mim.data import ImageDataset, TransformedDataset
from lightly_mim.evaluation.foreign_encoders import AnyEncoder, FunctionEncoder
from lightly_mim.evaluation.loading import describe_encoder


def hash_key(key: Mapping[str, Any]) -> str:
    """Returns 24 hexadecimal digits that stand for a key, in any order of its parts."""
    text = json.dumps(dict(key), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def data_fingerprint(data: Dataset[Any]) -> dict[str, Any] | None:
    """Returns what tells a set of images from others, without reading an image.

    Of a folder, also behind a name, the relative names, sizes and times of change of
    all files in order, and their labels. Of a `Subset`, that of the whole and the
    indices. Of any other data set its `fingerprint`, a string or number that it has to
    offer. It can be written as JSON, and is None if there is no telling.
    """
    if isinstance(data, ImageDataset):  # that we have opened, with a transform we know
        return _files(data)
    return _given(data.dataset if isinstance(data, TransformedDataset) else data)


def _given(data: Any) -> dict[str, Any] | None:
    """Returns the fingerprint of a data set that somebody else has made."""
    fingerprint = getattr(data, "fingerprint", None)
    if fingerprint is not None:
        return {"fingerprint": str(fingerprint), "num_images": len(data)}
    if type(data) is Subset:
        whole = _given(data.dataset)
        indices = hash_key({"indices": [int(index) for index in data.indices]})
        return None if whole is None else {"whole": whole, "indices": indices}
    if isinstance(data, ImageDataset) and data.transform is None:
        return _files(data)
    return None


def files_fingerprint(
    names: Sequence[str], paths: Sequence[Path], targets: Sequence[int]
) -> str:
    """Returns what tells files from others: names, sizes, times of change, labels."""
    digest = hashlib.sha256()
    for name, path, target in zip(names, paths, targets, strict=True):
        stat = path.stat()
        line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{target}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(data: ImageDataset) -> dict[str, Any]:
    found = {
        "files": files_fingerprint(data.filenames, data.paths, data.targets),
        "num_images": len(data),
        "in_chans": data.in_chans,
        "classes": data.classes,
    }
    if data.value_range is not None:
        found["value_range"] = list(data.value_range)
    return found


def encoder_fingerprint(encoder: AnyEncoder) -> dict[str, Any] | None:
    """Returns what tells an encoder from others: what it is, and its weights' hash.

    It can be written as JSON, and is None for a module with a feature function, whose
    code is not known, unless the function has a `fingerprint`.
    """
    spec = describe_encoder(encoder)
    spec.pop("version")
    for own in ("pool", "tables", "value_range"):  # an evaluation says its own
        spec.pop(own, None)
    model = encoder.model if not hasattr(encoder, "vit") else encoder.vit
    assert isinstance(model, nn.Module)
    found = {
        **spec,
        # Drop rates and norms are not among the weights.
        "modules": hashlib.sha256(repr(model).encode()).hexdigest(),
        "weights": hash_tensors(sorted(model.state_dict().items())),
    }
    if isinstance(encoder, FunctionEncoder):
        fingerprint = getattr(encoder.function, "fingerprint", None)
        if fingerprint is None:
            return None
        found["function"] = str(fingerprint)
    return found
