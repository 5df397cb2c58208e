from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightly_mim.losses import (
    L1,
    L2,
    CrossEntropy,
    Loss,
    SmoothL1,
    choose_loss,
    masked_loss,
)

LOSSES = [
    (L1(), lambda d: d.abs()),
    (L2(), lambda d: d**2),
    (SmoothL1(), lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)),
    (SmoothL1(0.3), lambda d: torch.where(d.abs() < 0.3, d**2 / 0.6, d.abs() - 0.15)),
]


@pytest.mark.parametrize(("loss", "formula"), LOSSES)
def test_masked_loss__equals_the_formula(loss: Loss, formula: object) -> None:
    assert callable(formula)
    prediction, target = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    weight = torch.rand(2, 3, 4, dtype=torch.float64)
    values = formula(prediction - target)
    expected = (values * weight).sum() / weight.sum()
    torch.testing.assert_close(masked_loss(prediction, target, loss, weight), expected)
    expected = values.mean()
    torch.testing.assert_close(masked_loss(prediction, target, loss), expected)


def test_masked_loss__equals_the_formula_for_classes() -> None:
    prediction = torch.randn(2, 3, 4 * 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (2, 3, 4))
    weight = torch.rand(2, 3, 4, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    weighted = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for k in range(3):
            for d in range(4):
                logits = prediction[b, k, d * 5 : d * 5 + 5]
                share = logits.exp() / logits.exp().sum()
                value = -share[target[b, k, d]].log()
                total = total + value
                weighted = weighted + value * weight[b, k, d]
    for loss, expected in (
        (masked_loss(prediction, target, CrossEntropy()), total / 24),
        (
            masked_loss(prediction, target, CrossEntropy(), weight),
            weighted / weight.sum(),
        ),
    ):
        torch.testing.assert_close(loss, expected)
        gradients = [
            torch.autograd.grad(value, prediction, retain_graph=True)[0]
            for value in (loss, expected)
        ]
        torch.testing.assert_close(*gradients)


def test_masked_loss__measures_half_precision_in_float32() -> None:
    prediction = torch.randn(4, 50, 64).bfloat16()
    target = torch.randn(4, 50, 64)
    loss = masked_loss(prediction, target, L1())
    assert loss.dtype == torch.float32
    assert loss == (prediction.float() - target).abs().mean()
    classes = torch.randint(0, 4, (4, 50, 16))
    loss = masked_loss(prediction, classes, CrossEntropy())
    assert loss.dtype == torch.float32
    assert loss == masked_loss(prediction.float(), classes, CrossEntropy())


@pytest.mark.parametrize(
    ("prediction", "target", "loss"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), L1()),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), L1()),
        (torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), L2()),
        (torch.zeros(2, 3, 12), torch.zeros(2, 3, 5).long(), CrossEntropy()),
        (torch.zeros(2, 3, 10), torch.zeros(1, 3, 5).long(), CrossEntropy()),
    ],
)
def test_masked_loss__refuses_a_head_of_another_width(
    prediction: Tensor, target: Tensor, loss: Loss
) -> None:
    with pytest.raises(ValueError, match="build the head for the width of the target"):
        masked_loss(prediction, target, loss)


def test_smooth_l1__refuses() -> None:
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"above 0, got beta={beta}"):
            SmoothL1(beta)


def test_choose_loss__returns_what_fits() -> None:
    default, loss = L1(), L2()
    assert choose_loss(None, None, default) is default
    assert isinstance(choose_loss(None, 8, default), CrossEntropy)
    assert choose_loss(loss, None, default) is loss


def test_choose_loss__takes_a_function_of_ones_own() -> None:
    def huge(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
        difference = (prediction - target).abs() * 1e6
        return difference.mean() if reduction == "mean" else difference

    loss = choose_loss(huge, None, L1())  # type: ignore[arg-type]
    prediction, target = torch.randn(2, 2, 3, 4)
    expected = (prediction - target).abs().mean() * 1e6
    torch.testing.assert_close(masked_loss(prediction, target, loss), expected)


@pytest.mark.parametrize(
    ("loss", "num_classes", "message"),
    [
        (L1(), 8, r"need CrossEntropy\(\), got the loss L1\(\)"),
        (CrossEntropy(), None, r"numbers, got the loss CrossEntropy\(\)"),
        ("l1", None, r"'l1' does not take: .* is not a callable"),
    ],
)
def test_choose_loss__refuses(
    loss: Loss, num_classes: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_loss(loss, num_classes, L1())


def test_masked_loss__takes_pytorchs_functions() -> None:
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weight = torch.rand(2, 3, 4)
    expected = masked_loss(prediction, target, L1(), weight)
    found = masked_loss(prediction, target, F.l1_loss, weight)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


def test_masked_loss__refuses_losses_that_do_not_measure_every_value() -> None:
    def mean(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
        return (prediction - target).abs().mean()

    values = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="measures every value"):
        masked_loss(values, values, mean, torch.ones_like(values))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_predicted", [6, 12, 48])
def test_masked_loss__refuses_another_number_of_classes(num_predicted: int) -> None:
    classes = torch.randint(8, (2, 5, 3))
    prediction = torch.randn(2, 5, num_predicted)
    with pytest.raises(ValueError, match="of 8 classes: build the head"):
        masked_loss(prediction, classes, CrossEntropy(), num_classes=8)
    with pytest.raises(ValueError, match="Classes are int64"):
        masked_loss(prediction, classes.float(), CrossEntropy(), num_classes=8)
