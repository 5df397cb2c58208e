"""timm's own layout: a state dict, or a folder whose config.json names the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightly_mim.checkpoints.mae import LICENCE
from lightly_mim.checkpoints.reading import Content
from lightly_mim.checkpoints.shapes import encoder_of, is_encoder
from lightly_mim.checkpoints.weights import Weights
from lightly_mim.encoders.statistics import imagenet_statistics

_CLASSIFIER = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a file or folder in this layout, None for another.

    MAE's official files of the encoder alone are in this layout, too: they are known by
    their positions, sines and cosines.

    Args:
        content:
            What is in it.
        num_heads:
            See `lightly_mim.checkpoints.shapes.encoder_of`.
    """
    config = content.config or {}
    name = config.get("architecture")
    if not is_encoder(content.tensors) and not isinstance(name, str):
        return None
    left_out = tuple(n for n in _CLASSIFIER if n in content.tensors)
    encoder = {n: t for n, t in content.tensors.items() if n not in left_out}
    if isinstance(name, str):
        return Weights("timm", _spec(name, config, encoder), encoder, left_out=left_out)
    spec = encoder_of(encoder, num_heads)
    if spec["pos_embed"] == "sincos" and not left_out:
        layout = "official MAE, the encoder alone"
        return Weights(layout, spec, encoder, method="MAE", licence=LICENCE)
    return Weights("timm", spec, encoder, left_out=left_out)


def _spec(
    name: str, config: Mapping[str, Any], encoder: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model."""
    pretrained = config.get("pretrained_cfg") or {}
    options = dict(config.get("model_args") or {})
    in_chans, *size = pretrained.get("input_size") or (3, 224, 224)
    size = options.pop("img_size", None) or size
    in_chans = options.pop("in_chans", in_chans)
    options.pop("num_classes", None)
    mean, std = imagenet_statistics(in_chans)
    token = "cls" if "cls_token" in encoder else "mean"
    # What config.json says beside model_args builds nothing.
    said = options.get("global_pool", config.get("global_pool"))
    return {
        "name": name,
        "img_size": [size, size] if isinstance(size, int) else list(size),
        "in_chans": in_chans,
        "options": options,
        "pos_embed": None,
        "init": "timm",
        "mean": list(pretrained.get("mean") or mean),
        "std": list(pretrained.get("std") or std),
        "pool": {"avg": "mean", "token": "cls"}.get(str(said), token),
    }


def write(
    spec: dict[str, Any], encoder: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config.json and the weights of a folder that timm builds from.

    Args:
        spec:
            What the encoder is built from, see `EncoderCheckpoint`.
        encoder:
            Its weights, under timm's names.
    """
    size = list(spec["img_size"])
    config = {
        "architecture": spec["name"],
        "num_classes": 0,
        "global_pool": {"mean": "avg", "cls": "token"}.get(spec["pool"], ""),
        "model_args": {"img_size": size, **spec["options"]},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [spec["in_chans"], *size],
            "fixed_input_size": True,
            "mean": list(spec["mean"]),
            "std": list(spec["std"]),
            "custom_load": False,
        },
    }
    return config, encoder
