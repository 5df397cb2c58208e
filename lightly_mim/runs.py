"""A run directory: what is in it, and when it may be written.

config.yaml           the arguments, rerunnable with `--config`
history.json          what the arguments do not say: processes, images, later changes,
                      and when and where the run began and went on
checkpoints/last.ckpt all that a resume needs
checkpoints/previous.ckpt  the same, one checkpoint earlier, until the run has finished
encoder.safetensors   the encoder alone, under timm's names
metrics.csv           losses, learning rate, gradient norm, images per second
tensorboard/          the same for TensorBoard
reconstructions/      pictures
results.json          what `evaluate` found
features/ rows/       what an evaluation keeps, see `lightly_mim.evaluation`
dense.json            what `evaluate_dense` found
gallery/ report.html  what a report shows, see `lightly_mim.report`
finished.json         the marker of a run that came to its end
.owner                which process writes here: the last that began

What a kill leaves can be gone on with or replaced, wherever it struck: .owner is
written first and marks the folder as a run's, what a run that is replaced had left goes
before its config.yaml does, and what was logged before the first checkpoint goes when
the run begins again.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from lightly_mim.config import read_yaml, whole_config
from lightly_mim.files import (
    atomic_write,
    is_same_place,
    read_sealed,
    sealed,
    sealed_text,
)

# Arguments that a resumed run may change: no weight depends on them.
_FREE = {
    *("out", "val", "validate", "num_workers", "progress", "loggers", "tensorboard"),
    *("reconstruct_every", "probe", "probe_every", "rank_every", "avg_dist"),
    *("log_every", "save_every_minutes", "report"),
}
# Arguments that it may change if the user says so: the result is another one then.
CHANGEABLE = (
    *("accelerator", "callbacks", "compile", "data", "devices", "grad_checkpointing"),
    *("num_nodes", "on_error", "precision", "strategy"),
)
# Facts of a run, and the arguments whose words they stand for: `auto` is another number
# of devices elsewhere, and a folder may be moved.
_FACTS = {
    "images": ("data",),
    "contents": ("data",),
    "times": ("data",),
    "processes": ("devices", "num_nodes"),
    "device": ("accelerator",),
}
_TOKEN_LENGTH = 32

Changes = dict[str, tuple[Any, Any]]  # what was in the run, and what is now


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
        previous:
            The checkpoint before that one, should it be damaged.
        encoder:
            The encoder alone.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.json"
        self.checkpoint = self.path / "checkpoints" / "last.ckpt"
        self.previous = self.checkpoint.with_name("previous.ckpt")
        self.encoder = self.path / "encoder.safetensors"
        self.reconstructions = self.path / "reconstructions"
        self.marker = self.path / "finished.json"
        self._owner = self.path / ".owner"
        self._token: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.marker.exists()

    def check(
        self,
        config: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        allow_changes: Collection[str] = (),
    ) -> Changes:
        """Refuses what would lose a run or mix two of them. Writes nothing.

        Args:
            config:
                The arguments of the run that is about to start.
            resume:
                Whether to go on with a run that is there.
            overwrite:
                Whether to replace a run that is there.
            allow_changes:
                Those of `CHANGEABLE` that a run that goes on may change.

        Returns:
            What is changed of them.

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
            return {}
        stored = None if overwrite and self._began() else self.stored_config()
        if stored is None and not self._began():
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
        if not resume or stored is None:  # killed before it had recorded anything
            return {}
        if self.previous.exists() and not self.checkpoint.exists():
            raise ValueError(
                f"{self.checkpoint} is gone. To go on from the one before it, rename "
                f"{self.previous} to {self.checkpoint.name}; to begin anew, pass "
                "overwrite instead of resume."
            )
        return self._changes(stored, config, allow_changes)

    def check_facts(
        self, facts: Mapping[str, Any], allow_changes: Collection[str] = ()
    ) -> Changes:
        """Refuses to go on under other facts than the run's. Writes nothing.

        Args:
            facts:
                What the arguments do not say: `images`, the list of the training
                images, `contents`, what is in some of them, `times`, when some of them
                were written last, `processes`, their number, and `device`, its kind.
            allow_changes:
                Those of `CHANGEABLE` that a run that goes on may change.

        Returns:
            What is changed of them.

        Raises:
            ValueError: If they differ, and their arguments may not change.
        """
        known = self._stored_history().get("facts", {})
        changes: Changes = {}
        for name, value in facts.items():
            if name not in known or known[name] == value:
                continue
            was, now = known[name], value
            if name == "times" and isinstance(was, list):
                pairs = zip(was, now, strict=False)
                changed = sum(before != after for before, after in pairs)
                if changed == len(now) == len(was):  # copies, of which none keeps it
                    continue
                was = f"{len(now)} files that were looked at"
                now = f"{changed} of them written since"
            elif name == "contents":
                was, now = "images", "others of the same names and sizes"
            changes.setdefault(_FACTS[name][0], (was, now))
        self._refuse(changes, allow_changes)
        return changes

    def stored_config(self) -> dict[str, Any] | None:
        """Returns the arguments of the run that is there, None if there is none.

        Raises:
            ValueError: If they are damaged.
        """
        try:
            config: dict[str, Any] = read_yaml(self.config, whole_config)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            if not self._began():  # somebody else's
                return None
            raise ValueError(
                f"{error}. It is damaged or was changed by hand. Restore it; or delete "
                "it, and pass data, method and the run's other arguments again with "
                "resume; or pass overwrite to begin anew."
            ) from error
        return config

    def stored_arguments(self) -> dict[str, Any]:
        """Returns the arguments of the run that is there, to go on with it.

        Raises:
            ValueError: If there is none.
        """
        stored = self.stored_config()
        if stored is None:
            raise ValueError(
                f"There is no run in {self.path} to go on with: pass data and method "
                "to begin one, or check the path."
            )
        if self._stored_history().get("built") and not self.checkpoint.exists():
            raise ValueError(
                f"The run in {self.path} began with a method that was passed as an "
                "object, with weights of its own, and has no checkpoint yet: pass the "
                "method and the other arguments again."
            )
        return stored

    def _began(self) -> bool:
        """Returns whether a run was killed here before it recorded its arguments."""
        # Or as it recorded that the directory is its own.
        files = [self._owner, *self.path.glob(f".{self._owner.name}.*")]
        return any(
            file.is_file() and file.stat().st_size in (0, _TOKEN_LENGTH)
            for file in files
        )

    def _stored_history(self) -> dict[str, Any]:
        remedy = "Delete it: the run is then known by its arguments alone."
        try:
            history = read_sealed(self.history, remedy)
        except FileNotFoundError:  # of an earlier version
            return {}
        kinds = {"facts": dict, "changes": list, "sessions": list}
        if any(not isinstance(history.get(k, kinds[k]()), kinds[k]) for k in kinds):
            raise ValueError(f"{self.history} is damaged: no facts. {remedy}")
        return history

    def _changes(
        self,
        stored: Mapping[str, Any],
        config: Mapping[str, Any],
        allow_changes: Collection[str],
    ) -> Changes:
        facts = self._stored_history().get("facts", {})
        free = _FREE.union(*(_FACTS[name] for name in facts if name in _FACTS))
        # What was recorded is what YAML makes of it: tuples become lists.
        was, now = _flat(stored), _flat(yaml.safe_load(yaml.safe_dump(dict(config))))
        changes = {
            name: (was.get(name), now.get(name))
            for name in sorted(was.keys() | now.keys())
            if name not in free and was.get(name) != now.get(name)
        }
        if is_same_place(was.get("init"), now.get("init")):
            changes.pop("init", None)
        if self.finished and {"epochs", "recipe.epochs"} & changes.keys():
            raise ValueError(
                f"The run in {self.path} has finished its {was.get('recipe.epochs')} "
                "epochs, with which its learning rate has come to its end. To go on "
                f"from its weights, begin another run with them: init={self.path} "
                "and another folder as out, without resume."
            )
        self._refuse(changes, allow_changes)
        return changes

    def _refuse(self, changes: Changes, allow_changes: Collection[str]) -> None:
        """Raises a ValueError that lists the changes that are not allowed."""
        begun = self.checkpoint.exists()  # otherwise nothing is mixed
        differences = {
            name: f"{name}: {was!r} in the run, {now!r} now"
            for name, (was, now) in changes.items()
            if not (name in CHANGEABLE and (name in allow_changes or not begun))
        }
        if not differences:
            return
        names = [name for name in differences if name in CHANGEABLE]
        if len(names) == len(differences):
            remedy = (
                "Pass the run's own arguments. Or change them: with allow_changes="
                f"{tuple(names)} (--allow-changes {' '.join(names)}) the run goes on, "
                "but does not end bit for bit as it would have."
            )
        else:
            remedy = (
                "Pass the run's own arguments, or none but out and resume, or another "
                "folder as out."
            )
        raise ValueError(
            f"The run in {self.path} was started with other arguments, so going on "
            "would mix two runs:\n  "
            + "\n  ".join(differences.values())
            + f"\n{remedy}"
        )

    def check_outside(self, images: Path) -> None:
        """Raises a ValueError if the run would write its pictures among the images."""
        # Not resolve(), which raises a RuntimeError of links in a circle.
        if Path(os.path.realpath(self.path)).is_relative_to(os.path.realpath(images)):
            raise ValueError(
                f"The run directory {self.path} lies in the folder of the images, "
                f"{images}, where its pictures would become training images: pass "
                "another folder as out."
            )

    def begin(
        self,
        config: Mapping[str, Any],
        overwrite: bool,
        *,
        fresh: bool = False,
        facts: Mapping[str, Any] | None = None,
        built: bool = False,
        changes: Changes | None = None,
    ) -> None:
        """Makes the directory ready and records the arguments.

        Args:
            config:
                The arguments of the run.
            overwrite:
                Whether to remove a run that is there first. Only what a run writes is
                removed.
            fresh:
                Whether there must be none.
            facts:
                See `check_facts`.
            built:
                Whether the method was passed as an object, which the arguments do not
                make again with the same weights.
            changes:
                What a run that goes on changes. They are recorded.

        Raises:
            ValueError: If another process began a run there since `check`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._token = uuid.uuid4().hex
        if fresh:
            try:
                with self._owner.open("x") as file:
                    file.write(self._token)
            except FileExistsError as error:
                raise ValueError(
                    f"Another process begins a run in {self.path} at this moment: pass "
                    "another folder as out."
                ) from error
        else:
            with atomic_write(self._owner) as temporary:
                temporary.write_text(self._token)
        self._remove_remains()
        history = {} if overwrite else self._stored_history()
        if overwrite:
            # The marker first: without it, what is left is an unfinished run. Its
            # encoder next, which would count as the run's.
            for path in (self.marker, self.encoder, self.previous, self.checkpoint):
                path.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            self._remove_results()
            changes = None
            history.pop("sessions", None)
        record = {
            "built": built or bool(history.get("built")),
            "facts": dict(facts) if facts is not None else history.get("facts", {}),
            "changes": history.get("changes", []),
            "sessions": history.get("sessions", []),
        }
        if changes:
            record["changes"].append({"time": _now(), "changes": changes})
        with atomic_write(self.history) as temporary:
            temporary.write_text(json.dumps(sealed(record), indent=2) + "\n")
        text = yaml.safe_dump(dict(config), sort_keys=False)
        with atomic_write(self.config) as temporary:
            temporary.write_text(sealed_text(text))

    def note_session(self, session: Mapping[str, Any]) -> None:
        """Adds to `history.json` that the run begins or goes on.

        Args:
            session:
                What there is to say of it.
        """
        self.check_owner()
        history = self._stored_history()
        history["sessions"] = [*history.get("sessions", []), dict(session)]
        with atomic_write(self.history) as temporary:
            temporary.write_text(json.dumps(sealed(history), indent=2) + "\n")

    def _remove_remains(self) -> None:
        """Removes what is left of files of a process that was killed as it wrote."""
        files = [
            self.checkpoint,
            self.previous,
            self.encoder,
            self.config,
            self.history,
            self.marker,
        ]
        for file in (*files, self._owner, self.path / "metrics.csv"):
            for remains in file.parent.glob(f".{file.stem}.*{file.suffix}"):
                remains.unlink(missing_ok=True)

    def _remove_results(self) -> None:
        """Removes what a run writes but for its arguments."""
        written = (
            *("checkpoints", "reconstructions", "tensorboard", "features", "rows"),
            *("classifiers", "gallery", "figures"),
        )
        for name in written:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (
            *("metrics.csv", "results.json", "dense.json"),
            *("report.html", "curves.png"),
        ):
            (self.path / name).unlink(missing_ok=True)
        self.encoder.unlink(missing_ok=True)

    def check_owner(self) -> None:
        """Raises a TakenOverError if another process has begun since this one did."""
        if self._token is not None and self._owner.read_text() != self._token:
            raise TakenOverError(
                f"Another process goes on with the run in {self.path}: this one ends."
            )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the marker of a run that came to its end."""
        self.check_owner()
        changes = self._stored_history().get("changes")
        summary = {**summary, "time": _now()}
        if changes:  # not the run that never was cut
            summary["changes"] = changes
        with atomic_write(self.marker) as temporary:
            temporary.write_text(json.dumps(sealed(summary), indent=2) + "\n")
        self.previous.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings within settings as `recipe.lr`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
