from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.checkpoints import save_encoder
from lightly_mim.cli import main
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation import (
    KNN,
    PIXELS,
    RANDOM,
    Features,
    Linear,
    Result,
    Results,
    TrainingRun,
    check_evaluation,
    evaluate,
    runner,
)
from lightly_mim.evaluation.base import FeatureProtocol, ImageProtocol, Outcome
from lightly_mim.evaluation.label_free_measures import label_free
from lightly_mim.evaluation.probes.attentive import Attentive
from lightly_mim.evaluation.probes.low_label import LowLabel
from lightly_mim.evaluation.resume import Kept
from lightly_mim.evaluation.supervised.finetune import FineTune
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE
from lightly_mim.files import sealed

# The function `evaluate` hides the module of this name.
module: Any = sys.modules["lightly_mim.evaluation.evaluate"]

OPTIONS: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2}
FAST: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
QUICK: dict[str, Any] = {"protocols": ["knn", Linear(epochs=5)], **FAST}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy stripes, upright and lying: 24 training and 12 test images."""
    root = tmp_path_factory.mktemp("stripes")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 6)):
        for name in ("lying", "upright"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                stripes = torch.arange(32).div(4, rounding_mode="floor") % 2 * 120
                image = stripes.expand(32, 32) + torch.randint(
                    100, (32, 32), generator=generator
                )
                image = image.T if name == "lying" else image
                Image.fromarray(image.to(torch.uint8).numpy()).save(
                    root / part / name / f"{number}.png"
                )
    return root


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, **OPTIONS)


class Labelled(Dataset[Any]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def noise(num_images: int, num_classes: int, seed: int = 0) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_images, 3, 32, 32, generator=generator)
    labels = torch.arange(num_images) % num_classes
    return Labelled(images + labels[:, None, None, None] / num_classes, labels)


def test_evaluate__rows(folder: Path, encoder: MaskedEncoder, tmp_path: Path) -> None:
    results = evaluate(
        encoder,
        folder,
        layers=[0, -1],
        baselines=["random", "pixels"],
        out=tmp_path / "new" / "out",
        **QUICK,
    )
    assert [(row.model, row.protocol) for row in results.rows] == [
        ("vit_tiny_patch16_224", "knn"),
        ("vit_tiny_patch16_224", "linear"),
        (RANDOM, "knn"),
        (RANDOM, "linear"),
        (PIXELS, "knn"),
        (PIXELS, "linear"),
    ]
    for row in results.rows:
        assert (row.num_train, row.num_test) == (24, 12)
        assert 0 <= row.top1_low <= row.top1 <= row.top1_high <= 1
        assert (row.top1 * 12) % 1 == pytest.approx(0)
        assert row.top5 is None  # two classes
        assert 0 <= row.mean_class_low <= row.mean_class <= row.mean_class_high <= 1
        # As many test images of each class.
        assert row.top1 == pytest.approx(row.mean_class)
        assert [sum(counts) for counts in row.confusion] == [6, 6]
        shares = [row.confusion[0][0] / 6, row.confusion[1][1] / 6]
        assert row.per_class == pytest.approx(shares)
        assert (row.variant, row.draws) == ("", None)
        assert row.seconds > 0
        assert row.feature_seconds > 0
        chosen = {"layer": row.layer, "pooling": row.pooling, **row.hyperparameters}
        # Equal accuracies are decided by the loss, where there is one.
        best = max(
            row.selection,
            key=lambda entry: (entry["accuracy"], -entry.get("loss", 0.0)),
        )
        assert chosen.items() <= best.items()
        if row.model == PIXELS:
            assert (row.layer, row.pooling, len(row.selection)) == (None, "pixels", 1)
        else:
            keys = [(entry["layer"], entry["pooling"]) for entry in row.selection]
            assert keys == [(0, "mean"), (0, "cls"), (1, "mean"), (1, "cls")]
    # Stripes are easy: the features, labels and test images belong together.
    assert results.rows[0].top1 == 1
    assert results.rows[1].top1 == 1

    written = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(sealed(results.to_dict())))
    assert written["schema_version"] == 2
    assert Result(**written["rows"][0]) == results.rows[0]
    assert written["rows"][0]["model"] == "vit_tiny_patch16_224"
    assert written["arguments"]["layers"] == [0, -1]
    assert written["arguments"]["linear"]["epochs"] == 5
    assert written["arguments"]["data"] == str(folder)
    assert written["encoder"]["options"]["depth"] == 2
    assert written["data"] == {
        "classes": ["lying", "upright"],
        "num_train": 24,
        "num_test": 12,
    }
    assert written["versions"]["timm"] == timm.__version__
    assert written["command"] == shlex.join(sys.orig_argv)


def test_evaluate__is_a_function_of_the_seed(tmp_path: Path) -> None:
    save_encoder(
        masked_encoder("vit_tiny_patch16_224", img_size=32, **OPTIONS),
        tmp_path / "encoder.safetensors",
    )

    def rows(seed: int, batch_size: int) -> list[dict[str, Any]]:
        results = evaluate(
            tmp_path,
            noise(40, 4),
            val=noise(10, 4, seed=1),
            baselines=["random"],
            seed=seed,
            batch_size=batch_size,
            **QUICK,
        )
        table = results.to_dict()["rows"]
        for row in table:
            del row["seconds"], row["feature_seconds"]
        return list(table)

    first = rows(seed=0, batch_size=7)
    assert first[0]["model"] == str(tmp_path)
    torch.manual_seed(1)
    assert rows(seed=0, batch_size=7) == first
    assert rows(seed=1, batch_size=7)[2:] != first[2:]


def test_evaluate__chooses_without_test_images(encoder: MaskedEncoder) -> None:
    train = noise(40, 4)
    first = evaluate(encoder, train, val=noise(10, 4, seed=1), layers=[0, 1], **QUICK)
    other = evaluate(encoder, train, val=noise(16, 4, seed=2), layers=[0, 1], **QUICK)
    for a, b in zip(first.rows, other.rows, strict=True):
        assert a.selection == b.selection
        assert (a.layer, a.pooling, a.hyperparameters) == (
            b.layer,
            b.pooling,
            b.hyperparameters,
        )


def test_evaluate__data_sets_and_top5(encoder: MaskedEncoder) -> None:
    results = evaluate(
        encoder,
        noise(60, 6),
        [KNN(ks=[3, 7], temperatures=[0.1]), Linear(epochs=5)],
        val=noise(18, 6, seed=1),
        baselines=["pixels"],
        pixel_size=4,
        **FAST,
    )
    for row in results.rows:
        assert row.top5 is not None
        assert row.top1 <= row.top5 <= 1
    assert results.rows[0].hyperparameters["k"] in (3, 7)
    assert results.record["data"]["classes"] == ["0", "1", "2", "3", "4", "5"]
    assert results.notes == []


def test_evaluate__notes(folder: Path) -> None:
    plain = masked_encoder(
        "vit_tiny_patch16_224",
        img_size=32,
        class_token=False,
        global_pool="avg",
        **OPTIONS,
    )
    results = evaluate(plain, folder, ["knn"], **FAST)
    assert results.notes == [
        "kNN: with 24 training images, k is one of [1, 5, 10, 20].",
        "The encoder has no class token: features are means of patches.",
    ]
    assert [entry["pooling"] for entry in results.rows[0].selection] == ["mean"]
    for text in (str(results), printed(results)):
        assert "vit_tiny_patch16_224" in text
        assert "no class token" in text
    with pytest.raises(ValueError, match="this encoder has none"):
        evaluate(plain, folder, ["knn"], pools=["cls"], **FAST)
    for protocol in (LinearMAE(pool="cls"), FineTune(pool="cls+mean")):
        with pytest.raises(ValueError, match="this encoder has none"):
            evaluate(plain, folder, [protocol], **FAST)


def printed(results: Results) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(results)
    return capture.get()


def test_evaluate__one_class(encoder: MaskedEncoder) -> None:
    train, test = noise(10, 1), noise(4, 1, seed=1)
    with pytest.raises(ValueError, match="names no classes"):
        evaluate(encoder, train, val=test, **QUICK)
    train.classes = test.classes = ["cell"]  # type: ignore[attr-defined]
    results = evaluate(encoder, train, val=test, **QUICK)
    assert [row.top1 for row in results.rows] == [1, 1]
    assert "one class" in results.notes[-1]


def test_evaluate__class_without_training_images(encoder: MaskedEncoder) -> None:
    train, test = noise(10, 1), noise(6, 3, seed=1)
    results = evaluate(encoder, train, ["knn"], val=test, **FAST)
    assert "no training images, of 1, 2: no probe" in results.notes[-1]
    assert results.rows[0].top1 == pytest.approx(1 / 3)


def test_evaluate__refuses_to_overwrite(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(ValueError, match=r"results\.json is there already"):
        evaluate(encoder, folder, ["knn"], out=tmp_path, **FAST)
    with pytest.raises(ValueError, match="is a file: pass a directory"):
        evaluate(encoder, folder, ["knn"], out=tmp_path / "results.json", **FAST)
    assert (tmp_path / "results.json").read_text() == "precious"
    evaluate(encoder, folder, ["knn"], out=tmp_path, overwrite=True, **FAST)
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_evaluate__no_test_images(folder: Path, encoder: MaskedEncoder) -> None:
    with pytest.raises(ValueError, match=r"no test images for .*train"):
        evaluate(encoder, folder / "train", **FAST)
    results = evaluate(encoder, folder / "train", ["knn"], val=folder / "val", **FAST)
    assert results.rows[0].num_test == 12


def test_evaluate__holdout(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "protocols": ["knn", FineTune(epochs=1, batch_size=8)],
        "out": tmp_path,
        **FAST,
    }
    results = evaluate(encoder, folder, holdout=0.25, **arguments)
    assert [(row.num_train, row.num_test) for row in results.rows] == [(18, 6)] * 2
    assert "Scored are 6 held-out training images" in " ".join(results.notes)
    assert results.record["arguments"]["holdout"] == 0.25
    # What is in the directory is not taken for features of the whole.
    whole = evaluate(encoder, folder, overwrite=True, **arguments)
    assert [(row.num_train, row.num_test) for row in whole.rows] == [(24, 12)] * 2
    with pytest.raises(ValueError, match="holdout of evaluate is"):
        evaluate(encoder, folder, holdout=1.5, overwrite=True, **arguments)


def test_evaluate__no_labels(folder: Path, encoder: MaskedEncoder) -> None:
    flat = folder / "train" / "lying"
    with pytest.raises(ValueError, match="lying' have no labels"):
        evaluate(encoder, flat, val=flat, **FAST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocols": ["magic"]}, "protocols of .* each one of 'knn', 'linear'"),
        ({"protocols": []}, "protocols of evaluate is a list of one or more"),
        ({"protocols": "knn"}, "protocols of evaluate is a list of one or more"),
        ({"baselines": ["chance"]}, "baselines of .* each one of 'random', 'pixels'"),
        ({"layers": [2]}, "layers is one or more of 0 to 1"),
        ({"pools": ["max"]}, "pools of evaluate is"),
        ({"precision": "fp16"}, "precision of evaluate is one of"),
        ({"precision": "16"}, '"16" is for GPUs'),
        ({"crop_ratio": 0.0}, "crop_ratio"),
        ({"protocols": [KNN(ks=[24])]}, "23 training image"),
        ({"protocols": [KNN]}, r"has the class KNN. Make an object of it: KNN\("),
        ({"protocols": ["knn", KNN(ks=[2])]}, "Two protocols are called 'knn'"),
        ({"overwrite": "false"}, "overwrite of evaluate is True or False"),
        ({"protocols": [Linear(num_folds=25)]}, "num_folds=25 for 24"),
        ({"img_size": 64}, "img_size"),
        (
            {"protocols": ["knn", LinearMAE(layer=2)]},
            "layers 0 to 1",
        ),
        ({"distributed": True}, "has not been initialised"),
        ({"distributed": True, "devices": 2}, "pass one or the other"),
        ({"devices": "many"}, "cannot start processes .* devices='many'"),
    ],
)
def test_evaluate__bad_arguments(
    folder: Path,
    encoder: MaskedEncoder,
    tmp_path: Path,
    arguments: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(encoder, folder, **(FAST | {"out": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        ({"protocols": ["knn", KNN()]}, []),
        ({"protocols": ["linear_mae"], "compile": True}, []),
        ({"compile": True}, ["compile"]),
        ({"protocols": ["finetune"], "layers": [0], "pools": ["cls"]},
         ["layers", "pools"]),
        ({"protocols": ["linear_mae"], "layers": [0], "label_free": True}, []),
        ({"pixel_size": 8}, ["pixel_size"]),
        ({"pixel_size": 8, "baselines": ["pixels"]}, []),
    ],
)  # fmt: skip
def test_evaluate__says_what_does_nothing(
    tmp_path: Path, arguments: dict[str, Any], unused: list[str]
) -> None:
    with (
        warnings.catch_warnings(record=True) as said,
        pytest.raises(ValueError, match="neither the directory of a run"),
    ):
        warnings.simplefilter("always")
        evaluate("no-such-encoder", tmp_path, **arguments)
    found = [str(each.message) for each in said if each.category is UserWarning]
    assert [text.partition(" does nothing here: ")[0] for text in found] == unused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "linear",
            r"no argument 'linear'. Settings .*: protocols=\[Linear\(\.\.\.\)\]",
        ),
        ("img_sise", "evaluate.. has no argument 'img_sise'.$"),
    ],
)
def test_evaluate__no_such_argument(folder: Path, name: str, message: str) -> None:
    settings: dict[str, Any] = {name: Linear()}
    with pytest.raises(TypeError, match=message):
        evaluate("vit_tiny_patch16_224", folder, **settings)


def test_evaluate__labels_beyond_the_classes(encoder: MaskedEncoder) -> None:
    train, test = noise(12, 3), noise(8, 4)
    train.classes = ["a", "b", "c"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"labels go up to 3.*names 3"):
        evaluate(encoder, train, val=test, **QUICK)


def test_evaluate__settings_matter() -> None:
    # The protocols see features only: no encoder, no images.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    values = torch.randn(30, 4, generator=generator) + labels[:, None]
    features = Features({(0, "mean"): values, (1, "mean"): -values}, labels, [], 0.0)
    (outcome,) = KNN(ks=[1])(features, features, 3)
    assert outcome.hyperparameters["k"] == 1
    assert outcome.key == (0, "mean")  # both are equally good: the first one
    assert torch.equal(outcome.ranked[:, 0], labels)  # each is its own neighbour
    assert outcome.ranked.shape == (30, 3)
    (few,) = Linear(learning_rates=[0.01], epochs=1)(features, features, 3, seed=4)
    (many,) = Linear(learning_rates=[0.01], epochs=9)(features, features, 3, seed=4)
    assert few.hyperparameters["learning_rate"] == 0.01
    assert many.selection[0]["loss"] < few.selection[0]["loss"]


def test_evaluate__command_line(folder: Path, tmp_path: Path) -> None:
    save_encoder(
        masked_encoder("vit_tiny_patch16_224", img_size=32, **OPTIONS),
        tmp_path / "encoder.safetensors",
    )
    main(
        [
            "evaluate",
            f"--encoder={tmp_path}",
            f"--data={folder}",
            "--protocols=[linear,knn]",
            "--layers=[0,-1]",
            "--pools=[mean]",
            "--baselines=[pixels]",
            "--linear.epochs=3",
            "--knn.ks=[2,3]",
            "--num_workers=0",
            f"--out={tmp_path}",
        ]
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["protocol"] for row in written["rows"]] == ["linear", "knn"] * 2
    assert written["rows"][1]["hyperparameters"]["k"] in (2, 3)
    assert written["arguments"]["protocols"] == ["linear", "knn"]
    assert written["arguments"]["linear"]["epochs"] == 3
    assert written["arguments"]["encoder"] == str(tmp_path)


# Interruptions.


class Cut(Exception):
    pass


def numbers(results: Results) -> dict[str, Any]:
    """All that an evaluation found but the time that it took."""
    found = json.loads(json.dumps(results.to_dict()))
    for row in found["rows"]:
        del row["seconds"], row["feature_seconds"]
    return {name: found[name] for name in ("rows", "measures", "notes", "data")}


class Counter:
    """Counts the images that go through an encoder, and may stop one of them."""

    def __init__(self, encoder: MaskedEncoder, fail_at: int = 1_000_000) -> None:
        self.count = 0
        self.fail_at = fail_at
        self.handle = encoder.vit.patch_embed.register_forward_pre_hook(self)

    def __call__(self, module: Any, inputs: tuple[Tensor]) -> None:
        if not inputs[0].any():  # zeros, which tell the shapes of features
            return
        if self.count + len(inputs[0]) > self.fail_at:
            raise Cut
        self.count += len(inputs[0])


ALL: dict[str, Any] = {
    "baselines": ["pixels"],
    "layers": [0, 1],
    "label_free": True,
    "batch_size": 5,
    **QUICK,
}


@pytest.fixture(scope="module")
def whole(
    folder: Path, encoder: MaskedEncoder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return numbers(
        evaluate(encoder, folder, out=tmp_path_factory.mktemp("whole"), **ALL)
    )


@pytest.mark.parametrize("place", ["features", "linear", "label_free", "results"])
def test_evaluate__goes_on_where_it_was_cut(
    folder: Path,
    encoder: MaskedEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Any],
    place: str,
) -> None:
    calls = {"knn": 0, "linear": 0, "label_free": 0}

    def counted(name: str, function: Any, fail: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if fail:
                raise Cut
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    def patch(patches: pytest.MonkeyPatch, cut: str) -> None:
        for name, protocol in (("knn", KNN), ("linear", Linear)):
            call = counted(name, protocol.__call__, cut == name)
            patches.setattr(protocol, "__call__", call)
        call = counted("label_free", label_free, cut == "label_free")
        patches.setattr(runner, "measure_features", call)
        if cut == "results":
            patches.setattr(module, "evaluation_record", counted("", None, True))

    with monkeypatch.context() as patches, pytest.raises(Cut):
        patch(patches, place)
        counter = Counter(encoder, fail_at=24 + 7 if place == "features" else 10**6)
        try:
            evaluate(encoder, folder, out=tmp_path, **ALL)
        finally:
            counter.handle.remove()
    assert not (tmp_path / "results.json").exists()
    assert counter.count == (24 + 5 if place == "features" else 24 + 12)

    with monkeypatch.context() as patches:
        patch(patches, "")
        counter = Counter(encoder)
        found = evaluate(encoder, folder, out=tmp_path, **ALL)
        counter.handle.remove()
    assert numbers(found) == whole
    # Each protocol ran once for the encoder and once for the pixels.
    assert calls == {"knn": 2, "linear": 2, "label_free": 2}
    assert counter.count == (12 if place == "features" else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classifiers",
        "features",
        "figures",
        "report.html",
        "results.json",
    ]


def test_evaluate__other_settings_are_not_taken_for_the_same(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    keys = set()
    rows = Kept.write

    def write(kept: Kept, key: str | None, row: Any) -> None:
        assert key not in keys
        keys.add(key)
        rows(kept, key, row)

    changes: list[dict[str, Any]] = [
        {},
        {"protocols": [KNN(ks=[1])]},
        {"protocols": [KNN(ks=range(1, 3))]},
        {"protocols": [KNN(ks=range(1, 4))]},
        {"seed": 1},
        {"crop_ratio": 1.0},
        {"layers": [0]},
        {"pools": ["mean"]},
        {"precision": "bf16"},
    ]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Kept, "write", write)
        for change in changes:
            evaluate(
                encoder,
                folder,
                out=tmp_path,
                overwrite=True,
                **(FAST | {"protocols": ["knn"]} | change),
            )
    assert len(keys) == len(changes)
    # Features that do not depend on the change were read again.
    assert len(list((tmp_path / "features").iterdir())) == 2 * 3


def test_evaluate__features_are_shared(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    for number in range(2):
        counter = Counter(encoder)
        evaluate(
            encoder,
            folder,
            ["knn"],
            out=tmp_path / str(number),
            cache=tmp_path / "cache",
            **FAST,
        )
        counter.handle.remove()
        assert counter.count == (0 if number else 36)
    assert not (tmp_path / "0" / "features").exists()


def test_evaluate__data_set_without_a_fingerprint(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    train, test = noise(12, 3), noise(6, 3, seed=1)
    results = evaluate(encoder, train, ["knn"], val=test, out=tmp_path, **FAST)
    assert "begins anew" in results.notes[-1]
    assert "the data set cannot be told from others" in results.notes[-1]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"figures", "report.html", "results.json"}
    train.fingerprint = test.fingerprint = 1  # type: ignore[attr-defined]
    results = evaluate(
        encoder, train, ["knn"], val=test, out=tmp_path, overwrite=True, **FAST
    )
    assert not any("begins anew" in note for note in results.notes)
    assert len(list((tmp_path / "features").iterdir())) == 2


def evaluate_in_a_process(rank: int, folder: Path, out: Path) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{out}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),
    )
    torch.manual_seed(0)
    encoder = masked_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, **OPTIONS
    )
    results = evaluate(encoder, folder, out=out / "shared", distributed=True, **ALL)
    (out / f"{rank}.json").write_text(json.dumps(numbers(results)))
    with pytest.raises(ValueError, match="pass out or cache"):
        evaluate(encoder, folder, ["knn"], distributed=True, **FAST)
    with pytest.raises(ValueError, match="pass devices and num_nodes"):
        evaluate(
            encoder,
            folder,
            [FineTune(batch_size=8)],
            distributed=True,
            **FAST,
        )
    distributed.destroy_process_group()


@pytest.mark.slow
def test_evaluate__shared_by_processes(
    folder: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    multiprocessing.start_processes(
        evaluate_in_a_process, (folder, tmp_path), nprocs=2, start_method="spawn"
    )
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["rows"] == whole["rows"]
    assert (tmp_path / "shared" / "results.json").exists()


# Protocols of other kinds.


@dataclass(frozen=True)
class Draws(FeatureProtocol):
    """A protocol with several variants and draws, whose classes are made up."""

    name = "my draws"
    reads = "pooled"

    def check(self, num_train: int) -> list[str]:
        return [f"{num_train} images."]

    def __call__(
        self, train: Features, test: Features, num_classes: int, **options: Any
    ) -> list[Outcome]:
        right = test.labels[:, None]
        wrong = (right + 1) % num_classes
        draws = torch.stack([right, torch.cat([right[:6], wrong[6:]])])
        return [
            Outcome((0, "mean"), {"C": 1.0}, [], draws, "1 per class"),
            Outcome((0, "mean"), {"C": 2.0}, [], draws.flip(0), "5 per class"),
        ]


def test_evaluate__variants_and_draws(
    folder: Path, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    results = evaluate(encoder, folder, [Draws()], out=tmp_path, **FAST)
    assert [row.variant for row in results.rows] == ["1 per class", "5 per class"]
    assert [row.draws for row in results.rows] == [[1.0, 0.5], [0.5, 1.0]]
    assert results.rows[0].top1 == 0.75
    assert sum(map(sum, results.rows[0].confusion)) == 24  # over both draws
    assert results.notes[0] == "24 images."
    assert "standard deviation over draws" in results.notes[-1]
    text = str(results)
    assert "my draws 5 per class" in text
    assert "75.0 ± 35.4" in text


class Tokens(Draws):
    name = "my tokens"
    reads = "tokens"

    def __call__(
        self, train: Features, test: Features, num_classes: int, **options: Any
    ) -> list[Outcome]:
        assert [value.shape for value in train.values.values()] == [(24, 16, 24)]
        assert list(test.values) == [(1, "tokens")]
        return [Outcome((1, "tokens"), {}, [], test.labels[:, None])]


class Training(FineTune):
    """Looks at what a protocol on images is given."""

    fail = True

    def check(self, num_train: int) -> list[str]:
        return []

    def check_encoder(self, encoder: MaskedEncoder) -> None:
        assert encoder.num_layers == 2

    def __call__(
        self, encoder: Any, images: Any, num_classes: int, run: TrainingRun
    ) -> list[Outcome]:
        train = images.train(lambda image: torch.tensor(image.size))
        assert train[0][0].tolist() == [32, 32]
        assert [train[n][1] for n in range(24)] == [0] * 12 + [1] * 12
        assert images.test[0][0].shape == (3, 32, 32)
        run.out.mkdir(parents=True, exist_ok=True)
        place = run.out / "checkpoint"
        if not place.exists():
            place.write_text("half")
            if self.fail:
                raise Cut
        labels = torch.tensor(images.test.targets)
        return [Outcome((1, "mean"), {}, [], labels[:, None])]


def test_evaluate__images_need_no_more_than_a_call(
    folder: Path, encoder: MaskedEncoder
) -> None:
    class Bare(ImageProtocol):
        name = "bare"
        reads = "images"

        def __call__(
            self, encoder: Any, images: Any, num_classes: int, run: TrainingRun
        ) -> list[Outcome]:
            labels = torch.tensor(images.test.targets)
            return [Outcome((1, "mean"), {}, [], labels[:, None])]

    results = evaluate(encoder, folder, [Bare()], **FAST)
    assert [row.top1 for row in results.rows] == [1.0]


def test_evaluate__tokens_and_training(
    folder: Path,
    encoder: MaskedEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = FAST | {
        "protocols": ["knn", Tokens(), Training()],
        "baselines": ["pixels", "random"],
        "out": tmp_path,
    }
    with pytest.raises(Cut):
        evaluate(encoder, folder, **arguments)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name.startswith("finetune-")
    monkeypatch.setattr(Training, "fail", False)
    results = evaluate(encoder, folder, **arguments)
    assert [(row.model, row.protocol) for row in results.rows[2:]] == [
        ("vit_tiny_patch16_224", "finetune"),
        (RANDOM, "knn"),
        (RANDOM, "my tokens"),
        (RANDOM, "finetune"),
        (PIXELS, "knn"),
    ]
    assert results.rows[2].top1 == 1
    assert results.rows[2].feature_seconds == 0
    assert "No raw pixels for my tokens, finetune, made for encoders." in results.notes
    assert not (tmp_path / "checkpoints").exists()


def test_evaluate__training_reads_images_of_its_own(encoder: MaskedEncoder) -> None:
    with pytest.raises(ValueError, match="has a transform of its own"):
        evaluate(
            encoder,
            noise(40, 4),
            [FineTune(epochs=1)],
            val=noise(8, 4),
            **FAST,
        )


def test_evaluate__every_protocol_on_features(
    folder: Path, encoder: MaskedEncoder
) -> None:
    results = evaluate(
        encoder,
        folder,
        [
            "logistic",
            Attentive(epochs=2, learning_rates=[1e-3], weight_decays=[0.0]),
            LowLabel(shots=[1, 2], draws=2),
        ],
        label_free=True,
        num_workers=0,
        device="cpu",
    )
    assert [(row.protocol, row.variant) for row in results.rows[:2]] == [
        ("logistic", ""),
        ("attentive", ""),
    ]
    assert {row.protocol for row in results.rows[2:]} == {"low_label"}
    assert [len(row.draws or ()) for row in results.rows] == [0, 0, 2, 2]
    assert results.rows[0].top1 == 1
    assert [row["pooling"] for row in results.measures] == ["mean", "cls"]
    assert results.measures[0]["model"] == "vit_tiny_patch16_224"
    assert "RankMe" in printed(results)


@pytest.mark.parametrize(
    ("name", "options", "img_size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, 64),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 2}, 64),
        ("swin_tiny_patch4_window7_224", {"img_size": 192, "window_size": 6}, 224),
        ("swinv2_tiny_window8_256", {"img_size": 192, "window_size": 12}, 224),
    ],
)
def test_check_evaluation__without_weights(
    name: str, options: dict[str, Any], img_size: int
) -> None:
    def build() -> MaskedEncoder:
        with torch.device("meta"):
            return masked_encoder(name, **options)

    check_evaluation(build(), {})
    check_evaluation(build(), {"img_size": img_size, "protocols": ["finetune"]})
    for wrong, message in (
        ({"layers": [40]}, "layers is one or more of"),
        ({"protocols": ["knm"]}, "protocols"),
        ({"baselines": ["noise"]}, "baselines"),
        ({"holdout": 0.0}, "holdout of evaluate is"),
        ({"img_size": 50}, "does not divide"),
        ({"protocols": [KNN]}, "has the class KNN"),
        ({"seed": -1}, "seed of evaluate"),
    ):
        with pytest.raises(ValueError, match=message):
            check_evaluation(build(), wrong)


TRAINED: dict[str, Any] = {
    "protocols": ["knn", FineTune(epochs=2, batch_size=8, micro_batch_size=4)],
    **FAST,
}


def evaluate_on_two_devices(folder: Path, out: Path) -> None:
    """Runs in a process, and from its beginning in the one that it starts."""
    torch.manual_seed(0)
    encoder = masked_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, **OPTIONS
    )
    results = evaluate(encoder, folder, devices=2, out=out / "two", **TRAINED)
    rank = distributed.get_rank()
    (out / f"{rank}.json").write_text(json.dumps(numbers(results)))


@pytest.mark.slow
def test_evaluate__on_two_devices(
    folder: Path, tmp_path: Path, encoder: MaskedEncoder
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.evaluation.test_evaluate import evaluate_on_two_devices\n"
        'if __name__ == "__main__":\n'
        f"    paths = Path({str(folder)!r}), Path({str(tmp_path)!r})\n"
        "    evaluate_on_two_devices(*paths)\n"
    )
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    words = [sys.executable, str(script)]
    subprocess.run(words, env=environment, check=True, timeout=600)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    one = numbers(evaluate(encoder, folder, out=tmp_path / "one", **TRAINED))
    assert found[0]["rows"] == one["rows"]
    assert [path.name for path in (tmp_path / "two").iterdir()].count("rows") == 0
    assert (tmp_path / "two" / "results.json").exists()
