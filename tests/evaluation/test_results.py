from __future__ import annotations

import json
import math
from typing import NamedTuple

from lightly_mim.evaluation.base import merit
from lightly_mim.evaluation.results import to_text


def refuse(word: str) -> None:
    raise ValueError(word)


def test_to_text__is_json_without_nan() -> None:
    record = {"rows": [{"loss": math.nan, "top1": 0.5}], "most": [math.inf, 1, "NaN"]}
    read = json.loads(to_text(record), parse_constant=refuse)
    assert len(read.pop("sha256")) == 64
    assert read == {"rows": [{"loss": None, "top1": 0.5}], "most": [None, 1, "NaN"]}
    assert math.isnan(record["rows"][0]["loss"])  # type: ignore[index]


def test_merit__of_a_probe_that_diverged() -> None:
    class Choice(NamedTuple):
        accuracy: float
        loss: float

    diverged, fine, better = Choice(0.5, math.nan), Choice(0.5, 9.0), Choice(0.5, 1.0)
    assert max([diverged, fine, better], key=merit) == better
    assert max([better, diverged], key=merit) == better
