"""Methods from weights that are there: ours, published, or another library's."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from pytorch_lightning.utilities import rank_zero_only
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

import lightly_mim.methods
from lightly_mim.checkpoints import Weights, encoder_spec, read_weights
from lightly_mim.checkpoints.hub import fetch, is_hub_name
from lightly_mim.checkpoints.layouts import KNOWN
from lightly_mim.checkpoints.shapes import count
from lightly_mim.config import WEIGHT_OPTIONS, check_known, from_config, to_config
from lightly_mim.encoders import MaskedEncoder, fit_encoder, masked_encoder
from lightly_mim.evaluation.loading import build_saved
from lightly_mim.files import expanded

if TYPE_CHECKING:
    from lightly_mim.methods.base import MaskedImageModel

# Arguments of the encoder that its weights can be interpolated for.
_FITTED = ("img_size", "patch_size", "window_size", "in_chans")
_WIDTHS = ("dim", "depth", "heads")  # endings of options
_SLACK = 2**20  # weights that a method may have beyond those in its file
_HEAD = {"class_path": "lightly_mim.heads.LinearHead"}  # of files that do not say it
_MASKING = {"masking", "mask_patch_size", "mask_ratio"}


def find_weights(source: Path | str, num_heads: int | None = None) -> Weights:
    """Reads weights from wherever a user names them.

    Args:
        source:
            A run directory, a file or a folder of weights, see
            `lightly_mim.checkpoints.read_weights`; the name of a timm model that has
            pretrained weights; or OWNER/MODEL on the Hugging Face hub. The last two
            need the network, or what lies in its cache.
        num_heads:
            See `read_weights`.

    Raises:
        ValueError: If there are no such weights, or if they cannot be read.
    """
    path = expanded(source)
    name = str(source)
    if not path.exists():
        if is_hub_name(name):
            path = fetch(name)
        elif ":" in name or timm.is_model(name.split(".")[0]):
            encoder = masked_encoder(name, pretrained=True)
            return Weights(
                "timm",
                encoder_spec(encoder),
                encoder.vit.state_dict(),
                method="MAE" if name.endswith(".mae") else None,
            )
        else:
            raise ValueError(
                f"There are no weights {name!r}. They are {KNOWN}; the name of a timm "
                "model with its weights, such as vit_base_patch16_224.mae; or "
                "OWNER/MODEL on the Hugging Face hub."
            )
    return read_weights(path, num_heads)


def from_pretrained(
    source: Path | str, cls: type[MaskedImageModel] | None = None, **options: Any
) -> MaskedImageModel:
    """Builds a method with weights, see `MaskedImageModel.from_pretrained`.

    Args:
        source:
            See `find_weights`.
        cls:
            The method. None for the one that the weights are of; for an encoder's
            alone MAE, or SimMIM where it cannot leave patches out.
        options:
            Arguments of the method. Those that are left out are the ones that the
            weights were made with, where the file tells them.

    Returns:
        The method. What was changed, left out or begins anew is printed.

    Raises:
        ValueError: If the weights cannot be read, or do not fit what is asked for.
    """
    weights = find_weights(source, options.get("num_heads"))
    encoder = build_saved(weights, source)
    return with_weights(weights, encoder, source, cls, **options)


def with_weights(
    weights: Weights,
    encoder: MaskedEncoder,
    source: Path | str,
    cls: type[MaskedImageModel] | None = None,
    **options: Any,
) -> MaskedImageModel:
    """Builds a method with weights that were read, see `from_pretrained`.

    Args:
        weights:
            The weights.
        encoder:
            The encoder that was built of them.
        source:
            Where they were read, for what is printed.
        cls:
            See `from_pretrained`.
        options:
            See `from_pretrained`.
    """
    method = cls or _method_of(weights, encoder, source)
    wanted = {name: options[name] for name in _FITTED if options.get(name) is not None}
    encoder, said = fit_encoder(encoder, **wanted)
    spec = encoder_spec(encoder)
    positions = getattr(encoder.vit, "pos_embed", None) is not None
    arguments: dict[str, Any] = {
        "img_size": encoder.img_size,
        "in_chans": encoder.in_chans,
        **spec["options"],
        **({"pos_embed": spec["pos_embed"] or "learned"} if positions else {}),
    }
    if _is_of(weights, method):
        arguments |= _stored_options(weights, method, arguments, source)
        if options.keys() & _MASKING:  # one is short for the other
            arguments = {k: v for k, v in arguments.items() if k not in _MASKING}
    # The encoder has these already.
    own = {name: value for name, value in options.items() if name not in _FITTED}
    built = method(spec["name"], **{**arguments, **own})
    _take(built, weights, encoder, source, [said])
    return built


def _stored_options(
    weights: Weights,
    method: type[MaskedImageModel],
    arguments: dict[str, Any],
    source: Path | str,
) -> dict[str, Any]:
    """Returns the options of a method that weights tell, if they are theirs.

    A file's own options must build what is in the file: nothing larger, and nothing
    that is read or fetched from elsewhere.
    """
    told = {k: v for k, v in weights.options.items() if k not in WEIGHT_OPTIONS}
    try:
        check_known(method, told)
        options: dict[str, Any] = from_config(told)
        if weights.parts:
            _check_numbers(weights, told)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that are copied nowhere
                built = method(weights.spec["name"], **{**arguments, **options})
            size, there = (
                sum(tensor.numel() for name, tensor in tensors.items()
                    if not name.startswith("encoder."))
                for tensors in (built.state_dict(), weights.parts)
            )  # fmt: skip
            if size > 2 * there + _SLACK:
                raise ValueError(
                    f"it would have {size:,} weights, and {there:,} are there"
                )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The {method.__name__} in {source} cannot be built as the file says: "
            f"{str(error).rstrip('.')}. If it is of a newer version, update "
            "lightly_mim; otherwise take the encoder alone, by load_encoder or "
            "encoder.safetensors of the run."
        ) from error
    return options


def _check_numbers(weights: Weights, options: Mapping[str, Any]) -> None:
    """Refuses widths and depths that no tensor in the file has."""
    tensors = [*weights.encoder.values(), *weights.parts.values()]
    largest = max([len(tensors), *(side for each in tensors for side in each.shape)])
    for name, value in options.items():
        if name.endswith(_WIDTHS) and isinstance(value, int) and value > largest:
            raise ValueError(f"{name} is {value}, and no weights are as many")


def start_from(method: MaskedImageModel, source: Path | str) -> None:
    """Gives a method weights, interpolated where its encoder differs.

    Args:
        method:
            The method, which is changed. What was changed, left out or begins anew is
            printed.
        source:
            See `find_weights`.

    Raises:
        ValueError: If the weights cannot be read, or are of another encoder.
    """
    target = method.encoder
    heads = getattr(target.vit, "blocks", None)
    num_heads = getattr(heads[0].attn, "num_heads", None) if heads else None
    weights = find_weights(source, num_heads)
    encoder = build_saved(weights, source)
    window = _window(target)
    same = encoder.img_size == target.img_size
    same = same and encoder.patch_size == target.patch_size
    if type(encoder.vit) is type(target.vit):
        encoder, said = fit_encoder(
            encoder,
            img_size=target.img_size,
            patch_size=target.patch_size,
            window_size=None if same and window == _window(encoder) else window,
            in_chans=target.in_chans,
        )
    else:
        said = ""
    _take(method, weights, encoder, source, [said])


def _window(encoder: MaskedEncoder) -> tuple[int, int] | None:
    """Returns the size of a Swin's first windows in patches, None of others."""
    stages = getattr(encoder.vit, "layers", None)
    if not stages:
        return None
    height, width = stages[0].blocks[0].window_size
    return height, width


def _method_of(
    weights: Weights, encoder: MaskedEncoder, source: Path | str
) -> type[MaskedImageModel]:
    name = weights.method_name
    if weights.method is None:
        name = "MAE" if encoder.can_drop_tokens else "SimMIM"
    found = getattr(lightly_mim.methods, name or "", None)
    base = lightly_mim.methods.MaskedImageModel
    if not (inspect.isclass(found) and issubclass(found, base) and found is not base):
        raise ValueError(
            f"The weights in {source} are of {weights.method}, which is not of this "
            "package: pass the method as well, or take encoder.safetensors of the run, "
            "which is the encoder alone."
        )
    method: type[MaskedImageModel] = found
    return method


def _is_of(weights: Weights, method: type[MaskedImageModel]) -> bool:
    """Returns whether the weights' other parts are those of this very method."""
    return weights.method_name == method.__name__


def _take(
    method: MaskedImageModel,
    weights: Weights,
    encoder: MaskedEncoder,
    source: Path | str,
    said: list[str],
) -> None:
    """Copies weights into a method, and prints what there is to say of it."""
    target = method.encoder
    _load_encoder(target, encoder, source)
    for name in ("mean", "std", "value_range", "tables", "norm_eps"):
        setattr(target, name, getattr(encoder, name))
    target.untrained = False
    token = weights.mask_token
    fits = token is not None and target.mask_token is not None
    if fits and token is not None and target.mask_token is not None:
        target.mask_token.data.copy_(token.reshape(target.mask_token.shape))
    taken = ["the encoder", *(["its mask token"] if fits else [])]
    if weights.parts and _is_of(weights, type(method)):
        begin_anew = _load_parts(method, weights, source)
        names = {name.partition(".")[0] for name in weights.parts}
        taken += [f"the {name}" for name in sorted(names - begin_anew.keys())]
        said += [f"The {name} begins anew: {why}." for name, why in begin_anew.items()]
    else:
        said.append(f"What {type(method).__name__} has besides begins anew.")
    said += [
        *weights.notes,
        *([f"Left out: {', '.join(weights.left_out)}."] if weights.left_out else []),
    ]
    rank_zero_only(print)(
        f"{type(method).__name__} from {source} ({weights.layout}): takes "
        f"{', '.join(taken)}. " + " ".join(sentence for sentence in said if sentence),
        flush=True,
    )


def _load_encoder(
    target: MaskedEncoder, encoder: MaskedEncoder, source: Path | str
) -> None:
    state, wanted = encoder.vit.state_dict(), target.vit.state_dict()
    problems = [
        f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", sorted(wanted.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - wanted.keys())),
            (
                "of another shape",
                [
                    f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
                    for name, tensor in wanted.items()
                    if name in state and state[name].shape != tensor.shape
                ],
            ),
        )
        if names
    ]
    if problems:
        options = ", ".join(f"{k}={v!r}" for k, v in encoder.options.items())
        raise ValueError(
            f"The weights in {source} are of another encoder than the method's: "
            f"{'; '.join(problems)}. They are of {encoder.name!r} with {options}."
        )
    target.vit.load_state_dict(state)


def _load_parts(
    method: MaskedImageModel, weights: Weights, source: Path | str
) -> dict[str, str]:
    """Copies the weights of the other parts. Returns those that do not fit, and why.

    Raises:
        ValueError: If weights of a part are missing or unexpected that has the shape
            and the depth of the method's.
    """
    state = {
        name: tensor
        for name, tensor in method.state_dict().items()
        if not name.startswith("encoder.")
    }
    parts = _resampled(method, weights)
    anew: dict[str, str] = {}
    for top in dict.fromkeys(name.partition(".")[0] for name in [*state, *parts]):
        here = {n: t for n, t in state.items() if n.partition(".")[0] == top}
        there = {n: t for n, t in parts.items() if n.partition(".")[0] == top}
        other = [
            f"{name} has shape {tuple(there[name].shape)}, and {tuple(tensor.shape)} "
            "is asked for"
            for name, tensor in here.items()
            if name in there and there[name].shape != tensor.shape
        ]
        odd = sorted(here.keys() ^ there.keys())
        depths = [count(tensors, f"{top}.blocks.") for tensors in (here, there)]
        if depths[0] != depths[1]:
            other.append(f"{depths[1]} blocks, and {depths[0]} are asked for")
        if odd and not other and here and there:
            asked = method.init_args.get(top)
            if asked is not None and to_config(asked) != weights.options.get(
                top, _HEAD
            ):
                anew[top] = f"the weights are of another one, and {asked} is asked for"
                continue
            raise ValueError(
                f"The weights of the {top} in {source} are not those of a "
                f"{type(method).__name__}: missing or unexpected are {', '.join(odd)}."
            )
        if odd or other:
            anew[top] = (other or ["the weights are of a method without one"])[0]
            continue
        with torch.no_grad():
            for name, tensor in there.items():
                here[name].copy_(tensor)
    return anew


def _resampled(method: MaskedImageModel, weights: Weights) -> Mapping[str, Tensor]:
    """Returns the parts with the positions of a decoder for the method's grid."""
    name = "decoder.pos_embed"
    decoder: Any = getattr(method, "decoder", None)
    positions = weights.parts.get(name)
    if positions is None or not isinstance(decoder, nn.Module):
        return weights.parts
    height, width = weights.spec["img_size"]
    kernel = weights.encoder["patch_embed.proj.weight"].shape[2:]
    old = [height // kernel[0], width // kernel[1]]
    new = list(method.encoder.grid)
    prefix = positions.shape[1] - math.prod(old)
    if old == new or prefix < 0:
        return weights.parts
    resampled = resample_abs_pos_embed(positions, new, old, prefix)
    return {**weights.parts, name: resampled}
