"""Work that is killed at random moments ends as if it never was, see `kills.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kills(photos: Path, tmp_path: Path) -> None:
    """Of pretraining, evaluation and fine-tuning."""
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, script, photos, tmp_path, "60"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_kills_of_a_study(photos: Path, tmp_path: Path) -> None:
    """Through slurm/local.py: submit.py, one of its jobs, or all of them."""
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, script, photos, tmp_path, "8", "study"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-5000:]
