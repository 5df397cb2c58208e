"""Writes the layouts of Hugging Face transformers, see `huggingface`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightly_mim.checkpoints.huggingface import AROUND, ATTENTION, BLOCK, DECODER
from lightly_mim.checkpoints.shapes import count
from lightly_mim.checkpoints.weights import pixels

# timm's families, and Hugging Face's model type, its prefix and its class.
_FAMILIES = {
    "VisionTransformer": ("vit", "ViT"),
    "Beit": ("beit", "Beit"),
    "SwinTransformer": ("swin", "Swin"),
    "SwinTransformerV2": ("swinv2", "Swinv2"),
}
_BLOCK_KEYS = {
    *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
    *(f"attn.proj.{kind}" for kind in ("weight", "bias")),
    *(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")),
    "attn.qkv.weight",
}
_BIASES = {"attn.q_bias", "attn.v_bias"}
_OF_BLOCKS = {
    "vit": {"attn.qkv.bias"},
    "beit": {*_BIASES, "gamma_1", "gamma_2", "attn.relative_position_bias_table"},
    "swin": {"attn.qkv.bias", "attn.relative_position_bias_table"},
    "swinv2": {
        *_BIASES,
        *("attn.logit_scale", "attn.cpb_mlp.0.weight", "attn.cpb_mlp.0.bias"),
        "attn.cpb_mlp.2.weight",
    },
}
_PATCHES = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
_NORM = {"norm.weight", "norm.bias"}
_OF_STAGES = {
    *("downsample.norm.weight", "downsample.norm.bias", "downsample.reduction.weight")
}
_AROUND_BLOCKS = {
    "vit": {*_PATCHES, *_NORM, "cls_token", "pos_embed"},
    "beit": {
        *(*_PATCHES, *_NORM, "cls_token", "pos_embed", "fc_norm.weight"),
        *("fc_norm.bias", "rel_pos_bias.relative_position_bias_table"),
    },
    "swin": {*_PATCHES, *_NORM, "patch_embed.norm.weight", "patch_embed.norm.bias"},
}
_AROUND_BLOCKS["swinv2"] = _AROUND_BLOCKS["swin"]
# What a class cannot do without.
_NEEDED = {
    "vit": {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"},
    "beit": {"cls_token", "blocks.0.attn.q_bias"},
    "swin": {"layers.0.blocks.0.attn.qkv.bias", "norm.weight"},
    "swinv2": {"layers.0.blocks.0.attn.q_bias", "norm.weight"},
}


def write(
    family: str,
    spec: Mapping[str, Any],
    encoder: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    mask_token: Tensor | None = None,
    method: str | None = None,
    parts: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Returns config.json, weights and preprocessor_config.json of an encoder.

    Args:
        family:
            Name of the class of the timm model.
        spec:
            What the encoder is built from, see `EncoderCheckpoint`.
        encoder:
            Its weights, under timm's names.
        facts:
            What the weights do not tell: `patch_size`, `stride`, and `num_heads` and
            `windows` per stage, `units` of a SwinV2's coordinates; of MAE
            `decoder_num_heads`, `mask_ratio` and `norm_pix_loss`.
        mask_token:
            The encoder's mask token.
        method:
            "MAE" with a decoder in the parts, "SimMIM" with a linear head of pixels,
            None for the encoder alone.
        parts:
            The weights of the method's other parts, under its names.

    Raises:
        ValueError: If transformers has no class that computes what the encoder does.
    """
    kind, class_name = _kind(family, encoder, facts)
    config = _config(kind, spec, encoder, facts)
    tensors: dict[str, Tensor] = {}
    for name, tensor in encoder.items():
        tensors |= _split(_their_name(name, kind), tensor)
    if mask_token is not None:
        tensors["embeddings.mask_token"] = mask_token
    if method is None:
        config["architectures"] = [f"{class_name}Model"]
        if mask_token is not None:
            config["use_mask_token"] = True
    elif method == "SimMIM":
        config["architectures"] = [f"{class_name}ForMaskedImageModeling"]
        config["encoder_stride"] = facts["stride"][0]
        tensors = {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
        head = {n.removeprefix("head."): t for n, t in (parts or {}).items()}
        moved = pixels(head, facts["stride"], forward=False)
        tensors |= {f"decoder.0.{name}": tensor for name, tensor in moved.items()}
    else:
        tensors = {f"vit.{name}": tensor for name, tensor in tensors.items()}
        config |= _decoder_config(parts or {}, facts)
        for name, tensor in (parts or {}).items():
            tensors |= _split(_their_decoder_name(name), tensor)
    return config, tensors, _preprocessor(spec)


def _kind(
    family: str, encoder: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> tuple[str, str]:
    """Returns Hugging Face's model type and the beginning of its class' name."""
    if family not in _FAMILIES:
        raise ValueError(
            f"Hugging Face has no counterpart of timm's {family} that is known here: "
            f"of {', '.join(_FAMILIES)} it has. Convert it to timm."
        )
    kind, class_name = _FAMILIES[family]
    foreign = sorted(name for name in encoder if not _has_place(name, kind))
    missing = sorted(_NEEDED[kind] - encoder.keys())
    if foreign or missing:
        what = [f"no place for {name}" for name in foreign[:5]]
        what += [f"no {class_name} without {name}" for name in missing]
        raise ValueError(
            f"Hugging Face's {class_name} does not compute what this {family} does: "
            f"it has {'; '.join(what)}. Convert it to timm."
        )
    windows = facts.get("windows") or [(1, 1)]
    shrunk = kind == "swinv2" and windows[-1] == facts["last_grid"]
    rest = windows[:-1] if shrunk else windows
    if len({side for window in (rest or windows) for side in window}) > 1:
        raise ValueError(
            f"Hugging Face's {class_name} has one square window for all stages, these "
            f"are {windows}. Convert it to timm."
        )
    return kind, class_name


def _has_place(name: str, kind: str) -> bool:
    inner = re.sub(r"^(layers\.\d+\.)?blocks\.\d+\.", "", name)
    if inner != name:
        return inner in _BLOCK_KEYS | _OF_BLOCKS[kind]
    stage = re.sub(r"^layers\.\d+\.", "", name)
    return stage in _OF_STAGES if stage != name else name in _AROUND_BLOCKS[kind]


def _config(
    kind: str,
    spec: Mapping[str, Any],
    encoder: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    height, width = spec["img_size"]
    p, q = facts["patch_size"]
    dim = len(encoder["patch_embed.proj.weight"])
    config: dict[str, Any] = {
        "model_type": kind,
        "image_size": height if height == width else [height, width],
        "patch_size": p if p == q else [p, q],
        "num_channels": spec["in_chans"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": spec["norm_eps"],
    }
    if kind.startswith("swin"):
        hidden = len(encoder["layers.0.blocks.0.mlp.fc1.weight"])
        stages = count(encoder, "layers.")
        return config | {
            "embed_dim": dim,
            "depths": [count(encoder, f"layers.{s}.blocks.") for s in range(stages)],
            "num_heads": facts["num_heads"],
            "window_size": facts["windows"][0][0],
            "mlp_ratio": hidden / dim,
            "qkv_bias": True,
            "use_absolute_embeddings": False,
            "hidden_size": dim * 2 ** (stages - 1),
            **({"pretrained_window_sizes": facts["units"]} if "units" in facts else {}),
        }
    config |= {
        "hidden_size": dim,
        "num_hidden_layers": count(encoder, "blocks."),
        "num_attention_heads": facts["num_heads"][0],
        "intermediate_size": len(encoder["blocks.0.mlp.fc1.weight"]),
    }
    if kind == "vit":
        return config | {"qkv_bias": True}
    table = "relative_position_bias_table"
    return config | {
        "use_absolute_position_embeddings": "pos_embed" in encoder,
        "use_relative_position_bias": f"blocks.0.attn.{table}" in encoder,
        "use_shared_relative_position_bias": f"rel_pos_bias.{table}" in encoder,
        "use_mean_pooling": "fc_norm.weight" in encoder,
        # The weights' own values take its place.
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in encoder else 0,
    }


def _decoder_config(
    parts: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": len(parts["decoder_embed.weight"]),
        "decoder_num_hidden_layers": count(parts, "decoder.blocks."),
        "decoder_num_attention_heads": facts["decoder_num_heads"],
        "decoder_intermediate_size": len(parts["decoder.blocks.0.mlp.fc1.weight"]),
        "mask_ratio": facts["mask_ratio"],
        "norm_pix_loss": facts["norm_pix_loss"],
    }


def _preprocessor(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of Hugging Face's image processor."""
    height, width = spec["img_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec["mean"]),
        "image_std": list(spec["std"]),
    }


def _their_name(name: str, kind: str) -> str:
    merging = re.match(r"layers\.(\d+)\.(downsample\..*)", name)
    if merging:
        return f"encoder.layers.{int(merging[1]) - 1}.{merging[2]}"
    block = re.match(r"((?:layers\.\d+\.)?blocks\.\d+\.)(.*)", name)
    if block is None:
        return _renamed(name, AROUND)
    place = block[1] if block[1].startswith("layers") else f"layer.{block[1][7:]}"
    inner = _renamed(block[2], BLOCK)
    if inner.startswith("attn."):
        inner = inner.replace("cpb_mlp.", "continuous_position_bias_mlp.")
        if kind == "beit":
            inner = inner.replace("relative", "relative_position_bias.relative", 1)
        inner = ATTENTION[kind] + inner.removeprefix("attn.")
    return f"encoder.{place}{inner}"


def _their_decoder_name(name: str) -> str:
    block = re.match(r"decoder\.blocks\.(\d+\.)(.*)", name)
    if block is None:
        return _renamed(name, DECODER)
    inner = _renamed(block[2], BLOCK)
    inner = re.sub(r"^attn\.", ATTENTION["vit"], inner)
    return f"decoder.decoder_layers.{block[1]}{inner}"


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns a layer of queries, keys and values as three."""
    if match := re.fullmatch(r"(.*\.)qkv\.(\w+)", name):
        thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{match[1]}{third}.{match[2]}": part for third, part in thirds}
    if match := re.fullmatch(r"(.*\.)([qv])_bias", name):
        third = {"q": "query", "v": "value"}[match[2]]
        return {f"{match[1]}{third}.bias": tensor}
    return {name: tensor}


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
