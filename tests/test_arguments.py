from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import lightly_mim
from lightly_mim import arguments, data, evaluation
from lightly_mim.arguments import (
    AtLeastTwo,
    Device,
    InnerShare,
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Rate,
    Share,
    Workers,
    check_arguments,
    checked,
    fits,
)
from lightly_mim.config import Recorded
from lightly_mim.data.sources import Data
from lightly_mim.encoders import Encoder
from lightly_mim.evaluation import evaluate_dense
from lightly_mim.evaluation.loading import load_encoder
from lightly_mim.masking import Masking
from lightly_mim.patches import Size

NAN, INF = float("nan"), float("inf")
NUMBERS = [-1, 0, 1, 2, 0.5, -0.5, 1.5, NAN, INF, True, "1", b"1", None, [], [1], {}]


class Named(Protocol):
    name: str

    def check(self) -> None: ...


class Has:
    name = "x"

    def check(self) -> None: ...


@pytest.mark.parametrize(
    ("hint", "allowed"),
    [
        (int, [-1, 0, 1, 2]),
        (float, [-1, 0, 1, 2, 0.5, -0.5, 1.5]),
        (bool, [True]),
        (str, ["1"]),
        (None, [None]),
        (PositiveInt, [1, 2]),
        (NonNegativeInt, [0, 1, 2]),
        (AtLeastTwo, [2]),
        (PositiveFloat, [1, 2, 0.5, 1.5]),
        (NonNegativeFloat, [0, 1, 2, 0.5, 1.5]),
        (Share, [1, 0.5]),
        (InnerShare, [0.5]),
        (Rate, [0, 0.5]),
        (Probability, [0, 1, 0.5]),
        (PositiveInt | None, [1, 2, None]),
        (Literal[1, "a"], [1]),
        (list[int], [[], [1]]),
        (Sequence[PositiveInt], [[], [1]]),
        (NonEmpty[PositiveInt], [[1]]),
        (NonEmpty[Share], [[1]]),
        (Iterable[str], [[], {}]),
        (tuple[int, ...], [[], [1]]),
        (tuple[int], [[1]]),
        (Mapping[str, int], [{}]),
        (dict[str, int] | bool, [True, {}]),
        (Size, [1, 2]),
        (Data, ["1", [], [1]]),
        (Any, NUMBERS),
    ],
)
def test_fits(hint: Any, allowed: list[object]) -> None:
    found = [value for value in NUMBERS if fits(value, hint)]
    assert list(map(repr, found)) == list(map(repr, allowed))


@pytest.mark.parametrize(
    ("value", "hint", "allowed"),
    [
        ((1, 2), Size, True),
        ([3, np.int64(4)], Size, True),
        ((1, 0), Size, False),
        ((1, 2, 3), Size, False),
        ((True, 2), Size, False),
        ("ab", Sequence[str], False),
        (["a", b"b"], Sequence[str], False),
        (["a", "b"], Sequence[str], True),
        (range(3), Sequence[int], True),
        ({"mean": [0.5]}, dict[str, list[float]], True),
        ({"mean": (0.5, NAN)}, dict[str, list[float]], False),
        ({1: [0.5]}, dict[str, list[float]], False),
        ((0.9, 0.99), tuple[Rate, Rate], True),
        ((0.9, 1.0), tuple[Rate, Rate], False),
        ((0.9,), tuple[Rate, Rate], False),
        (np.float32(0.5), Share, True),
        (np.True_, bool, True),
        (np.True_, int, False),
        pytest.param(10**400, int, True, id="huge int"),
        pytest.param(10**400, float, False, id="huge float"),
        (True, Literal[1, 2], False),
        (torch.tensor(1), int, False),
        (torch.zeros(2), Tensor, True),
        (torch.zeros(2), Dataset[Any], True),
        (torch.tensor(1), Dataset[Any], False),
        (np.zeros(2), Literal["a", "b"], False),
        (2**63, PositiveInt, False),
        (1024, Workers, True),
        (1025, Workers, False),
        (-1, Workers, False),
        (2**200, NonNegativeInt, True),  # a seed
        ("a\0b", str, False),
        ([0.0], Tensor, False),
        (Path("a"), str | Path, True),
        (Path("a"), str, False),
        (b"a", str | PathLike[str], False),
        (Path("a"), Data, True),
        ("", Data, False),
        (b"ab", Data, False),
        (TensorDataset(torch.zeros(2)), Data, True),
        (TensorDataset(torch.zeros(2)), Dataset[Any], True),
        (5, Dataset[Any], False),
        ("vit", Encoder, True),
        (nn.Identity(), Encoder, True),
        (nn.Identity, Encoder, False),
        ("", Encoder, False),
        ("cpu", Device, True),
        (torch.device("cpu"), Device | None, True),
        ("cpu:x", Device, False),
        ("", Device, False),
        (0, Device, False),
        (len, Callable[[Any], int], True),
        (3, Callable[[Any], int], False),
        (int, type[int], True),
        (str, type[int], False),
        (Has(), Named, True),
        (5, Named, False),
        (len, Masking, True),  # in Python any object with its call will do
        (Has, Masking, False),
        (Has(), Masking, False),
        (len, nn.Module, False),
    ],
)
def test_fits__more(value: object, hint: Any, allowed: bool) -> None:
    assert fits(value, hint) is allowed


def function(
    out: str | Path,
    epochs: PositiveInt | None = None,
    *more: NonNegativeInt,
    names: NonEmpty[Literal["a", "b"]] = ("a",),
    flag: bool = False,
    **options: Share,
) -> list[object]:
    return [out, epochs, more, names, flag, options]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([3], {}, "out of function is text or a path, got out=3."),
        ([None], {}, "out of function is text or a path, got out=None."),
        (
            ["x", 0],
            {},
            "epochs of function is None or a whole number of at least 1, got epochs=0.",
        ),
        (
            ["x"],
            {"flag": "false"},
            "flag of function is True or False, got flag='false'.",
        ),
        (
            ["x", 1, 2, -3],
            {},
            "more of function is a whole number of at least 0, got more=-3.",
        ),
        (
            ["x"],
            {"names": "a"},
            "names of function is a list of one or more, each one of 'a', 'b', got "
            "names='a'.",
        ),
        (["x"], {"names": []}, "each one of 'a', 'b', got names=[]."),
        (["x"], {"names": ["a", "c"]}, "got names=['a', 'c']."),
        (
            ["x"],
            {"other": 2},
            "other of function is a number above 0 and at most 1, got other=2.",
        ),
    ],
)
def test_checked__refused(
    args: list[Any], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        checked(function)(*args, **kwargs)
    assert str(caught.value).endswith(message)


def test_checked__what_is_given() -> None:
    numbers: list[Any] = [np.int32(3), np.int64(0)]
    options: dict[str, Any] = {"names": np.array(["a", "b"]), "other": np.float32(0.6)}
    values = checked(function)("x", *numbers, **options)
    assert values == ["x", 3, (0,), ["a", "b"], False, {"other": 0.6}]
    assert [type(values[1]), type(values[5]["other"])] == [int, float]  # type: ignore
    assert inspect.signature(checked(function)) == inspect.signature(function)


def test_checked__other_mistakes_are_pythons_to_tell() -> None:
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required .* 'out'"):
        checked(function)()  # type: ignore[call-arg]


def test_checked__a_long_value_is_told_in_short() -> None:
    with pytest.raises(ValueError) as caught:
        checked(function)(["x" * 1000] * 1000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 1000


def test_checked__classes() -> None:
    @checked
    @dataclass(frozen=True)
    class Settings:
        count: PositiveInt = 1

    class Part(Recorded):
        def __init__(self, count: PositiveInt = 1, **options: Any) -> None:
            super().__init__(**options)
            self.count = count

    class Own(Part):
        def __init__(self, share: Share, **options: Any) -> None:
            super().__init__(**options)
            self.share = share

    assert Settings(2).count == Own(0.5, count=3).count - 1 == 2
    with pytest.raises(ValueError, match="count of Settings is a whole number"):
        Settings(0)
    with pytest.raises(ValueError, match="count of Own is a whole number"):
        Own(0.5, count=False)
    with pytest.raises(ValueError, match="share of Own is a number above 0"):
        Own("0.5")  # type: ignore[arg-type]


def test_checked__names_that_a_type_checker_alone_imports() -> None:
    def own(other: Unknown, count: PositiveInt) -> None: ...  # type: ignore  # noqa: F821

    checked(own)(1, 2)


@pytest.mark.parametrize("called", [function, checked(function)])
def test_check_arguments(called: Callable[..., Any]) -> None:
    assert check_arguments(called, {"epochs": np.int64(2)}) == {"epochs": 2}
    for wrong in ("2", 0):
        with pytest.raises(ValueError, match="epochs of function"):
            check_arguments(called, {"out": "x", "epochs": wrong})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("~/photos", "HOME/photos"),
        (Path("~/photos"), Path("HOME/photos")),
        ("~", "HOME"),
        ("imagenette", "imagenette"),
        ("a/~/b", "a/~/b"),
        ("~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        (None, None),
    ],
)
def test_checked__home(
    given: object, read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    @checked
    def function(
        data: str | Path | None, other: str = "", more: Data = "x"
    ) -> list[object]:
        return [data, other, more]

    if isinstance(read, str | Path):
        read = type(read)(str(read).replace("HOME", str(tmp_path)))
    assert function(given, "~/x", "~/x") == [read, "~/x", f"{tmp_path}/x"]  # type: ignore
    assert function(data=given, more=[1, 2]) == [read, "", [1, 2]]  # type: ignore


def test_checked__home_at_every_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for function in (lightly_mim.evaluate, evaluate_dense):
        with pytest.raises(ValueError, match=f"{tmp_path}/file is a file"):
            function("vit_tiny_patch16_224", "~/x", out="~/file")
    with pytest.raises(ValueError, match=f"{tmp_path}/x"):
        load_encoder("~/x")


# What is made by the package rather than for it, and what is called for every image,
# which looks at its arguments itself.
UNCHECKED = {
    *("MIMOutput", "MaskedEncoder", "MaskedImageModel", "BrokenImageError"),
    *("DenseResult", "DenseResults", "Features", "Result", "Results"),
    *("ReplacementName", "Classifier", "Outcome", "Predictions"),
    # What a protocol of one's own is, and what it is given and may call.
    *("FeatureProtocol", "ImageProtocol", "LabelledImages", "rank_classes"),
    *("collate", "keyed_random_state", "seed_from"),
}


@pytest.mark.parametrize(
    "name",
    [
        f"{module.__name__}.{name}"
        for module in (lightly_mim, data, evaluation)
        for name in module.__all__
        if callable(getattr(module, name)) and name not in UNCHECKED
    ],
)
def test_every_public_callable_is_checked(name: str) -> None:
    module, _, last = name.rpartition(".")
    found: Any = getattr(
        {m.__name__: m for m in (lightly_mim, data, evaluation)}[module], last
    )
    if inspect.isclass(found):
        found = found.__init__
    assert found.__code__.co_filename == arguments.__file__
    assert get_type_hints(found.__wrapped__)
