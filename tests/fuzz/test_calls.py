"""Odd values for every argument of every public callable.

Each call returns, or raises a ValueError or TypeError that names the argument; for
paths, FileNotFoundError and its relatives. What would train ends where training begins.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import io
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import lightly_mim
from lightly_mim import (
    MAE,
    EvalTransform,
    MAETransform,
    Pretraining,
    Recipe,
    SimMIM,
    SimMIMTransform,
    data,
    evaluation,
    heads,
    losses,
    masking,
    methods,
    targets,
)
from lightly_mim.arguments import Workers, fits
from lightly_mim.checkpoints import save_encoder
from lightly_mim.evaluation import runner
from lightly_mim.evaluation.dense import evaluate as dense
from lightly_mim.evaluation.dense.evaluate import evaluate_dense
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.pretraining import entry
from lightly_mim.report import report
from lightly_mim.spelling import public_classes

from ..conftest import SHORT_RUN, TINY_VIT

ODD: list[Any] = [
    *(None, "", "false", "no such thing", b"x", True, False),
    *(-1, 0, 1, 3, 10**30, 1.5, -0.5, float("nan"), float("inf")),
    *([], {}, [None], [1, "a", 2.5], (0, 0), (-1, 2), [[1]], {"mean": [0.5]}),
    *(np.int64(-3), np.float32("nan"), np.zeros(2), np.array([]), np.True_),
    *(torch.zeros(2), torch.tensor(-1), object(), int, len, Path("no/such/path")),
    *(range(0), {1, 2}, iter(()), 1j, slice(None), "\0", "~nobody-of-this-name/x"),
]
PATHS = {"out", "data", "val", "encoder", "cache", "root", "data_dir", "path"}
PATHS |= {"checkpoint", "model", "images", "results", "runs"}
FAST: dict[str, Any] = {"num_workers": 0, "device": "cpu"}


class Reached(Exception):
    """All checks have passed, and the work would begin."""


def _reach(*_: Any, **__: Any) -> Any:
    raise Reached


@pytest.fixture(scope="module")
def calls(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Every public callable by its name, with valid arguments."""
    root = tmp_path_factory.mktemp("calls")
    torch.manual_seed(0)
    method = SimMIM(**TINY_VIT)
    features = torch.randn(12, 8)
    labels = torch.arange(12) % 3
    tokens = torch.randn(12, 4, 8)
    grid = {"features": features, "labels": labels, "num_classes": 3}
    options = {k: v for k, v in TINY_VIT.items() if k not in ("encoder",)}
    fresh = iter(range(10**9))
    scenes = root / "scenes"
    for part in ("images", "masks"):
        (scenes / part).mkdir(parents=True)
        for number in range(8):
            picture = Image.new("L", (32, 32), number % 2)
            picture.paste(1, (0, 0, 16, 32))
            picture.save(scenes / part / f"{number}.png")
    encoder_options = {k: v for k, v in options.items() if k != "mask_patch_size"}
    encoder = lightly_mim.masked_encoder(TINY_VIT["encoder"], **encoder_options)
    a_recipe = {
        name: getattr(SimMIM.recipe(), name)
        for name in inspect.signature(Recipe).parameters
    }
    collected = evaluation.Features({(0, "mean"): features}, labels, [], 0.0)
    dataset = data.ImageDataset(photos / "train")
    pixels = evaluation.EncoderFeatures(evaluation.RawPixels(32, size=4))
    weights, results = root / "encoder.safetensors", root / "results"
    save_encoder(encoder, weights)
    with contextlib.redirect_stdout(io.StringIO()):
        protocols = [evaluation.Linear(epochs=1, num_folds=2)]
        lightly_mim.evaluate(weights, photos, protocols, out=results, **FAST)
    classifier = results / "classifiers" / "linear.safetensors"
    loose = TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    opened, validation = data.open_data(photos, transform=EvalTransform(32))
    keyed = data.KeyedLoader(opened, 4, num_workers=0)

    def run(**arguments: Any) -> Any:
        name = arguments.pop("out", None)
        out = (
            root / f"{next(fresh)}"
            if isinstance(name, str) and name == "FRESH"
            else name
        )
        return lightly_mim.pretrain(out, **arguments)

    run.__signature__ = inspect.signature(lightly_mim.pretrain)  # type: ignore
    table: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "pretrain": (
            run,
            {"out": "FRESH", "data": photos, "method": method, **SHORT_RUN},
        ),
        "evaluate": (
            lightly_mim.evaluate,
            {"encoder": encoder, "data": photos, "num_workers": 0, "device": "cpu"},
        ),
        "evaluate_dense": (evaluate_dense, {"encoder": encoder, "data": scenes}),
        "check_evaluation": (
            evaluation.check_evaluation,
            {"encoder": encoder, "arguments": {"seed": 1}},
        ),
        "masked_encoder": (
            lightly_mim.masked_encoder,
            {"encoder": TINY_VIT["encoder"], **encoder_options},
        ),
        "convert": (
            lightly_mim.convert,
            {"checkpoint": weights, "to": "safetensors", "out": root / "out"}
            | {"overwrite": True},
        ),
        "predict": (
            evaluation.predict,
            {"model": classifier, "images": photos / "val", "encoder": weights} | FAST,
        ),
        "embed": (
            evaluation.embed,
            {"encoder": weights, "images": photos / "val", "out": root / "out.csv"}
            | {"overwrite": True, **FAST},
        ),
        "load_classifier": (
            evaluation.load_classifier,
            {"model": classifier, "encoder": weights},
        ),
        "show": (evaluation.show, {"results": results}),
        "report": (report, {"runs": results, "features": False, "figures": False}),
        "Pretraining": (Pretraining, {"method": method}),
        "Recipe": (Recipe, a_recipe),
        "SimMIMTransform": (SimMIMTransform, {}),
        "MAETransform": (MAETransform, {}),
        "EvalTransform": (EvalTransform, {}),
        "MAE": (MAE, dict(TINY_VIT)),
        "SimMIM": (SimMIM, dict(TINY_VIT)),
        "CrossMAE": (methods.CrossMAE, dict(TINY_VIT)),
        "MaskTokenMAE": (methods.MaskTokenMAE, dict(TINY_VIT)),
        "AdaptedEncoder": (
            evaluation.AdaptedEncoder,
            {"model": nn.Identity(), "img_size": 8, "in_chans": 3},
        ),
        "AttentiveProbes": (
            evaluation.AttentiveProbes,
            {
                "num_probes": 2,
                "num_classes": 3,
                "standardize": Standardizer.fit(features),
            },
        ),
        "FeatureStore": (
            evaluation.FeatureStore,
            {"root": root / "store", "key": {}, "num_images": 12},
        ),
        "FineTuned": (
            evaluation.FineTuned,
            {"encoder": encoder, "num_classes": 3, "pool": "mean", "head_std": 0.1},
        ),
        "EncoderFeatures": (evaluation.EncoderFeatures, {"encoder": encoder}),
        "RawPixels": (evaluation.RawPixels, {"img_size": 8, "size": 4}),
        "alpha_req": (
            evaluation.alpha_req,
            {"features": features, "first": 1, "last": 5},
        ),
        "rank_me": (evaluation.rank_me, {"features": features}),
        "uniformity": (evaluation.uniformity, {"features": features}),
        "label_free": (evaluation.label_free, {"features": collected}),
        "at_random": (evaluation.at_random, {"encoder": encoder, "seed": 0}),
        "describe_encoder": (evaluation.describe_encoder, {"encoder": encoder}),
        "load_encoder": (
            evaluation.load_encoder,
            {"encoder": TINY_VIT["encoder"], "pretrained": False, "img_size": 32},
        ),
        "choose_knn": (evaluation.choose_knn, grid),
        "knn_predict_grid": (
            evaluation.knn_predict_grid,
            {
                "queries": features,
                "bank": features,
                "bank_labels": labels,
                "num_classes": 3,
                "ks": [1],
                "temperatures": [0.1],
            },
        ),
        "fit_linear_grid": (
            evaluation.fit_linear_grid,
            {**grid, "epochs": 1},
        ),
        "choose_linear": (
            evaluation.choose_linear,
            {
                **grid,
                "features": [features],
                "settings": evaluation.Linear(epochs=1, num_folds=2),
            },
        ),
        "fit_logistic_path": (
            evaluation.fit_logistic_path,
            {**grid, "cs": [1.0], "max_iterations": 3},
        ),
        "choose_logistic": (
            evaluation.choose_logistic,
            {
                **grid,
                "features": [features],
                "settings": evaluation.Logistic([1.0], 2, max_iterations=3),
            },
        ),
        "fit_attentive_grid": (
            evaluation.fit_attentive_grid,
            {"tokens": tokens, "labels": labels, "num_classes": 3, "epochs": 1},
        ),
        "choose_attentive": (
            evaluation.choose_attentive,
            {
                "tokens": tokens,
                "labels": labels,
                "num_classes": 3,
                "settings": evaluation.Attentive(epochs=1, num_parts=2),
            },
        ),
        "draw_per_class": (
            evaluation.draw_per_class,
            {"labels": labels, "num_classes": 3, "count": 1, "seed": 0},
        ),
        "wilson_interval": (evaluation.wilson_interval, {"correct": 1, "total": 2}),
        "extract_features": (
            evaluation.extract_features,
            {"encoder": encoder, "data": validation, "num_workers": 0},
        ),
        "collect_features": (
            evaluation.collect_features,
            {
                "functions": {"a": pixels},
                "batches": list(keyed)[:1],
            },
        ),
        "cached_features": (
            evaluation.cached_features,
            {
                "functions": {"a": pixels},
                "stores": {"a": evaluation.FeatureStore(root / "shards", {}, 12)},
                "data": validation,
                "num_workers": 0,
            },
        ),
        "decode_image": (
            data.decode_image,
            {"path": next((photos / "train").rglob("*.jpg"))},
        ),
        "ImageDataset": (data.ImageDataset, {"root": photos / "train"}),
        "KeyedDataset": (data.KeyedDataset, {"dataset": dataset, "seed": 0}),
        "TransformedDataset": (
            data.TransformedDataset,
            {"dataset": loose, "transform": None},
        ),
        "GlobalBatches": (data.GlobalBatches, {"num_images": 8, "batch_size": 2}),
        "KeyedLoader": (
            data.KeyedLoader,
            {"dataset": dataset, "batch_size": 2, "num_workers": 0},
        ),
        "default_num_workers": (data.default_num_workers, {"dataset": dataset}),
        "imagenette": (data.imagenette, {"data_dir": root}),
        "open_named": (data.open_named, {"name": "imagenette", "split": "val"}),
        "solar_cells": (data.solar_cells, {}),
        "open_data": (data.open_data, {"data": photos, "val": photos / "val"}),
        "spread_out": (data.spread_out, {"dataset": dataset, "count": 2}),
        "match_classes": (data.match_classes, {"train": opened, "val": validation}),
        "seed_from": (data.seed_from, {"key": 1}),
    }
    for base in (masking.Masking, targets.Target, heads.Head, losses.Loss):
        for known in public_classes(base):
            if known.__module__.startswith("lightly_mim."):
                table[known.__name__] = (known, {})
    table["MixtureMasking"][1]["maskings"] = [masking.RandomMasking()]
    for name in ("KNN", "Linear", "Logistic", "Attentive", "LowLabel", "LinearMAE"):
        table[name] = (getattr(evaluation, name), {})
    for name in ("FineTune", "DenseKNN", "DenseLinear"):
        table[name] = (getattr(evaluation, name), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "fit", _reach)
        patch.setattr(entry, "epochs_in", _reach)
        patch.setattr(runner.Runner, "encode", _reach)
        patch.setattr(dense, "DenseRunner", _reach)
        patch.chdir(root)
        yield table


def try_call(function: Any, valid: dict[str, Any], arg: str, odd: Any) -> str:
    """Returns how a call ended: 'returned', 'refused', or what was wrong with it."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if arg == "key":
                function(odd)
            else:
                function(**{**valid, arg: odd})
    except Reached:
        return "returned"
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, OSError) and arg not in PATHS:
            return f"raw {error!r}"
        if "Cannot read Imagenette" in str(error):  # what a valid call says here
            return "refused"
        # The argument, its value or kind, or the argument in words: "drop path".
        words = [word for word in re.split(r"[_\d]", arg) if len(word) > 3]
        names = [arg, str(odd), type(odd).__name__, *words]
        if any(name.lower() in str(error).lower() for name in names):
            return "refused"
        return f"does not name it: {str(error)[:200]}"
    except BaseException as error:
        return f"raw {type(error).__name__}: {str(error)[:200]}"
    return "returned"


def _is_left_out(arg: str, odd: Any) -> bool:
    """What a user's own function raises is its own, and no worker shall start."""
    starts = arg == "num_workers" and fits(odd, Workers)
    return starts or (arg == "method" and odd is len)


def run_all(table: dict[str, Any], picked: Callable[[], bool]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for name, (function, valid) in table.items():
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            for odd in ODD:
                if not picked() or _is_left_out(parameter.name, odd):
                    continue
                ended = try_call(function, valid, parameter.name, odd)
                counts[ended.partition(" ")[0]] += 1
                if ended not in ("returned", "refused"):
                    told = repr(odd)[:40]
                    wrong.append(f"{name}({parameter.name}={told}): {ended}")
    print(
        f"\n{sum(counts.values())} odd calls of {len(table)} callables: {dict(counts)}"
    )
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])


def test_valid_calls(calls: dict[str, Any]) -> None:
    there_is_none = {"imagenette", "open_named", "seed_from"}
    for name, (function, valid) in calls.items():
        if name not in there_is_none:  # no Imagenette here
            with (
                contextlib.suppress(Reached),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                function(**valid)


def test_odd_calls__some(calls: dict[str, Any]) -> None:
    generator = random.Random(0)
    run_all(calls, lambda: generator.random() < 0.03)


@pytest.mark.slow
def test_odd_calls(calls: dict[str, Any]) -> None:
    generator = random.Random(1)
    run_all(calls, lambda: generator.random() < 0.1)
