"""Run directories for the report: a real one, and what a browser needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightly_mim import SimMIM, evaluate, pretrain
from lightly_mim.report import report

from ..conftest import SHORT_RUN, TINY_VIT


@pytest.fixture(scope="session")
def real_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was pretrained, evaluated and reported, on real photographs."""
    out = tmp_path_factory.mktemp("runs") / "first"
    watched: dict[str, Any] = {
        **{"reconstruct_every": 1, "rank_every": 1, "probe_every": 1, "log_every": 1},
        **{"probe": "linear", "avg_dist": True},
    }
    method = partial(SimMIM, **TINY_VIT)
    pretrain(out, photos, method, **{**SHORT_RUN, **watched})
    evaluate(
        out,
        photos,
        protocols=("knn", "logistic"),
        layers=(0, 1),
        pools=("mean", "cls"),
        baselines=("random", "pixels"),
        out=out,
        num_workers=0,
        device="cpu",
    )
    report(out)
    return out


def find_browser() -> str | None:
    """Returns the path of a Chromium, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    path = find_browser()
    if path is None and "REQUIRE_BROWSER" not in os.environ:
        pytest.skip("chromium not found: run `make browser-test`")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield running
        running.close()
