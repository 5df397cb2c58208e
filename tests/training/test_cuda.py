from __future__ import annotations

import pytest
import torch

from lightly_mim.training.cuda import float32_products


@pytest.mark.parametrize(
    ("precision", "matrices", "convolutions"),
    [("32-true", "highest", False), ("bf16-mixed", "high", True)],
)
def test_float32_products(precision: str, matrices: str, convolutions: bool) -> None:
    def found() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = found()
    with pytest.raises(KeyError), float32_products(torch.device("cuda"), precision):
        assert found() == (matrices, convolutions)
        raise KeyError
    assert found() == before
    with float32_products(torch.device("cpu"), precision):
        assert found() == before
