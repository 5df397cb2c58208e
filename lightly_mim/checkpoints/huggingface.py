"""The layouts of Hugging Face transformers, as they lie on disk: config.json and names.

Queries, keys and values are layers of their own there. ViTMAE has MAE's decoder, the
classes for masked image modelling a 1 x 1 convolution in front of a pixel shuffle. ViT,
BEiT, Data2VecVision and Swin of both versions are read with and without it; what else
stands behind an encoder (a classifier, a pooler, a head of visual words) is left out.

The encoder's norms add `layer_norm_eps` of config.json to the variance, mostly 1e-12:
with timm's 1e-6 a class token of 0.02 would be another one. Those of MAE's decoder keep
1e-6, beside positions whose variance is 0.5: that changes 2e-6 of what is predicted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightly_mim.checkpoints.mae import decoder_options
from lightly_mim.checkpoints.reading import Content
from lightly_mim.checkpoints.shapes import encoder_of
from lightly_mim.checkpoints.weights import Weights, pixels

# (Hugging Face's, ours), parts of names. The first that fits is taken.
BLOCK = (
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("lambda_1", "gamma_1"),
    ("lambda_2", "gamma_2"),
)
AROUND = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("encoder.relative_position_bias.", "rel_pos_bias."),
    ("pooler.layernorm.", "fc_norm."),
    ("layernorm.", "norm."),
)
DECODER = (
    ("decoder.decoder_embed.", "decoder_embed."),
    ("decoder.decoder_pos_embed", "decoder.pos_embed"),
    ("decoder.decoder_norm.", "decoder.norm."),
    ("decoder.decoder_pred.", "head."),
    ("decoder.mask_token", "decoder.mask_token"),
)
ATTENTION = {
    "vit": "attention.attention.",
    "vit_mae": "attention.attention.",
    "beit": "attention.attention.",
    "data2vec-vision": "attention.attention.",
    "swin": "attention.self.",
    "swinv2": "attention.self.",
}
_PREFIXES = ("vit.", "beit.", "data2vec_vision.", "swin.", "swinv2.")
_TOKEN = "embeddings.mask_token"
_HEAD = "decoder.0."
# Not of the encoder, or computed again from sizes.
_LEFT_OUT = r"classifier\.|pooler\.dense\.|lm_head\.|.*relative_position_index$"
_SWIN_ATTENTION = (
    ("continuous_position_bias_mlp.", "cpb_mlp."),
    ("relative_position_bias.relative_position", "relative_position"),
)


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a folder in this layout, None for one in another.

    Args:
        content:
            What is in the folder.
        num_heads:
            Not used: config.json tells it.

    Raises:
        ValueError: If it is a file without its config.json, or a model that timm's
            transformers cannot compute.
    """
    projection = "embeddings.patch_embeddings.projection.weight"
    if all(_without_prefix(name) != projection for name in content.tensors):
        return None
    config = content.config
    if config is None:
        raise ValueError(
            f"{content.path} has the names of Hugging Face transformers, and the "
            "number of attention heads is in config.json: pass the folder that holds "
            "both."
        )
    kind = str(config.get("model_type"))
    if kind not in ATTENTION:
        raise ValueError(
            f"{content.path} is a model of type {kind!r}; of Hugging Face's layouts "
            f"{', '.join(ATTENTION)} are known."
        )
    _check(content, config)
    encoder: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    left_out = []
    token = None
    for name, tensor in _merged(content.tensors).items():
        inner = _without_prefix(name)
        # A head of visual words may have a norm behind the encoder's own.
        if re.match(_LEFT_OUT, inner) or f"beit.{name}" in content.tensors:
            left_out.append(name)
        elif inner == _TOKEN:
            token = tensor
        elif name.startswith(_HEAD):
            head[name.removeprefix(_HEAD)] = tensor
        elif name.startswith("decoder."):
            parts[_decoder_name(name)] = tensor
        else:
            encoder[_our_name(inner)] = tensor
    notes: tuple[str, ...] = ()
    if not {"norm.weight", "fc_norm.weight"} & encoder.keys():
        # Saved without the pooler, which has the norm where the mean is normalised.
        dim = len(encoder["patch_embed.proj.weight"])
        encoder["fc_norm.weight"] = torch.ones(dim)
        encoder["fc_norm.bias"] = torch.zeros(dim)
        notes = ("The weights have no last norm: the mean is normalised as it is.",)
    options: dict[str, Any] = {}
    method = None
    if parts:
        method = "MAE"
        options = decoder_options(parts, int(config["decoder_num_attention_heads"]))
        target = "PatchNormalizedPixels" if config.get("norm_pix_loss") else "Pixels"
        options["target"] = {"class_path": f"lightly_mim.targets.{target}"}
        if "mask_ratio" in config:
            options["mask_ratio"] = config["mask_ratio"]
    elif head:
        method = "SimMIM"
        stride = int(config["encoder_stride"])
        moved = pixels(head, (stride, stride))
        parts = {f"head.{name}": tensor for name, tensor in moved.items()}
        options["target"] = {"class_path": "lightly_mim.targets.Pixels"}
    spec = _spec(kind, config, content.preprocessor, encoder)
    if method == "SimMIM":
        spec["pool"] = "mean"
    return Weights(
        f"Hugging Face {kind}",
        spec,
        encoder,
        token,
        method,
        options,
        parts,
        tuple(left_out),
        "that of its card on the hub",
        notes,
    )


def _check(content: Content, config: Mapping[str, Any]) -> None:
    """Raises a ValueError for what timm's models compute in another way."""
    wanted = {
        "hidden_act": ("gelu", None),
        "use_absolute_embeddings": (False, None),
        "use_post_layernorm": (False, None),
    }
    for name, values in wanted.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{content.path} has {name}={config[name]!r}, and timm's model of this "
                f"family has {name}={values[0]!r}."
            )


def _spec(
    kind: str,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    encoder: Mapping[str, Tensor],
) -> dict[str, Any]:
    size = config.get("image_size", 224)
    hints: dict[str, Any] = {
        "img_size": size if isinstance(size, int) else (size[0], size[1]),
        "mean": preprocessor.get("image_mean"),
        "std": preprocessor.get("image_std"),
    }
    if kind.startswith("swin"):
        hints["window_size"] = config.get("window_size", 7)
        pretrained = config.get("pretrained_window_sizes") or [0]
        if any(pretrained):
            hints["pretrained_window_sizes"] = list(pretrained)
    else:
        hints["num_heads"] = config["num_attention_heads"]
    if kind == "vit_mae":
        hints["pos_embed"] = "sincos"
    # What is not said is what transformers' own configuration says.
    own = 1e-5 if kind.startswith("swin") else 1e-12
    eps = config.get("layer_norm_eps", own)
    return {**encoder_of(encoder, **hints), "norm_eps": eps}


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with queries, keys and values in one layer, as timm has them.

    BEiT and SwinV2 have no bias for the keys, there as here.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(
            r"(.*\.(?:attention|self)\.)(query|key|value)\.(\w+)", name
        )
        if match is None:
            merged[name] = tensor
            continue
        before, which, kind = match.groups()
        thirds = [f"{before}{third}.{kind}" for third in ("query", "key", "value")]
        if all(third in tensors for third in thirds):
            merged[f"{before}qkv.{kind}"] = torch.cat([tensors[t] for t in thirds])
        elif kind == "bias" and which != "key":
            merged[f"{before}{which[0]}_bias"] = tensor
        else:
            raise ValueError(f"{name} is there without the others of {thirds}.")
    return merged


def _our_name(name: str) -> str:
    """Returns timm's name of an encoder's parameter."""
    name = re.sub(r"^encoder\.layers\.(\d+)\.blocks\.", r"layers.\1.blocks.", name)
    name = re.sub(r"^encoder\.layer\.(\d+)\.", r"blocks.\1.", name)
    merging = re.match(r"encoder\.layers\.(\d+)\.(downsample\..*)", name)
    if merging:  # timm merges patches before a stage
        return f"layers.{int(merging[1]) + 1}.{merging[2]}"
    block = re.match(r"((?:layers\.\d+\.)?blocks\.\d+\.)(.*)", name)
    if block is None:
        return _renamed(name, AROUND)
    inner = re.sub(r"^attention\.(attention|self)\.", "attn.", block[2])
    if inner.startswith("attn."):
        for theirs, ours in _SWIN_ATTENTION:
            inner = inner.replace(theirs, ours)
        return block[1] + inner
    return block[1] + _renamed(inner, BLOCK)


def _decoder_name(name: str) -> str:
    name = re.sub(r"^decoder\.decoder_(encoder\.layer|layers)\.", "blocks.", name)
    block = re.match(r"(blocks\.\d+\.)(.*)", name)
    if block is None:
        return _renamed(name, DECODER)
    inner = re.sub(r"^attention\.attention\.", "attn.", block[2])
    return "decoder." + block[1] + _renamed(inner, BLOCK)


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in names:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
