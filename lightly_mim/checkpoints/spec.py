"""What a file may say of the encoder that it holds, checked before one is built."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import timm
from torch import Tensor

from lightly_mim.config import WEIGHT_OPTIONS
from lightly_mim.encoders.initialization import Init, PosEmbed
from lightly_mim.encoders.pooling import Pool
from lightly_mim.encoders.tables import Tables

_MAX_PIXELS = 16_384  # of a side
_MAX_CHANS = 4096
_MAX_WHOLE = 65_536
_MAX_OPTIONS = 1000
# Arguments of `masked_encoder` that are no options of the model.
_OWN = {"encoder", "img_size", "in_chans", "pretrained", "pos_embed", "init"}


def read_spec(text: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what an encoder is built from, see `EncoderCheckpoint`.

    Args:
        text:
            The JSON of `encoder_spec`, of this version or an earlier one.
        weights:
            The weights beside it. Nothing is larger than they are, so that what is
            built of it is not, either.

    Raises:
        ValueError: If it is something else, names a model that is not timm's own, or
            says where weights come from.
    """
    try:
        spec: dict[str, Any] = json.loads(text)
        list(_leaves(spec))  # no deeper than one can look
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what it says of its encoder is no JSON: {error}") from error
    _check(isinstance(spec, dict), "what it says of its encoder", spec, "a mapping")
    name: Any = spec.get("name")
    options: Any = spec.get("options")
    _check(
        "name" in spec and (name is None or _is_timm(name)),
        "name",
        name,
        "one of timm's own models",
    )
    size: Any = spec.get("img_size")
    chans: Any = spec.get("in_chans")
    _check(
        _is_list(size, 2) and all(_is_whole(side, 1, _MAX_PIXELS) for side in size),
        "img_size",
        size,
        f"two whole numbers of 1 to {_MAX_PIXELS:,}",
    )
    _check(_is_whole(chans, 1, _MAX_CHANS), "in_chans", chans, "a number of channels")
    for key, above in (("mean", -math.inf), ("std", 0.0)):
        values: Any = spec.get(key)
        _check(
            _is_list(values, chans)
            and all(_is_number(value) and value > above for value in values),
            key,
            values,
            f"{chans} finite number(s)" + (" above 0" if key == "std" else ""),
        )
    for key, allowed in {
        "pos_embed": (None, *get_args(PosEmbed)),
        "init": get_args(Init),
        "pool": get_args(Pool),
        "tables": get_args(Tables),
    }.items():
        value: Any = spec.get(key, allowed[0])
        _check(value in allowed, key, value, f"one of {allowed}")
    eps: Any = spec.get("norm_eps", 0)
    _check(_is_number(eps) and 0 <= eps < 1, "norm_eps", eps, "a number from 0 to 1")
    place: Any = spec.get("unfinished")
    _check(
        place is None or _is_place(place),
        "unfinished",
        place,
        f"whole numbers {', '.join(_PLACE)}",
    )
    levels: Any = spec.get("value_range", [0, 1])
    _check(
        _is_list(levels, 2)
        and all(_is_whole(level, 0, 65_535) for level in levels)
        and levels[0] < levels[1],
        "value_range",
        levels,
        "two whole numbers of 0 to 65,535, the lower one first",
    )
    _check(isinstance(options, dict), "options", options, "a mapping")
    refused = sorted((_OWN | WEIGHT_OPTIONS | {"num_classes"}) & options.keys())
    _check(not refused, "options", refused, "without them")
    leaves = list(_leaves(options))
    _check(
        len(leaves) <= _MAX_OPTIONS and all(map(_is_option, leaves)),
        "options",
        options,
        f"text, truth values and numbers of up to {_MAX_WHOLE:,}",
    )
    depths = (_leaves_of(options.get(key)) for key in ("depth", "depths"))
    blocks = sum(map(sum, depths))
    _check(
        blocks <= len(weights),
        "options",
        options,
        f"no deeper than its {len(weights)} tensors",
    )
    return spec


_PLACE = ("epoch", "epochs", "step", "steps")


def _check(fits: bool, key: str, value: Any, allowed: str) -> None:
    if not fits:
        shown = f"{value!r}"[:200]
        raise ValueError(f"{key} is {allowed}, got {shown}")


def _is_place(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {*_PLACE}:
        return False
    return all(each is None or _is_whole(each, 0, 2**63) for each in value.values())


def _is_timm(name: Any) -> bool:
    plain = isinstance(name, str) and re.fullmatch(r"[\w.]+", name) is not None
    return plain and timm.is_model(name.split(".")[0])


def _is_list(value: Any, length: Any) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    # Whole numbers that no float holds are not smaller than infinity, either.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_option(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 100
    if value is None or isinstance(value, bool):
        return True
    return _is_number(value) and abs(value) <= _MAX_WHOLE


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for each in (*value, *value.values()):
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _leaves_of(value: Any) -> list[int]:
    """Returns the whole numbers of an option."""
    return [each for each in _leaves(value) if type(each) is int]
