"""Damaged run and evaluation directories: the same numbers, or an error with a remedy.

Each file in turn has bits flipped, is cut, emptied, removed, filled with noise or
swapped with another; then the run is evaluated, or goes on, or the evaluation does.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import random
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_mim import MAE, convert, evaluate, pretrain, pretraining
from lightly_mim.evaluation import KNN, Linear

from .kills import build, of_run

# The function `evaluate` hides the module of this name.
ENTRY: Any = sys.modules["lightly_mim.evaluation.evaluate"]

MUTATIONS = 300
RUN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "precision": "32-true",
    "accelerator": "cpu",
    "devices": 1,
    "num_workers": 0,
    "tensorboard": False,
}


class Cut(Exception):
    """The run ends here, as if it was killed."""


def mutate(path: Path, other: Path, rng: random.Random) -> str:
    """Damages a file, and returns how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "flips", "cut", "empty", "gone", "noise", "swap"])
    if how.startswith("flip") and content:
        for _ in range(1 if how == "flip" else 20):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content) or 1) :]
    elif how == "empty":
        content.clear()
    elif how == "noise":
        content = bytearray(rng.randbytes(len(content) or 9))
    elif how == "swap":
        content = bytearray(other.read_bytes())
    path.unlink()
    if how != "gone":
        path.write_bytes(content)
    return how


def build_model() -> MAE:
    return build()


def score(encoder: Path, photos: Path, out: Path | None, **options: Any) -> Any:
    results = evaluate(
        encoder,
        photos,
        (KNN(ks=[1, 3]), Linear(epochs=3, num_folds=2)),
        out=out,
        num_workers=0,
        device="cpu",
        **options,
    )
    rows = [(row.protocol, row.top1, row.confusion) for row in results.rows]
    return json.loads(json.dumps(rows))


@pytest.fixture(scope="module")
def scenes(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is damaged: (folder, what is done with it, what it gives)."""
    root = tmp_path_factory.mktemp("directories")
    finished, cut, kept = root / "finished", root / "cut", root / "kept"

    def stop(*_: Any, **__: Any) -> None:
        raise Cut

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pretrain(finished, photos, build_model, **RUN)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
            seen = iter([None, stop])
            step = pretraining.Pretraining.on_train_epoch_start

            def once(self: Any) -> None:
                step(self)
                if then := next(seen):
                    then()

            patch.setattr(pretraining.Pretraining, "on_train_epoch_start", once)
            pretrain(cut, photos, build_model, **RUN)
        expected = score(finished, photos, kept)
        evaluated = root / "evaluated"
        shutil.copytree(finished, evaluated)
        score(evaluated, photos, evaluated)
        # An evaluation that was killed before the end has features and rows.
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
            patch.setattr(ENTRY, "to_text", stop)
            shutil.rmtree(kept)
            score(finished, photos, kept)
    return {
        "evaluate": (finished, lambda out: score(out, photos, None), expected),
        "resume": (
            cut,
            lambda out: (
                pretrain(out, photos, build_model, resume=True, **RUN),
                of_run(out)[0],
            )[1],
            of_run(finished)[0],
        ),
        "go on": (kept, lambda out: score(finished, photos, out), expected),
        # A finished and evaluated run: what is said of it, and that it is finished.
        "card": (evaluated, lambda out: told(out, evaluated), told(evaluated)),
        "again": (
            evaluated,
            lambda out: weights(pretrain(out, resume=True)),
            weights(pretrain(evaluated, resume=True)),
        ),
    }


def weights(method: torch.nn.Module) -> Any:
    return {name: tensor.tolist() for name, tensor in method.state_dict().items()}


def told(run: Path, was: Path | None = None) -> Any:
    """Returns what a model card says of a run, behind which are its results."""
    out = run.with_name(f"{run.name}-card")
    try:
        convert(run, "safetensors", out)
        card = (out / "README.md").read_text()
        for path, name in ((out, "OUT"), (run, "RUN"), (was, "RUN")):
            card = card.replace(str(path), name)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_directories(scenes: dict[str, Any], tmp_path: Path) -> None:
    rng = random.Random(14)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(MUTATIONS):
        name = list(scenes)[number % len(scenes)]
        folder, act, expected = scenes[name]
        copy = tmp_path / f"{number}"
        shutil.copytree(folder, copy)
        files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
        path, other = rng.choice(files), rng.choice(files)
        how = mutate(path, other, rng)
        told = f"{name}, {path.relative_to(copy)}, {how}"
        counts[name] += 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                given = act(copy)
            # A card cannot say what is not there, but that it is not there.
            missing = (name, how) == ("card", "gone") and (
                f"there is no {path.name}" in given.lower()
            )
            same = given == expected or missing
        except (ValueError, OSError) as error:
            message = str(error)
            counts["refused"] += 1
            if type(error) not in (ValueError, OSError, FileNotFoundError) or (
                str(copy) not in message
            ):
                wrong.append(f"{told}: raw {error!r}"[:400])
            elif "weights_only" in message:
                wrong.append(f"{told}: PyTorch's advice: {message}"[:400])
        except BaseException as error:
            wrong.append(f"{told}: raw {type(error).__name__}: {error}"[:400])
        else:
            counts["the same" if same else "OTHER NUMBERS"] += 1
            if not same:
                wrong.append(f"{told}: other numbers in silence")
        shutil.rmtree(copy)
    print(f"\n{MUTATIONS} mutations: {dict(counts)}, {len(wrong)} wrong")
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])
