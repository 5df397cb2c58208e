"""A file that somebody sends is data: nothing runs because it names it."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightly_mim import cli
from lightly_mim.checkpoints import load_whole, read_encoder, save_encoder
from lightly_mim.config import read_yaml
from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation import load_encoder

EVIL = """
import pathlib
pathlib.Path("executed").touch()
from lightly_mim.methods import SimMIM
class Mine(SimMIM): pass
class KNN: pass
def make(*args, **options) -> SimMIM:
    return SimMIM("vit_tiny_patch16_224", img_size=32)
"""
WORDS = ["pretrain", "--out", "x", "--data", "y"]
ENCODER = "encoder: vit_tiny_patch16_224, img_size: 64"


def simmim(more: str = "", outside: str = "") -> str:
    return (
        "method: {class_path: lightly_mim.SimMIM, init_args: {"
        f"{ENCODER}{more}}}{outside}}}"
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that tells when it is imported."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "sub.yaml").write_text("class_path: evil.Mine\n")
    (tmp_path / "sub.json").write_text('{"class_path": "evil.Mine"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path


def executed() -> bool:
    return Path("executed").exists() or "evil" in sys.modules


CODE = "which is code: no file has it run.*in Python"
NOT_OURS = "is not of lightly_mim, and no file has it imported.*--trust"
NO_SETTING = "which is not the name of a setting"
NO_OPTION = "which is no option of the command"
CONFIGS = {
    # A callable as the method.
    "method: {class_path: os.system, init_args: {command: touch executed}}": NOT_OURS,
    "method: os.system": NOT_OURS,
    "method: {class_path: evil.Mine, init_args: {encoder: x}}": NOT_OURS,
    "method: evil.make": NOT_OURS,
    "method: {class_path: lightly_mim.pretraining.os.system}": "no class",
    "method: {class_path: lightly_mim.pretrain, init_args: {out: x}}": "no class",
    "method: {class_path: RandomMasking}": "is no MaskedImageModel",
    "method: {class_path: lightly_mim.targets.Pixels}": "is no MaskedImageModel",
    "method: {class_path: 5}": "is no MaskedImageModel",
    "method: {init_args: {command: ls}}": "does not say its class_path",
    "method: [evil.make]": NOT_OURS,
    # Words that jsonargparse reads once more.
    "method: '{class_path: evil.Mine}'": NOT_OURS,
    'method: "class_path: evil.Mine"': NOT_OURS,
    "recipe: \"'{class_path: evil.KNN}'\"": NO_SETTING,
    simmim("", ", dict_kwargs: {x: \"'[{class_path: evil.KNN}]'\"}"): NO_SETTING,
    "method.class_path: evil.Mine": NO_OPTION,
    # Further files.
    "method: sub.yaml": NOT_OURS,
    "method: sub.json": NOT_OURS,
    "config: sub.yaml": NO_OPTION,
    "__path__: sub.yaml": NO_OPTION,
    "normalize: sub.yaml": "normalize",
    "data: !include sub.yaml": "cannot be read: ",
    # Parts, and parts of parts.
    simmim().replace("vit_tiny_patch16_224", "[hf-hub:x]"): "encoder",
    simmim().replace("vit_tiny_patch16_224", "{class_path: evil.make}"): NO_SETTING,
    simmim(", target: evil.make"): NOT_OURS,
    simmim(", target: {class_path: evil.make}"): NOT_OURS,
    simmim(", target: sub.yaml"): NOT_OURS,
    simmim(", loss: builtins.print"): NOT_OURS,
    simmim(", head: {class_path: SimMIM}"): "is no Head",
    simmim(
        ", masking: {class_path: MixtureMasking, init_args: {maskings: [evil.make]}}"
    ): NOT_OURS,
    simmim(", masking: '{class_path: evil.make}'"): NOT_OURS,
    simmim("", ", other: 1"): "has other; there are class_path",
    simmim("", ", init_args.target: evil.make"): "has init_args.target",
    simmim("", ", dict_kwargs: {x: {class_path: evil.KNN}}"): NO_SETTING,
    simmim("", ", dict_kwargs: {x: '{class_path: evil.KNN}'}"): NO_SETTING,
    simmim("", ", dict_kwargs: [evil.make]"): "has no settings",
    # What Python alone may pass.
    "callbacks: [evil.make]": CODE,
    "callbacks: [{class_path: pytorch_lightning.callbacks.LambdaCallback, init_args: "
    "{on_fit_start: os.system}}]": CODE,
    "loggers: evil.make": CODE,
    "callbacks+: [evil.make]": NO_OPTION,
    # Settings that are classes.
    "recipe: {class_path: evil.KNN}": NO_SETTING,
    "recipe: '{class_path: evil.KNN}'": NO_SETTING,
    "normalize: {class_path: evil.make}": NO_SETTING,
    "normalize: {a.class_path: evil.make}": NO_SETTING,
    # Weights from wherever the file says.
    simmim().replace("vit_tiny_patch16_224", "hf-hub:evil/x"): "not one of timm's own",
    simmim().replace("vit_tiny_patch16_224", "'local-dir:/'"): "not one of timm's own",
    simmim("", ", dict_kwargs: {pretrained_cfg: {url: 'http://x'}}"): "where weights",
    simmim("", ", dict_kwargs: {checkpoint_path: evil.pth}"): "where weights",
    "init: owner/model": "no file has weights fetched.*--trust",
    "init: facebook/vit-mae-base": "no file has weights fetched.*--init",
    "init: hf-hub:evil/x": "not one of timm's own",
    "init: 'local-dir:/tmp'": "not one of timm's own",
    # YAML.
    "data: !!python/object/apply:os.system [touch executed]": "cannot be read: ",
    "data: !!binary aGVsbG8=": "is a bytes",
    "data: !!set {a, b}": "is a set",
    "lr: .inf": "not a finite number",
    "lr: &a 1\nepochs: *a": "repeats",
    "data: " + "[" * 5000: "levels deep",
    "data: " + "x" * 200_000: "bytes: no configuration",
    "<<: {method: evil.Mine}": NOT_OURS,
    "pretrain: {method: evil.Mine}": NO_OPTION,
    "subcommand: evaluate": NO_OPTION,
    "5: 5": NO_OPTION,
    "- method": "no lines of",
    "": "no lines of",
    "\0": "cannot be read: ",
}


@pytest.mark.parametrize("content", CONFIGS, ids=lambda text: text[:60])
def test_config__is_data(content: str) -> None:
    Path("c.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){CONFIGS[content]}"):
        cli.check([*WORDS, "--config", "c.yaml"])
    assert not executed()


@pytest.mark.parametrize("command", ["evaluate", "evaluate-dense"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("feature_function: evil.make", f"{CODE}|{NO_OPTION}"),
        ("knn: sub.yaml", "has settings, not a name"),
        ("knn: {class_path: evil.KNN}", NO_SETTING),
        ("linear: '{class_path: evil.KNN}'", NO_SETTING),
        ("encoder: hf-hub:evil/x", "not one of timm's own models"),
    ],
)
def test_config__of_evaluations(command: str, content: str, message: str) -> None:
    Path("c.yaml").write_text(content)
    words = [command, "--data", "y", "--config", "c.yaml"]
    words += [] if content.startswith("encoder") else ["--encoder", "x"]
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        cli.check(words)
    assert not executed()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config sub.yaml pretrain", "stands behind the command"),
        ("pretrain --conf sub.yaml --out x", "no option --conf"),
        ("pretrain --config {method:evil.Mine}", "File does not exist"),
        ("pretrain --out x --data y --trust", "does nothing without --config"),
        ("evaluate --encoder x --data y --knn sub.yaml", "is a file"),
        ("pretrain --out x --data y --method sub.yaml", "cannot be imported"),
        ("pretrain --out x --data y --callbacks sub.yaml", "class_path 'sub.yaml'"),
    ],
)
def test_words__files_stand_behind_config_alone(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.check(words.split())
    assert not executed()


def test_environment__sets_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text("callbacks: [evil.make]")
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for prefix in ("LIGHTLY_MIM_PRETRAIN__", "LIGHTLY_MIM_", "PRETRAIN__", ""):
        monkeypatch.setenv(f"{prefix}CONFIG", "c.yaml")
        monkeypatch.setenv(f"{prefix}CALLBACKS", "evil.make")
        monkeypatch.setenv(f"{prefix}EPOCHS", "no number")
    assert cli.check(WORDS) is None
    assert not executed()


def test_config__of_ones_own() -> None:
    Path("c.yaml").write_text(
        f"method: {{class_path: evil.Mine, init_args: {{{ENCODER}}}}}"
    )
    words = [*WORDS, "--config", "c.yaml"]
    own = ["--method", "evil.Mine", "--method.encoder", "vit_tiny_patch16_224"]
    assert type(cli.check([*words, "--trust"])).__name__ == "Mine"
    assert type(cli.check([*words, *own])).__name__ == "Mine"
    for content, message in {
        "method: os.system": "is no MaskedImageModel",
        "method: evil.KNN": "is no MaskedImageModel",
        "callbacks: [evil.make]": CODE,
    }.items():
        Path("c.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            cli.check([*words, "--trust"])


def test_config__says_what_it_says() -> None:
    parts = ", target: Pixels, masking: {class_path: BlockMasking, init_args: {ratio: "
    Path("c.yaml").write_text(
        f"{simmim(f'{parts}4e-1, mask_patch_size: 16}}}}')}\nlr: 1e-3\nbatch_size: 4\n"
        "val: '1e-3'\ncallbacks: []\nloggers: null\nrecipe: null\n"
    )
    method = cli.check([*WORDS, "--config", "c.yaml"])
    assert method is not None
    assert method.masking.init_args["ratio"] == 0.4
    assert repr(method.target).startswith("Pixels")
    method = cli.check([*WORDS, "--config", "c.yaml", "--method.img_size", "96"])
    assert method is not None and method.encoder.img_size == (96, 96)


def test_read_yaml__takes_no_more_than_a_configuration(tmp_path: Path) -> None:
    bomb = ["a0: &a0 [x, x]"]
    bomb += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    for content in ("\n".join(bomb), "{a: " * 50 + "1", "a: " + "x" * 1_000_000):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ValueError, match="repeats|levels deep|bytes"):
            read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match="cannot be read: "):
        read_yaml(tmp_path / "c.yaml")


# The metadata of an encoder.


def encoder_file(path: Path, **changes: Any) -> Path:
    """Writes an encoder whose metadata says something else, as a sender would."""
    save_encoder(masked_encoder("vit_tiny_patch16_224", **TINY), path)
    with safe_open(path, framework="pt") as content:
        spec = json.loads(content.metadata()["lightly_mim"])
    options = changes.pop("options", {})
    spec |= changes
    if isinstance(options, dict):
        options = spec["options"] | options
    save_file(
        load_file(path), path, {"lightly_mim": json.dumps(spec | {"options": options})}
    )
    return path


TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}
SPECS: list[dict[str, Any]] = [
    {"name": "hf-hub:evil/model"},
    {"name": "hf_hub:evil/model"},
    {"name": "local-dir:/tmp"},
    {"name": "https://example.org/model"},
    {"name": "../vit_tiny_patch16_224"},
    {"name": "no_such_model"},
    {"name": "resnet18"},
    {"name": 5},
    {"options": {"pretrained": True}},
    {"options": {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}}},
    {"options": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth"}}},
    {"options": {"checkpoint_path": "evil.pth"}},
    {"options": {"cache_dir": "/tmp"}},
    {"options": {"num_classes": 10**9}},
    {"options": {"encoder": "x"}},
    {"options": {"features_only": True}},
    {"options": {"depth": 100_000}},
    {"options": {"depth": 60_000}},
    {"options": {"depth": 3}},
    {"options": {"depth": 2.5}},
    {"options": {"embed_dim": 65_536}},
    {"options": {"embed_dim": -16}},
    {"options": {"mlp_ratio": 60_000.0}},
    {"options": {"mlp_ratio": 1e300}},
    {"options": {"num_heads": 0}},
    {"options": {"patch_size": 1}, "img_size": [16_000, 16_000]},
    {"options": {"norm_layer": "evil.make"}},
    {"options": {"a": ["x"] * 2000}},
    {"options": {"a": "x" * 200}},
    {"options": None},
    {"options": [["depth", 2]]},
    {"img_size": [0, 32]},
    {"img_size": [32, 32, 32]},
    {"img_size": "32"},
    {"img_size": [16_000, 16_000], "pos_embed": "sincos"},
    {"img_size": [10**9, 10**9]},
    {"in_chans": 10**9},
    {"in_chans": True},
    {"in_chans": 1, "mean": [0.5], "std": [0.5]},
    {"mean": [0.5, 0.5]},
    {"mean": [float("nan"), 0.5, 0.5]},
    {"std": [0.5, 0.5, -0.5]},
    {"std": [0.5, 0.5, 0.0]},
    {"std": [float("inf"), 0.5, 0.5]},
    {"pos_embed": "evil"},
    {"init": "evil"},
    {"pool": "evil"},
    {"pool": ["cls"]},
    {"unfinished": {"epoch": "x"}},
    {"unfinished": [1]},
    {"value_range": None},
    {"value_range": [4095]},
    {"value_range": [4095, 0]},
    {"value_range": [0, 65_536]},
    {"value_range": [0, 255.5]},
    {"value_range": "ab"},
    {"tables": "evil"},
    {"tables": None},
    {"mean": [10**400, 0.5, 0.5]},
    {"img_size": [10**400, 32]},
    {"options": {"depth": 10**400}},
]


@pytest.mark.parametrize("changes", SPECS, ids=lambda changes: str(changes)[:60])
def test_encoder__metadata_is_checked_before_it_is_built(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", connect)
    path = encoder_file(tmp_path / "encoder.safetensors", **changes)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        load_encoder(path)
    assert time.monotonic() - start < 20  # and 100,000 blocks take minutes


DEEP = '{"name": ' + "[" * 990 + "]" * 990 + "}"


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{}", "[" * 100_000, DEEP])
def test_encoder__metadata_is_something_else(text: str, tmp_path: Path) -> None:
    path = encoder_file(tmp_path / "encoder.safetensors")
    save_file(load_file(path), path, {"lightly_mim": text})
    with pytest.raises(ValueError, match=r"not a file that lightly_mim wrote"):
        read_encoder(path)


def test_encoder__of_an_earlier_version_or_with_a_checksum(tmp_path: Path) -> None:
    path = encoder_file(tmp_path / "encoder.safetensors")  # without one
    assert load_encoder(path).embed_dim == 16
    encoder = load_encoder(path)
    save_encoder(encoder, path)  # type: ignore[arg-type]
    assert load_encoder(path).embed_dim == 16
    with safe_open(path, framework="pt") as content:
        metadata = content.metadata()
    weights = load_file(path)
    weights["norm.bias"] += 1
    save_file(weights, path, metadata)
    with pytest.raises(ValueError, match="its checksum is another"):
        load_encoder(path)
    weights["norm.bias"] -= 1
    metadata["lightly_mim"] = metadata["lightly_mim"].replace("0.485", "0.495")
    save_file(weights, path, metadata)
    with pytest.raises(ValueError, match="its checksum is another"):
        load_encoder(path)


# PyTorch's files.


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def zipped(content: Any, packed: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    if packed:
        again = io.BytesIO()
        with zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as archive:
            for info in zipfile.ZipFile(file).infolist():
                archive.writestr(info.filename, zipfile.ZipFile(file).read(info))
        file = again
    return file.getvalue()


def legacy(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FILES = {
    "objects": (zipped(Evil()), "foreign"),
    "objects within": (zipped({"state_dict": {"a": Evil()}}), "foreign"),
    "legacy objects": (legacy(Evil()), "foreign"),
    "pickle": (pickle.dumps(Evil()), "foreign"),
    "packed": (zipped({"a": torch.zeros(1000)}, packed=True), "is packed"),
    "empty": (b"", "does not begin"),
    "text": (b"hello", "does not begin"),
    "empty zip": (b"PK\5\6" + b"\0" * 18, "does not begin"),
    "zip's head": (b"PK\3\4", "is damaged"),
    "noise": (b"PK\3\4" + bytes(range(256)) * 9, "is damaged"),
    "legacy cut": (legacy({"a": torch.zeros(1000)})[:-3000], "foreign"),
    "lengths": (b"\x80\2" + struct.pack("<Q", 2**60), "foreign"),
}


@pytest.mark.parametrize("name", FILES)
def test_load_whole__unpickles_nothing(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_whole(tmp_path / "last.ckpt", remedy="Do.", foreign="foreign")
    assert "weights_only" not in str(error.value)
    assert not executed()
    if message != "foreign":
        assert str(error.value).endswith("Do.")


def test_load_whole__every_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "httpruns" / "x.ckpt"
    path.parent.mkdir()
    content: dict[str, Any] = {"a": torch.arange(300.0), "b": [1, 2.5, "x", None]}
    whole = zipped(content)
    noticed = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = load_whole("httpruns/x.ckpt", remedy="Do.", foreign="No.")
        except ValueError:
            noticed += 1
        else:  # it was padding
            assert torch.equal(read["a"], content["a"]) and read["b"] == content["b"]
    assert noticed > len(whole) / 7 / 2
