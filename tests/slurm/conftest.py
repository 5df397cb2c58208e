"""The private SLURM that the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two virtual nodes with two CPUs and two GPUs each."""
    require_slurm()
    with Cluster() as running:
        yield running


def require_slurm() -> None:
    """Skips a test where SLURM is missing, unless `make slurm-test` runs it."""
    missing = missing_programs()
    if missing and "REQUIRE_SLURM" not in os.environ:
        pytest.skip(f"{', '.join(missing)} not found: run `make slurm-test`")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all nodes see."""
    return tmp_path_factory.mktemp("shared")
