"""What an evaluation keeps while it is under way, so that nothing is made twice.

OUT/features/                a directory per encoder and set of images: `feature_files`
OUT/rows/<key>.json          what one protocol found for one model
OUT/checkpoints/<key>/       where a training goes on, until its row is there

Rows and checkpoints are removed once `results.json` is written. They, and features, are
keyed by everything that they depend on, so nothing of another evaluation is taken for
its own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from lightly_mim.evaluation.feature_files import FEATURES_VERSION, FeatureStore
from lightly_mim.evaluation.features import Precision
from lightly_mim.evaluation.fingerprints import (
    data_fingerprint,
    encoder_fingerprint,
    hash_key,
)
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.processes import World
from lightly_mim.evaluation.provenance import package_versions, to_json
from lightly_mim.evaluation.results import SCHEMA_VERSION
from lightly_mim.files import atomic_write, printable, read_sealed, sealed
from lightly_mim.transforms import EvalTransform

# Of what a kept row holds, and of protocols whose numbers changed.
_ROWS_VERSION = 4


class Task(NamedTuple):
    """One protocol for one model, by their names."""

    model: str
    protocol: str


def conditions(
    transform: EvalTransform,
    encoder: AnyEncoder,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """Returns what features depend on beside weights and images, for `Kept`."""
    return {
        "transform": vars(transform),
        "normalize": [list(encoder.mean), list(encoder.std)],
        "precision": precision,
        "device": device.type,
        "versions": package_versions(),
    }


class Kept:
    """Keeps features, rows and checkpoints of one evaluation.

    Rows lie in `out`, and features in `cache` or features/ in `out`; None keeps them
    nowhere, or in memory. `shared` is all that features depend on beside encoder and
    images, see `conditions`. `notes` say what cannot be kept.

    Raises:
        ValueError: If the name of the directory of features is not UTF-8.
    """

    def __init__(
        self,
        models: Mapping[str, AnyEncoder],
        images: Sequence[Dataset[Any]],
        out: Path | str | None,
        cache: Path | str | None,
        shared: Mapping[str, Any],
    ) -> None:
        self.out = None if out is None else Path(out)
        self.cache = None if cache is None else Path(cache)
        if self.out is not None and cache is None:
            self.cache = self.out / "features"
        self.notes: list[str] = []
        self._shared = dict(shared)
        self._models: dict[str, Any] = {}
        self._images: list[Any] = []
        if self.cache is None:
            return
        try:
            str(self.cache).encode()
        except UnicodeEncodeError as error:  # safetensors writes there, and cannot read
            raise ValueError(
                f"Features could not be read again from {printable(str(self.cache))}: "
                "the name is not UTF-8. Give another folder as out or as cache."
            ) from error
        for name, each in models.items():
            self._models[name] = encoder_fingerprint(each)
        self._images = [data_fingerprint(part) for part in images]
        unknown = []
        if None in self._images:
            unknown.append("the data set")
        if None in self._models.values():
            unknown.append("the feature function")
        if unknown:
            self.notes.append(
                "An evaluation that is cut begins anew: without a `fingerprint`, "
                f"{' and '.join(unknown)} cannot be told from others."
            )
            self.out = self.cache = None

    def store(self, model: str, part: int, num_images: int) -> FeatureStore:
        """Returns where features of training (0) or test images (1) lie."""
        assert self.cache is not None
        key = {
            "features_version": FEATURES_VERSION,
            "encoder": self._models[model],
            "images": self._images[part],
            **self._shared,
        }
        return FeatureStore(self.cache, key, num_images)

    def row_key(
        self, task: Task, protocol: Any, settings: Mapping[str, Any]
    ) -> str | None:
        """Returns the name under which a row is kept, None if it is not kept.

        A protocol from elsewhere is told from others by its source; where that, or a
        setting, cannot be written down, its rows are not kept. The settings are all
        that the row depends on beside protocol, features and labels.
        """
        code = _code(protocol)
        if self.out is None or code is None:
            return None
        key = {
            "rows_version": _ROWS_VERSION,
            "schema_version": SCHEMA_VERSION,
            "features_version": FEATURES_VERSION,
            "name": task.model,
            "protocol": task.protocol,
            "encoder": self._models[task.model],
            "images": self._images,
            "code": code,
            "settings": to_json(protocol),
            **self._shared,
            **settings,
        }
        name = "".join(c if c.isalnum() else "_" for c in task.protocol)
        return f"{name}-{hash_key(key)}"

    def rows(
        self,
        keys: Mapping[Task, str | None],
        encode: Callable[[Sequence[Task]], None],
        run: Callable[[Task], dict[str, Any]],
        world: World = World(),  # noqa: B008, frozen
    ) -> dict[Task, dict[str, Any]]:
        """Returns the rows that are kept, and makes and keeps those that are missing.

        Whatever `run` needs of all missing rows, `encode` makes first.
        """
        # One process reads the rows, so that all have the same ones.
        found = world.from_first(
            lambda: {task: row for task, key in keys.items() if (row := self.read(key))}
        )
        missing = [task for task in keys if task not in found]
        if missing:
            encode(missing)
        for task in missing:
            found[task] = run(task)
            if world.rank == 0:
                self.write(keys[task], found[task])
        return found

    def read(self, key: str | None) -> dict[str, Any] | None:
        """Returns the row that is kept under a key, None if there is nothing whole."""
        if key is None or self.out is None:
            return None
        try:
            row = read_sealed(self._row(key), "It is made again.")
        except OSError:
            return None
        except ValueError as error:
            self.notes.append(str(error))
            return None
        if row.pop("key", None) != key:
            self.notes.append(f"{self._row(key)} is another row. It is made again.")
            return None
        return row

    def write(self, key: str | None, row: Mapping[str, Any]) -> None:
        """Keeps a row, and removes the checkpoints that led to it."""
        if key is None or self.out is None:
            return
        with atomic_write(self._row(key)) as temporary:
            temporary.write_text(json.dumps(sealed({**row, "key": key})) + "\n")
        shutil.rmtree(self._checkpoints(key), ignore_errors=True)

    @contextmanager
    def checkpoints(self, key: str | None) -> Iterator[Path]:
        """Gives a directory for the checkpoints of a training."""
        if key is not None and self.out is not None:
            yield self._checkpoints(key)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def clear(self, keys: Sequence[str | None]) -> None:
        """Removes rows, once the results are written."""
        if self.out is None:
            return
        for key in keys:
            if key is not None:
                self._row(key).unlink(missing_ok=True)
        for name in ("rows", "checkpoints"):
            folder = self.out / name
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _row(self, key: str) -> Path:
        assert self.out is not None
        return self.out / "rows" / f"{key}.json"

    def _checkpoints(self, key: str) -> Path:
        assert self.out is not None
        return self.out / "checkpoints" / key


def _code(protocol: Any) -> str | None:
    """Returns what tells the code of a protocol from others', None if nothing does."""
    kind = type(protocol)
    if protocol is None or kind.__module__.startswith("lightly_mim."):
        return ""  # see _ROWS_VERSION
    if not is_dataclass(kind):
        return None
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):  # written at a prompt
        return None
