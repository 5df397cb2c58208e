"""How threads wait for each other, by what OpenMP itself says that it read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="PyTorch has GNU's OpenMP on Linux"
)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_count(code: str, **variables: str) -> int:
    """Returns how often PyTorch's threads look before they sleep."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=True,
    )
    # Other packages bring an OpenMP of their own, which is loaded later.
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


@pytest.mark.parametrize(
    "code",
    [
        "import lightly_mim, torch",
        "import sys; sys.path.insert(0, '.'); import solar_cells",
        "import sys; sys.path.insert(0, '.'); import throughput",
    ],
)
def test_threads_sleep_soon(code: str) -> None:
    assert spin_count(code) == 1000


def test_threads_wait_as_the_user_says() -> None:
    code = "import lightly_mim, torch"
    assert spin_count(code, GOMP_SPINCOUNT="77") == 77
    active = spin_count("import torch", OMP_WAIT_POLICY="active")
    assert active > 1_000_000
    assert spin_count(code, OMP_WAIT_POLICY="active") == active


def test_threads_after_pytorch_wait_as_before() -> None:
    assert spin_count("import torch, lightly_mim") == spin_count("import torch") != 1000
