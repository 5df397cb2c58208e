"""Files from elsewhere: damaged, mixed up and hostile ones."""

from __future__ import annotations

import argparse
import datetime
import fractions
import json
import os
import shutil
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightly_mim.checkpoints import put_encoder, read_weights, save_encoder
from lightly_mim.checkpoints.ours import METHOD_KEY
from lightly_mim.config import to_config
from lightly_mim.conversion import convert
from lightly_mim.evaluation import load_encoder
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.pretraining import Pretraining, pretrain

from ..conftest import SHORT_RUN, TINY_VIT
from . import official


class Hostile:
    """Touches a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


DOORS = [
    read_weights,
    load_encoder,
    MAE.from_pretrained,
    lambda path: convert(path, "timm", Path(path).parent / "out"),
    lambda path: pretrain(Path(path).parent / "out", "photos", init=path),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_pickle_that_would_run_code(tmp_path: Path, zipped: bool, door: Any) -> None:
    mark = tmp_path / "it-ran"
    state = {"model": official.mae(), "args": Hostile(mark)}
    file = tmp_path / "a.pth"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth is refused: it asks for \w+\.system"):
        door(file)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # so much for others


def test_harmless_classes_and_others(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(betas=(0.9, 0.95)))
    torch.save({"model": official.mae(), "args": args}, tmp_path / "a")
    assert read_weights(tmp_path / "a").method == "MAE"
    for what, name in (
        (fractions.Fraction(1, 2), r"fractions\.Fraction"),
        (Path("a"), r"pathlib\.[\w.]*Path"),
        (argparse.Namespace(day=datetime.date(2021, 11, 11)), r"datetime\.date"),
    ):
        torch.save({"model": official.mae(), "args": what}, tmp_path / "b")
        with pytest.raises(ValueError, match=f"asks for {name}"):
            read_weights(tmp_path / "b")


def write(kind: str, path: Path) -> tuple[Path, Path]:
    """Returns what is read, and the file to cut."""
    file = path / "a"
    state = {"model": official.mae(dim=192, width=16)}
    if kind in ("zip", "pickle"):
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
        return file, file
    if kind == "safetensors":
        save_file(state["model"], file)
        return file, file
    if kind == "encoder":
        save_encoder(SimMIM("vit_tiny_patch16_224", depth=1).encoder, file)
        return file, file
    folder = path / "folder"
    folder.mkdir()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = SimMIM("vit_tiny_patch16_224", depth=1).encoder.vit
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder, folder / kind


KINDS = ["zip", "pickle", "safetensors", "encoder", "model.safetensors", "config.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_an_error(tmp_path: Path, kind: str) -> None:
    read, cut = write(kind, tmp_path)
    read_weights(read)
    whole = cut.read_bytes()
    # The last byte of a text is the closing bracket.
    places = np.random.default_rng(0).integers(0, len(whole), size=50)
    for place in [*places.tolist(), 0, 1, 8, 9, len(whole) - 1]:
        cut.write_bytes(whole[:place])
        with pytest.raises((ValueError, OSError), match=cut.name.split(".")[0]):
            convert(read, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"a", "folder"}


def test_programs_are_not_called_damaged(tmp_path: Path) -> None:
    """torch.export's and ONNX' files are whole, and no weights."""
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "a.pt2")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x05")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "pictures")
    for name in ("a.pt2", "a.onnx", "a.zip"):
        for read in (read_weights, load_encoder):
            with pytest.raises(
                ValueError, match="is neither a safetensors .*converted"
            ):
                read(tmp_path / name)
    torch.save({}, tmp_path / "b.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"b\.pth is damaged: "):
        read_weights(tmp_path / "b.pth")


def test_run_directory_is_data(tmp_path: Path, monkeypatch: Any) -> None:
    """Names of callables in a run from elsewhere are not imported."""
    model = MAE("vit_tiny_patch16_224", img_size=64, depth=1, decoder_depth=1)
    from ..test_conversion import saved

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    last = saved(model, folder / "checkpoints" / "last.ckpt")
    save_encoder(model.encoder, folder / "encoder.safetensors")
    (tmp_path / "evil.py").write_text("open('it-ran', 'w')\nclass MAE: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": "touch it-ran"}}
    good = {"out": "a", "data": "b", "recipe": {}}
    state = torch.load(last, weights_only=True)
    for method in (
        popen,
        {"class_path": "evil.MAE"},
        {"class_path": "lightly_mim.methods.MAE", "init_args": {"target": popen}},
        {"class_path": "lightly_mim.methods.MAE", "init_args": {"loss": popen}},
    ):
        (folder / "config.yaml").write_text(yaml.safe_dump(good | {"method": method}))
        torch.save(state | {"method": json.dumps(method)}, last)
        nested = str(method["class_path"]).startswith("lightly_mim")
        if nested:
            with pytest.raises(ValueError, match="subprocess.Popen is not of"):
                MAE.from_pretrained(folder)
        else:
            MAE.from_pretrained(folder)  # its encoder, with our own method
        words = "is not of" if nested else "not of this package"
        with pytest.raises(ValueError, match=words):
            convert(folder, "timm", tmp_path / "out")
    assert not (tmp_path / "it-ran").exists()


def test_folder_names_files_outside(tmp_path: Path) -> None:
    save_file(official.mae(), tmp_path / "a.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"cls_token": "../a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        read_weights(folder)
    index = {"weight_map": {"cls_token": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(official.mae(), folder / "a.safetensors")
    assert read_weights(folder).method == "MAE"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "hf-hub:evil/x"}, "one of timm's own models"),
        ({"architecture": "local-dir:/tmp"}, "one of timm's own models"),
        ({"architecture": "vit_none"}, "one of timm's own models"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({"model_args": {"pretrained_cfg": {"url": "http://x"}}}, "pretrained_cfg"),
        ({"model_args": {"depth": 10**9}}, "numbers of up to"),
        ({"model_args": {"depth": 5000}}, "no deeper than"),
        ({"model_args": {"img_size": 10**6}}, "img_size"),
        ({"pretrained_cfg": {"mean": ["a", 1, 1]}}, "mean is"),
        ({"pretrained_cfg": {"input_size": 3}}, "do not fit it"),
    ],
)
def test_folder_of_timm_that_asks_for_more(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder, _ = write("config.json", tmp_path)
    good = {"architecture": "vit_tiny_patch16_224"}
    (folder / "config.json").write_text(json.dumps(good | config))
    with pytest.raises(ValueError, match=message):
        read_weights(folder)


def test_bits_that_changed(tmp_path: Path) -> None:
    file, _ = write("zip", tmp_path)
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1  # in a tensor, where PyTorch does not look
    file.write_bytes(whole)
    torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match="a is damaged: "):
        read_weights(file)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for door in (load_encoder, MAE.from_pretrained):
        with pytest.raises(ValueError, match="Hugging Face hub it cannot be fetched"):
            door("facebook/no-such-model")
    for door in (load_encoder, MAE.from_pretrained):  # a path with a mistake in it
        with pytest.raises(ValueError, match=r"weights.*no-such|no-such.* weights"):
            door("no/no-such-model.pth")


def test_run_that_fetches_nothing(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from elsewhere may have begun with weights of the hub."""

    def fetch(name: str, **_: Any) -> str:
        raise AssertionError(name)

    monkeypatch.setattr("lightly_mim.checkpoints.hub.snapshot_download", fetch)
    run = tmp_path / "run"
    options = {**SHORT_RUN, "epochs": 1}
    pretrain(run, photos, partial(MAE, **TINY_VIT), **options)
    config = yaml.safe_load((run / "config.yaml").read_text())
    shutil.rmtree(run / "checkpoints")
    (run / "finished.json").unlink()
    for init in ("hf-hub:owner/model", "local-dir:/nowhere", "owner/model"):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "init": init}))
        with pytest.raises(ValueError, match="No file has weights fetched: pass init="):
            pretrain(run, resume=True)
    with pytest.raises(ValueError, match="cannot be fetched"):  # who says it, has it
        pretrain(run, resume=True, init="owner/model")


def test_encoder_whose_name_changed(tmp_path: Path) -> None:
    """Without our key it would pass for a state dict of timm, with other statistics."""
    file, _ = write("encoder", tmp_path)
    content = file.read_bytes()
    for name in (b'"lightly_mim"', rb"\"sha256\""):
        assert content.count(name) == 1
        for place in range(1, len(name) - 1):
            damaged = bytearray(content)
            damaged[content.index(name) + place] ^= 1
            file.write_bytes(damaged)
            if name != b'"lightly_mim"' and place not in (1, len(name) - 2):
                # The weights are whole, and said to be what they are.
                assert read_weights(file).layout == "lightly_mim's encoder"
                continue
            with pytest.raises(ValueError, match="a "):
                read_weights(file)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for door in (read_weights, load_encoder, MAE.from_pretrained):
            with pytest.raises(ValueError, match="neither a file nor a folder"):
                door(path)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "config.json").write_text("{}")
    for name in ("pipe", "none.safetensors", 5, ["x"]):
        index.write_text(json.dumps({"weight_map": {"cls_token": name}}))
        with pytest.raises(ValueError, match="names a file that is not there"):
            read_weights(tmp_path)


@pytest.mark.parametrize(
    "path", ["lightly_mim.base", "lightly_mim.MIMOutput", "MaskedImageModel", "x"]
)
def test_method_that_is_none(tmp_path: Path, path: str) -> None:
    """What a checkpoint calls its method may be anything."""
    method = MAE(**TINY_VIT)
    checkpoint: dict[str, Any] = {
        "state_dict": Pretraining(method).state_dict(),
        METHOD_KEY: json.dumps({"class_path": path}),
    }
    put_encoder(method.encoder, checkpoint, None)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is not of this package: pass the method"):
        from_pretrained(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("place", "name", "value", "said"),
    [
        ("init_args", "banana", 3, "has no option 'banana'; it knows encoder"),
        ("dict_kwargs", "banana", 3, "has no option 'banana'"),
        ("dict_kwargs", "decoder_width", 3, "has no option 'decoder_width'"),
        ("init_args", "target", {"class_path": "lightly_mim.targets.Pixels",
         "init_args": {"banana": 3}}, "Pixels of .* has no option 'banana'; it knows"),
        ("init_args", "target", {"class_path": "os.system"}, "is not of lightly_mim"),
        ("init_args", "mask_ratio", "much", "mask_ratio of MAE is"),
        ("init_args", "decoder_dim", [3], "decoder_dim of MAE is"),
        ("init_args", "decoder_depth", 10**9, "decoder_depth is 1000000000, and no"),
        ("init_args", "decoder_num_heads", 10**6, "decoder_num_heads is"),
        ("init_args", "decoder_dim", 10**9, "decoder_dim is 1000000000, and no"),
        ("init_args", "decoder_depth", 40, "it would have .* weights"),
    ],
)  # fmt: skip
def test_options_that_are_not_the_method_s(
    tmp_path: Path, place: str, name: str, value: Any, said: str
) -> None:
    """Of a newer version, changed by hand, or made to take memory and time."""
    method = MAE(**TINY_VIT, decoder_dim=64, decoder_depth=1, decoder_num_heads=2)
    described = to_config(method)
    described[place][name] = value
    checkpoint: dict[str, Any] = {
        "state_dict": Pretraining(method).state_dict(),
        METHOD_KEY: json.dumps(described),
    }
    put_encoder(method.encoder, checkpoint, None)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    start = time.monotonic()
    for door in (MAE.from_pretrained, partial(from_pretrained, cls=None)):
        with pytest.raises(ValueError, match=rf"a\.ckpt cannot be built.*{said}"):
            door(tmp_path / "a.ckpt")
    assert time.monotonic() - start < 10
    load_encoder(tmp_path / "a.ckpt")


def test_options_that_say_where_weights_are__are_left_out(tmp_path: Path) -> None:
    method = MAE(**TINY_VIT)
    described = to_config(method)
    described["dict_kwargs"] |= {"checkpoint_path": "/x", "cache_dir": "/y"}
    checkpoint: dict[str, Any] = {
        "state_dict": Pretraining(method).state_dict(),
        METHOD_KEY: json.dumps(described),
    }
    put_encoder(method.encoder, checkpoint, None)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    made = MAE.from_pretrained(tmp_path / "a.ckpt")
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name])


def test_convert__of_a_run_that_had_not_finished(tmp_path: Path) -> None:
    method = MAE(**TINY_VIT)
    checkpoint: dict[str, Any] = {
        "state_dict": Pretraining(method).state_dict(),
        METHOD_KEY: json.dumps(to_config(method)),
    }
    place: dict[str, int | None] = {"epoch": 1, "epochs": 2, "step": 3, "steps": 9}
    put_encoder(method.encoder, checkpoint, place)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    out = convert(tmp_path / "a.ckpt", "safetensors", tmp_path / "out")
    there: Any = load_encoder(out / "encoder.safetensors")
    for name, tensor in method.encoder.vit.state_dict().items():
        assert torch.equal(tensor, there.vit.state_dict()[name])
    assert there.unfinished == place


@pytest.mark.parametrize(
    ("name", "numbered"),
    [
        ("blocks.0.attn.qkv.weight", "blocks.999999999.norm1.weight"),
        ("layers.0.blocks.0.attn.qkv.weight", "layers.999999999.x"),
        ("layers.0.blocks.0.attn.qkv.weight", "layers.0.blocks.999999999.x"),
        ("layers.0.downsample.reduction.weight", "layers.999999999.x"),
    ],
)
def test_names_that_count_for_years(tmp_path: Path, name: str, numbered: str) -> None:
    names = {"layers.0.blocks.0.attn.qkv.weight"} if "down" in name else set()
    state = dict.fromkeys({name, numbered, *names}, torch.ones(1))
    state["patch_embed.proj.weight"] = torch.ones(192, 3, 16, 16)
    torch.save(state, tmp_path / "a.pth")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"There are \d weights, and (blocks|layers)"):
        read_weights(tmp_path / "a.pth")
    assert time.monotonic() - start < 5
