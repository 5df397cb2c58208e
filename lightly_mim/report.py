"""`report(...)`: one page that shows what a run was and what it learned."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from lightly_mim.arguments import NonEmpty, checked
from lightly_mim.config import is_named_only
from lightly_mim.data import open_data
from lightly_mim.data.sources import Data
from lightly_mim.evaluation.provenance import choose_device
from lightly_mim.files import printable
from lightly_mim.gallery import write_gallery
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.reporting.page import find_runs, write_page, write_page_or_warn
from lightly_mim.reporting.page.reading import GALLERY, GALLERY_FILE
from lightly_mim.runs import RunDirectory
from lightly_mim.transforms import EvalTransform


@checked
def report(
    runs: str | Path | NonEmpty[str | Path],
    *,
    out: str | Path | None = None,
    data: Data | None = None,
    features: bool = True,
    figures: bool = True,
    title: str | None = None,
) -> Path:
    """Writes `report.html`: what was run, its curves, pictures, features and results.

    The page holds all that it shows and asks no network. It is made from the run
    directory alone, which is read as data: nothing that a file names is imported. Only
    features of images need the encoder and the images; they are kept in `gallery/` in
    the run directory, so that the page can be made again without them.

    Args:
        runs:
            Directories of runs or of evaluations (`out` of `pretrain` and of
            `evaluate`), or folders of them: those of a benchmark or of a study. Several
            runs are compared on one page.
        out:
            The folder of the page. By default the one that is given as `runs`; the
            current one if there are several.
        data:
            The images to show features of, instead of those that the run was trained
            on, for example where their folder has moved. For one run.
        features:
            Whether to look at images with the encoder, if that has not been done since
            it was trained. Those are the images that the run's config.yaml names, some
            of which the page then shows.
        figures:
            Whether to write each figure as PNG and JSON file as well, into `figures/`,
            and all curves as `curves.png`.
        title:
            What the page is called. By default the name of the run.

    Returns:
        The page's path.

    Raises:
        ValueError: If there is no run in a directory, or nothing to show.
        OSError: If it cannot be written.
    """
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    paths = list(dict.fromkeys(p for folder in folders for p in find_runs(folder)))
    if data is not None and len(paths) > 1:
        raise ValueError(
            f"data is for one run, and there are {len(paths)}: report them one by one, "
            "or leave data out."
        )
    if out is None:
        out = folders[0] if len(folders) == 1 else "."
    if len(paths) == 1 and features:
        why_not = look_at(paths[0], data)
        if why_not:
            print(f"Features are not shown anew: {why_not}")
    page = write_page(paths, out, title=title, figures=figures)
    print(f"The report is in {page}: open it with a browser.", flush=True)
    return page


def report_run(
    directory: Path | str,
    method: MaskedImageModel,
    images: Dataset[Any],
    name: str,
    device: torch.device,
) -> None:
    """Writes the report of a run that has just finished, or warns if it cannot.

    The run is complete, whatever becomes of its report.

    Args:
        directory:
            The run directory.
        method:
            What was trained. It is where it was afterwards.
        images:
            See `write_gallery`.
        name:
            See `write_gallery`.
        device:
            Where to compute.
    """
    home = next(method.parameters()).device
    try:
        write_gallery(directory, method.to(device), images, name)
    except Exception as error:
        warnings.warn(f"The report shows no features: {error}", stacklevel=2)
    finally:
        method.to(home)
    if page := write_page_or_warn(directory):
        print(f"The report is in {page}: open it with a browser.", flush=True)


def look_at(directory: Path | str, data: Data | None = None) -> str:
    """Writes the gallery of a run, if it has none or one of an earlier encoder.

    Args:
        directory:
            The run directory.
        data:
            The images, instead of the run's own.

    Returns:
        Why it could not be done, a sentence. Empty if it was, or if there is nothing to
        do.
    """
    run = RunDirectory(directory)
    if not run.config.exists():
        return "" if data is None else f"there is no run in {run.path}."
    weights = run.encoder if run.encoder.exists() else run.checkpoint
    if not weights.exists():
        return "the run has no checkpoint yet."
    made = run.path / GALLERY / GALLERY_FILE
    fresh = made.exists() and made.stat().st_mtime >= weights.stat().st_mtime
    if fresh and data is None:
        return ""
    try:
        config = run.stored_config() or {}
        own = config.get("data")
        if data is None and (not isinstance(own, str) or is_named_only(own)):
            return "its images are a data set of its own: pass data."
        method = from_pretrained(run.path).to(choose_device(None))
        encoder = method.encoder
        value_range = config.get("value_range")
        train, val = open_data(
            own if data is None else data,  # type: ignore[arg-type]
            config.get("val") if data is None else None,
            transform=EvalTransform(encoder.img_size, normalize=None),
            in_chans=encoder.in_chans,
            value_range=tuple(value_range) if value_range else None,
            with_val=config.get("validate") is not False,
            labels=False,
        )
        images = train if val is None else val
        kind = "training images" if val is None else "validation images"
        shown = data if isinstance(data, str | Path) else own
        name = f"{kind} of {printable(str(shown))}"
        print(f"Looking at {name}.", flush=True)
        write_gallery(run.path, method, images, name)
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        return str(error)
    return ""
