from __future__ import annotations

import pytest
import torch

from lightly_mim.losses import LossName, masked_loss

FORMULAS = {
    "l1": lambda d: d.abs(),
    "l2": lambda d: d**2,
    "smooth_l1": lambda d: torch.where(d.abs() < 1, 0.5 * d**2, d.abs() - 0.5),
}


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
def test_masked_loss__equals_the_formula(loss: LossName) -> None:
    prediction, target = torch.randn(2, 2, 3, 4, dtype=torch.float64) * 2
    weight = (torch.rand(2, 3, 4) < 0.5).double()
    values = FORMULAS[loss](prediction - target)
    expected = (values * weight).sum() / weight.sum()
    actual = masked_loss(prediction, target, weight, loss)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    actual = masked_loss(prediction, target, None, loss)
    torch.testing.assert_close(actual.double(), values.mean(), rtol=1e-6, atol=0)


def test_masked_loss__measures_half_precision_in_float32() -> None:
    prediction = torch.randn(4, 50, 64).bfloat16()
    target = torch.randn(4, 50, 64)
    loss = masked_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss == (prediction.float() - target).abs().mean()


def test_masked_loss__refuses() -> None:
    with pytest.raises(ValueError, match="'l1', 'l2', 'smooth_l1'.*got 'l3'"):
        masked_loss(torch.zeros(1), torch.zeros(1), loss="l3")  # type: ignore[arg-type]
