from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightly_mim.checkpoints import hash_tensors, save_encoder
from lightly_mim.cli import main
from lightly_mim.data import ImageDataset
from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation import (
    KNN,
    FineTune,
    Linear,
    Logistic,
    Outcome,
    embed,
    evaluate,
    extract_features,
    load_classifier,
    load_encoder,
    predict,
    show,
)
from lightly_mim.evaluation.base import FeatureProtocol
from lightly_mim.evaluation.classifier_files import _METADATA_KEY, save_classifier
from lightly_mim.evaluation.supervised.finetune import FineTuned
from lightly_mim.files import sealed
from lightly_mim.transforms import EvalTransform

FAST: dict[str, Any] = {"num_workers": 0, "device": "cpu"}
VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
}


@pytest.fixture(scope="module")
def evaluation(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an encoder, the results of two probes, and their classifiers."""
    out = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    encoder = masked_encoder("vit_tiny_patch16_224", **VIT)
    save_encoder(encoder, out / "encoder.safetensors")
    protocols: list[FeatureProtocol] = [KNN(), Linear(epochs=5), Logistic()]
    evaluate(out, photos, protocols, layers=[0, 1], out=out, crop_ratio=0.9, **FAST)
    return out


def test_predict__is_what_was_evaluated(evaluation: Path, photos: Path) -> None:
    rows = {row.protocol: row for row in show(evaluation).rows}
    folder = evaluation / "classifiers"
    names = ["linear", "logistic"]
    assert [path.stem for path in sorted(folder.iterdir())] == names
    data = ImageDataset(photos / "val")
    best = {}
    for name in names:
        found = predict(folder / f"{name}.safetensors", photos / "val", **FAST)
        assert found.classes == data.classes
        assert found.filenames == data.filenames
        torch.testing.assert_close(found.probabilities.sum(1), torch.ones(len(data)))
        predicted = found.probabilities.argmax(dim=1)
        right = (predicted == torch.tensor(data.targets)).double().mean()
        assert float(right) == pytest.approx(rows[name].top1)  # type: ignore[union-attr]
        best[name] = max(entry["accuracy"] for entry in rows[name].selection)
        assert load_classifier(folder / f"{name}.safetensors").accuracy == best[name]
    # Of a directory, what was best on training images.
    whole = predict(evaluation, photos / "val", **FAST)
    chosen = max(best, key=lambda name: best[name])
    same = predict(folder / f"{chosen}.safetensors", photos / "val", **FAST)
    assert torch.equal(whole.probabilities, same.probabilities)
    one = photos / "val" / data.filenames[3]
    alone = predict(evaluation, one, **FAST)
    assert alone.filenames == [one.name]
    torch.testing.assert_close(alone.probabilities[0], whole.probabilities[3])


def test_predict__command_line(
    evaluation: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "predictions.csv"
    words = ["predict", str(evaluation), str(photos / "val"), "--out", str(out)]
    words += ["--num-workers", "0", "--device", "cpu"]
    main(words)
    printed = capsys.readouterr().out
    assert "probability 1" in printed and "temple" in printed
    assert last(printed) == f"All classes of every image: {out}"
    with out.open() as file:
        rows = list(csv.DictReader(file))
    found = predict(evaluation, photos / "val", **FAST)
    assert [row["file"] for row in rows] == found.filenames
    for row, values in zip(rows, found.probabilities, strict=True):
        assert row["class 1"] == found.classes[int(values.argmax())]
        assert float(row["probability 1"]) == pytest.approx(
            float(values.max()), abs=1e-6
        )
    with pytest.raises(SystemExit):
        main(words)
    assert "is there already: pass --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:3], "more"])
    assert "'more' stands behind no option" in capsys.readouterr().err


def last(output: str) -> str:
    """Returns the last line: where everything is, and what to type next."""
    return output.splitlines()[-1]


def test_predict__refuses(evaluation: Path, photos: Path, tmp_path: Path) -> None:
    def refused(match: str, model: Path, **options: Any) -> None:
        images = options.pop("images", photos / "val")
        with pytest.raises(ValueError, match=match):
            predict(model, images, **FAST, **options)

    file = evaluation / "classifiers" / "linear.safetensors"
    refused("is no classifier. Pass a file", evaluation / "encoder.safetensors")
    refused("holds no classifier. Evaluate with", photos)
    refused("There is no file or folder", file, images=tmp_path / "none")
    refused("out ends with .csv", file, out=tmp_path / "a.txt")
    text = tmp_path / "a.txt"
    text.write_text("no image")
    shutil.copy(next((photos / "val" / "temple").iterdir()), tmp_path / "b.jpg")
    refused("a.txt is no image", file, images=text)
    for place in range(0, file.stat().st_size, 97):
        content = bytearray(file.read_bytes())
        content[place] ^= 4
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(content)
        refused("damaged|no classifier", damaged)
    # Another encoder in its place; or none.
    other = tmp_path / "other"
    save_encoder(masked_encoder("vit_tiny_patch16_224", **VIT), other / "e.safetensors")
    refused("fitted on other weights", file, encoder=other / "e.safetensors")
    moved = Path(shutil.copytree(evaluation, tmp_path / "moved"))
    gone = Path(shutil.copytree(evaluation, tmp_path / "gone"))
    kept = evaluation.rename(evaluation.with_name("kept"))
    try:
        refused("which is not a file on this machine", gone)
        found = predict(gone, photos / "val", encoder=moved, **FAST)
        assert len(found.filenames) > 0
    finally:
        kept.rename(evaluation)


def rewritten(path: Path, to: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    """Writes a classifier that says something else, with its checksum, as a sender."""
    with safe_open(path, framework="pt") as content:
        whole = json.loads(content.metadata()[_METADATA_KEY])
    text = json.dumps(json.loads(whole["said"]) | changes)
    tensors = load_file(path) | tensors
    whole = {"said": text, "sha256": hash_tensors(sorted(tensors.items()), text)}
    save_file(tensors, to, {_METADATA_KEY: json.dumps(whole)})
    return to


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("classes of a classifier is a list", {"classes": 3}),
        ("accuracy of a classifier is", {"accuracy": "high"}),
        ("img_size of a classifier is", {"img_size": [32, -32]}),
        ("takes images of 16000 x 16000 pixels", {"img_size": [16000, 16000]}),
        ("crop_ratio of a classifier is", {"crop_ratio": 1e9}),
        ("value_range of a classifier is", {"value_range": [0, 10**400]}),
        ("key of a classifier is", {"key": 5}),
        ("cannot be built", {"key": [99, "mean"]}),
        ("cannot be built", {"key": [0, "evil"]}),
        ("cannot be built", {"classes": ["a", "b", "c"]}),
        ("source of a classifier is", {"source": ["/"]}),
        ("not a file on this machine", {"source": "https://example.org/x"}),
        ("not a file on this machine", {"source": "hf-hub:evil/x"}),
        ("fingerprint of a classifier is", {"fingerprint": 3}),
        ("fitted on other weights", {"fingerprint": {}}),
        ("it has evil", {"evil": 1}),
        ("neither of a probe nor of", {"key": None}),
        ("another version", {"version": 2}),
    ],
)
def test_load_classifier__is_data(
    evaluation: Path, tmp_path: Path, message: str, changes: dict[str, Any]
) -> None:
    file = evaluation / "classifiers" / "linear.safetensors"
    odd = rewritten(file, tmp_path / "odd.safetensors", {}, **changes)
    with pytest.raises(ValueError, match=f"odd.safetensors .*{message}"):
        load_classifier(odd)


def test_load_classifier__of_other_shapes_and_no_files(
    evaluation: Path, tmp_path: Path
) -> None:
    file = evaluation / "classifiers" / "linear.safetensors"
    for tensors in ({"weight": torch.zeros(2, 7)}, {"weight": torch.zeros(2)},
                    {"bias": torch.zeros(9)}, {"more": torch.zeros(1)}):  # fmt: skip
        odd = rewritten(file, tmp_path / "odd.safetensors", tensors)
        with pytest.raises(ValueError, match=r"odd\.safetensors cannot be built"):
            load_classifier(odd)
    dim = load_file(file)["weight"].shape[1]
    tensors = {"weight": torch.full((2, dim), torch.nan)}
    odd = rewritten(file, tmp_path / "odd.safetensors", tensors)
    with pytest.raises(ValueError, match="its weights hold NaN or infinite values"):
        load_classifier(odd)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path} is no classifier, or damaged"):
            load_classifier(path)
    # Of a folder, one that is damaged is told before any is taken.
    folder = Path(shutil.copytree(evaluation, tmp_path / "folder"))
    rewritten(file, folder / "classifiers" / "linear.safetensors", {}, accuracy=2)
    with pytest.raises(ValueError, match="accuracy of a classifier is"):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("beit_base_patch16_224", {**VIT, "use_shared_rel_pos_bias": True}),
    ],
)
def test_finetuned__is_saved_whole(
    photos: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    encoder = masked_encoder(name, **options)
    model = FineTuned(encoder, 2, "mean", 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    outcome = Outcome((1, "mean"), {}, [], torch.zeros(0, 1), classifier=model)
    file = tmp_path / "classifiers" / "finetune.safetensors"
    save_classifier(file, outcome, encoder, None, ["a", "b"], crop_ratio=1.0)
    state = torch.get_rng_state()
    loaded = load_classifier(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert loaded.accuracy is None
    assert predict(tmp_path, photos / "val", **FAST).classes == ["a", "b"]
    with pytest.raises(ValueError, match="leave encoder out"):
        load_classifier(file, encoder)
    with safe_open(file, framework="pt") as content:
        assert json.loads(content.metadata()["lightly_mim_classifier"])["sha256"]


def test_finetuned__predicts_as_it_was_evaluated(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = masked_encoder("vit_tiny_patch16_224", **VIT)
    settings = FineTune(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0)
    done = evaluate(encoder, photos, [settings], out=tmp_path, crop_ratio=0.9, **FAST)
    found = predict(tmp_path, photos / "val", **FAST)
    labels = torch.tensor(ImageDataset(photos / "val").targets)
    right = (found.probabilities.argmax(dim=1) == labels).double().mean()
    assert float(right) == pytest.approx(done.rows[0].top1)


def test_finetuned__of_another_class(tmp_path: Path) -> None:
    """A file that names a model that it does not hold."""
    encoder = masked_encoder("vit_tiny_patch16_224", **VIT)
    model = FineTuned(encoder, 2, "mean", 0.5)
    model.encoder.name = "vit_giant_patch14_224"
    outcome = Outcome((1, "mean"), {}, [], torch.zeros(0, 1), classifier=model)
    file = tmp_path / "finetune.safetensors"
    save_classifier(file, outcome, encoder, None, ["a", "b"], crop_ratio=1.0)
    with pytest.raises(ValueError, match="cannot be built"):
        load_classifier(file)


@pytest.mark.parametrize("ending", ["csv", "npz", "parquet"])
def test_embed__equals_extract_features(
    evaluation: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ending: str,
) -> None:
    out = tmp_path / f"features.{ending}"
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    words = ["embed", str(evaluation), str(photos / "val"), "--out", str(out)]
    words += ["--layers", "0", "1", "--crop_ratio", "1", "--num_workers", "0"]
    main([*words, "--device", "cpu"])
    assert f"12 images in {out}: " in (said := last(capsys.readouterr().out))
    assert said.endswith(("numpy.load.", "read_csv.", "read_parquet."))
    encoder = load_encoder(evaluation)
    data = ImageDataset(photos / "val", EvalTransform(32, 1.0, normalize=None))
    expected = extract_features(encoder, data, layers=[0, 1], num_workers=0)
    classes = [data.classes[target] for target in data.targets]
    if ending == "npz":
        found = dict(np.load(out))
        names = ["filenames", "class", "layer00-mean", "layer01-mean"]
        assert [*found] == ["filename", *names[1:]]
        assert found["filename"].tolist() == data.filenames
        assert found["class"].tolist() == classes
        for layer in (0, 1):
            values = found[f"layer0{layer}-mean"]
            np.testing.assert_array_equal(values, expected.values[layer, "mean"])
        return
    if ending == "csv":
        with out.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["filename"] for row in rows] == data.filenames
        assert [row["class"] for row in rows] == classes
        for layer in (0, 1):
            columns = [f"layer0{layer}-mean-{number}" for number in range(24)]
            values = [[float(row[name]) for name in columns] for row in rows]
            wanted = expected.values[layer, "mean"]
            assert torch.equal(torch.tensor(values), wanted)
        return
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out).to_pydict()
    assert table["filename"] == data.filenames
    wanted = expected.values[1, "mean"]
    assert torch.equal(torch.tensor(table["layer01-mean"]), wanted)


def test_embed__refuses(
    evaluation: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, out: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            embed(evaluation, photos / "val", out, **FAST, **options)
        assert not list(tmp_path.glob("*.npz"))

    refused("ends with .parquet or .csv or .npz", tmp_path / "a.json")
    refused("layers is one or more of 0 to 1", tmp_path / "a.npz", layers=[2])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused("takes the package pyarrow: install it", tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("precious")
    refused("is there already", tmp_path / "a.csv")
    with pytest.raises(TypeError, match="no_such"):
        embed(evaluation, photos / "val", tmp_path / "b.csv", no_such=1)


def test_show(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", str(evaluation / "results.json")])
    first = capsys.readouterr().out
    assert "Top-1" in first and "linear" in first and "logistic" in first
    assert last(first).endswith(f": lightly-mim report {evaluation}")
    written = json.loads((evaluation / "results.json").read_text())
    del written["sha256"]
    assert show(evaluation).to_dict() == written
    # Of version 1, which had fewer columns.
    kept = ["model", "protocol", "layer", "pooling", "hyperparameters", "top1"]
    kept += ["top1_low", "top1_high", "top5", "feature_seconds", "seconds"]
    written["rows"] = [{name: row[name] for name in kept} for row in written["rows"]]
    (tmp_path / "results.json").write_text(json.dumps(sealed(written)))
    main(["show", str(tmp_path)])
    assert "logistic" in capsys.readouterr().out
    (tmp_path / "results.json").write_text('{"rows": 3}')
    for path, match in (
        (tmp_path, "holds no results of an evaluation"),
        (evaluation / "classifiers", "holds neither results.json nor dense.json"),
        (tmp_path / "none.json", "There is no file"),
    ):
        with pytest.raises(ValueError, match=match):
            show(path)
