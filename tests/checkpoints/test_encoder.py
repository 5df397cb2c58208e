from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightly_mim.checkpoints import put_encoder, read_encoder, save_encoder
from lightly_mim.encoders import MaskedEncoder, masked_encoder

OPTIONS: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 1}


def small_encoder() -> MaskedEncoder:
    return masked_encoder(
        "vit_tiny_patch16_224", img_size=(32, 48), in_chans=1, **OPTIONS
    )


def test_read_encoder__round_trip(tmp_path: Path) -> None:
    encoder = small_encoder()
    encoder.add_mask_token()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    weights, spec = read_encoder(tmp_path / "encoder.safetensors")
    assert weights.keys() == encoder.vit.state_dict().keys()
    for name, value in encoder.vit.state_dict().items():
        assert torch.equal(weights[name], value)
    assert spec["name"] == "vit_tiny_patch16_224"
    assert spec["img_size"] == [32, 48]
    assert spec["in_chans"] == 1
    assert spec["options"] == OPTIONS
    assert spec["pos_embed"] is None
    assert spec["mean"] == pytest.approx(encoder.mean)
    assert spec["std"] == pytest.approx(encoder.std)
    assert spec["version"]


def test_save_encoder__timm_reads_it(tmp_path: Path) -> None:
    encoder = small_encoder().eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), in_chans=1, **OPTIONS
    ).eval()
    model.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    images = torch.randn(2, 1, 32, 48)
    torch.testing.assert_close(model.forward_features(images), encoder.encode(images))


def test_save_encoder__shared_parameters(tmp_path: Path) -> None:
    encoder = small_encoder()
    encoder.vit.blocks[1].mlp.fc1.weight = encoder.vit.blocks[0].mlp.fc1.weight
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    weights, _ = read_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(
        weights["blocks.0.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"]
    )


def test_save_encoder__module_passed_by_hand(tmp_path: Path) -> None:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    save_encoder(masked_encoder(model), tmp_path / "encoder.safetensors")
    assert read_encoder(tmp_path / "encoder.safetensors").spec["name"] is None


def test_save_encoder__full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match=r"encoder\.safetensors"):
            save_encoder(small_encoder(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_read_encoder__run_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"has no checkpoint yet.*Resume the run"):
        read_encoder(tmp_path)
    (tmp_path / "finished.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has finished, so the file was moved"):
        read_encoder(tmp_path)
    save_encoder(small_encoder(), tmp_path / "encoder.safetensors")
    assert read_encoder(tmp_path).spec["name"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_read_encoder__truncated(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small_encoder(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"encoder\.safetensors is damaged"):
        read_encoder(path)


def checkpoint_of(encoder: MaskedEncoder, path: Path) -> Path:
    state = encoder.state_dict(prefix="method.encoder.")
    content: dict[str, Any] = {"state_dict": state | {"method.head": torch.zeros(2)}}
    place = {"epoch": 2, "epochs": None, "step": 7, "steps": 9}
    put_encoder(encoder, content, place)
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def test_read_encoder__checkpoint(tmp_path: Path) -> None:
    encoder = small_encoder()
    encoder.add_mask_token()
    path = checkpoint_of(encoder, tmp_path / "checkpoints" / "last.ckpt")
    for place in (path, tmp_path):
        weights, spec = read_encoder(place)
        assert weights.keys() == encoder.vit.state_dict().keys()
        for name, value in encoder.vit.state_dict().items():
            assert torch.equal(weights[name], value)
        assert spec["unfinished"] == {
            "epoch": 2,
            "epochs": None,
            "step": 7,
            "steps": 9,
        }
        assert spec["options"] == OPTIONS
    # The encoder that is written at the end comes first.
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    assert "unfinished" not in read_encoder(tmp_path).spec


@pytest.mark.parametrize("kept", [5, 500, -1000])
def test_read_encoder__damaged_checkpoint(tmp_path: Path, kept: int) -> None:
    path = checkpoint_of(small_encoder(), tmp_path / "last.ckpt")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        read_encoder(path)


class Thing:
    """What only unpickling could bring back."""


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(3)},
        {"state_dict": {"method.encoder.vit.norm.weight": torch.zeros(3)}},
        [1, 2],
        Thing(),
        {"encoder": Thing(), "state_dict": {}},
        {"encoder": 3, "state_dict": {}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_encoder__pytorch_file_of_others(
    tmp_path: Path, content: Any, zipped: bool
) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth is a PyTorch file") as error:
        read_encoder(path)
    assert "Copy it again" not in str(error.value)
    assert "weights_only=False" not in str(error.value)


def test_read_encoder__other_files(tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lightly_mim did not write it"):
        read_encoder(foreign)
    with pytest.raises(ValueError, match=r"missing does not exist"):
        read_encoder(tmp_path / "missing")


def test_save_encoder__metadata_is_json(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small_encoder(), path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(json.loads(header["__metadata__"]["lightly_mim"])) == {
        "name",
        "img_size",
        "in_chans",
        "options",
        "pos_embed",
        "init",
        "mean",
        "std",
        "pool",
        "norm_eps",
        "sha256",
        "version",
    }


def test_save_encoder__same_weights_same_bytes(tmp_path: Path) -> None:
    encoder = small_encoder()
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_encoder(encoder, file)
    assert len({file.read_bytes() for file in files}) == 1
