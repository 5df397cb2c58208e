"""A run directory: what is in it, and when it may be written.

config.yaml           the arguments, rerunnable with `--config`
checkpoints/last.ckpt all that a resume needs
encoder.safetensors   the encoder alone, under timm's names
metrics.csv           losses, learning rate, gradient norm, images per second
tensorboard/          the same for TensorBoard
reconstructions/      pictures
results.json          what `evaluate` found
features/ rows/       what an evaluation keeps, see `lightly_mim.evaluation`
dense.json            what `evaluate_dense` found
finished.json         the marker of a run that came to its end
.owner                which process writes here: the last that began
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightly_mim.files import atomic_write

# Arguments that a resumed run may change: they do not change its numbers.
_FREE_TO_CHANGE = {
    "out",
    "num_workers",
    "progress",
    "reconstruct_every",
    "probe",
    "probe_every",
    "rank_every",
    "log_every",
    "save_every_minutes",
}


class TakenOverError(SystemExit):
    """Another process has begun to write to the run directory.

    A cluster that has lost sight of a node starts the job elsewhere while the old
    processes may live on. They end by this, without a word to those who wait for the
    job's result.
    """


class RunDirectory:
    """The directory of one run.

    Attributes:
        path:
            The directory.
        checkpoint:
            Everything that a resume needs.
        encoder:
            The encoder alone.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoint = self.path / "checkpoints" / "last.ckpt"
        self.encoder = self.path / "encoder.safetensors"
        self.reconstructions = self.path / "reconstructions"
        self.marker = self.path / "finished.json"
        self._owner = self.path / ".owner"
        self._token: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.marker.exists()

    def check(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        """Refuses what would lose a run or mix two of them. Writes nothing.

        Args:
            config:
                The arguments of the run that is about to start.
            resume:
                Whether to go on with a run that is there.
            overwrite:
                Whether to replace a run that is there.

        Raises:
            ValueError: If the directory is in use and neither was asked for, or both;
                if it is to be replaced and is not a run directory; if the run that is
                there was started with other arguments.
        """
        if resume and overwrite:
            raise ValueError("Pass resume or overwrite, not both.")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: pass another folder as out.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self._is_run():
            raise ValueError(
                f"The folder {self.path} is not empty and is not a run directory (it "
                "has no config.yaml of a run): pass another folder as out."
            )
        if not resume and not overwrite:
            state = "a finished" if self.finished else "an unfinished"
            raise ValueError(
                f"There is {state} run in {self.path} already: pass resume to go on "
                "with it, overwrite to replace it, or another folder as out."
            )
        if resume:
            self._check_same(config)

    def check_outside(self, images: Path) -> None:
        """Raises a ValueError if the run would write its pictures among the images."""
        if self.path.resolve().is_relative_to(images.resolve()):
            raise ValueError(
                f"The run directory {self.path} lies in the folder of the images, "
                f"{images}, where its pictures would become training images: pass "
                "another folder as out."
            )

    def _is_run(self) -> bool:
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(config, dict) and {"out", "data", "method"} <= config.keys()

    def _check_same(self, config: Mapping[str, Any]) -> None:
        stored = yaml.safe_load(self.config.read_text()) or {}
        # What was recorded is what YAML makes of it: tuples become lists.
        wanted = yaml.safe_load(yaml.safe_dump(dict(config)))
        stored, wanted = _flat(stored), _flat(wanted)
        differences = [
            f"{name}: {stored.get(name)!r} in the run, {wanted.get(name)!r} now"
            for name in sorted(stored.keys() | wanted.keys())
            if name not in _FREE_TO_CHANGE and stored.get(name) != wanted.get(name)
        ]
        if differences:
            raise ValueError(
                f"The run in {self.path} was started with other arguments, so going on "
                "would mix two runs:\n  " + "\n  ".join(differences) + "\nPass the "
                "run's own arguments, or another folder as out."
            )

    def begin(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Makes the directory ready and records the arguments.

        Args:
            config:
                The arguments of the run.
            overwrite:
                Whether to remove a run that is there first. Only what a run writes is
                removed.
        """
        for remains in self.checkpoint.parent.glob(f".{self.checkpoint.stem}.*"):
            remains.unlink()  # of a run that was killed while it saved
        if overwrite:
            # First of all: without it, what is left is an unfinished run.
            self.marker.unlink(missing_ok=True)
            written = "checkpoints", "reconstructions", "tensorboard"
            for name in (*written, "features", "rows"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("metrics.csv", "results.json", "dense.json", "report.html"):
                (self.path / name).unlink(missing_ok=True)
            self.encoder.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._token = uuid.uuid4().hex
        with atomic_write(self._owner) as temporary:
            temporary.write_text(self._token)
        with atomic_write(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def check_owner(self) -> None:
        """Raises a TakenOverError if another process has begun since this one did."""
        if self._token is not None and self._owner.read_text() != self._token:
            raise TakenOverError(
                f"Another process goes on with the run in {self.path}: this one ends."
            )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the marker of a run that came to its end."""
        self.check_owner()
        with atomic_write(self.marker) as temporary:
            temporary.write_text(json.dumps(dict(summary), indent=2) + "\n")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings within settings as `recipe.lr`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
