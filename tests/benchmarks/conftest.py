"""What the tests of the scripts share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def on_path() -> Iterator[None]:
    """Lets the scripts be imported, and import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives PyTorch its threads back, which the scripts set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
