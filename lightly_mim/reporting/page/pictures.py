"""Pictures of a run directory, made small for a page.

Every picture is decoded and encoded anew: what else a file holds does not get on the
page. A picture that is damaged, or not of the size that its layout says, is left out.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from lightly_mim.files import check_regular
from lightly_mim.reporting.figures import LAYOUT_KEY
from lightly_mim.reporting.page.reading import (
    GALLERY,
    RunFiles,
    as_mapping,
    as_mappings,
    as_number,
    as_text,
    dig,
)

MAX_FRAMES = 16
_MAX_PIXELS = 60_000_000
_CELL = 192  # pixels on the page, at most
_COLUMNS = 4
_MAX_ROWS = 64
_MAX_IMAGES = 2000
_MAX_SIDE = 64  # patches


def read_picture(path: Path, format: str) -> tuple[Image.Image, dict[str, Any]]:
    """Reads a picture and the texts in it.

    Args:
        path:
            The file.
        format:
            "PNG" or "WEBP". No other decoder looks at the file.

    Raises:
        ValueError: If it cannot be read, is damaged, or too large.
    """
    try:
        check_regular(path)
        with Image.open(path, formats=[format]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"it has more than {_MAX_PIXELS:,} pixels")
            texts = dict(getattr(image, "text", {}) or {})
            return image.convert("RGB"), texts
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error


def as_uri(picture: Image.Image, quality: int = 80) -> str:
    """Returns a picture as an address that holds it."""
    content = io.BytesIO()
    picture.save(content, format="WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def frames(
    run: RunFiles, problems: list[str], count: int = MAX_FRAMES
) -> dict[str, Any]:
    """Returns the reconstructions of some epochs, the first and the last among them.

    Args:
        run:
            The run.
        problems:
            What cannot be shown is added here.
        count:
            How many epochs at most.

    Returns:
        `frames`, each with `epoch`, `title` and `uri`; `rows`, how many images each
        shows, 0 where the file does not tell its cells and is shown as a whole;
        `aspect`, width over height of a cell; `note`; and `left_out`, the number of
        epochs that are not shown.
    """
    pictures = run.pictures
    total = len(pictures)
    if total > count:
        last = count - 1
        pictures = [pictures[number * (total - 1) // last] for number in range(count)]
    found: list[dict[str, Any]] = []
    shape: tuple[int, float] | None = None
    note = ""
    for epoch, path in pictures:
        try:
            picture, texts = read_picture(path, "PNG")
        except ValueError as error:
            problems.append(as_text(error, 300))
            continue
        layout = _layout(texts, picture)
        cells, rows, aspect = _cells(picture, layout)
        if shape is not None and shape != (rows, aspect):
            problems.append(as_text(f"{path} shows other images and is left out."))
            continue
        shape = rows, aspect
        note = as_text(layout.get("note", ""))
        title = as_text(layout.get("title", "")) or f"epoch {epoch}"
        found.append({"epoch": epoch, "title": title, "uri": as_uri(cells)})
    rows, aspect = shape or (0, 1.0)
    return {
        "frames": found,
        "rows": rows,
        "aspect": aspect,
        "note": note,
        "left_out": total - len(found),
    }


def _layout(texts: dict[str, Any], picture: Image.Image) -> dict[str, Any]:
    """Returns where the cells are, empty if the picture does not tell."""
    try:
        layout = as_mapping(json.loads(str(texts.get(LAYOUT_KEY, "{}"))))
        cell = layout["cell"]
        numbers = [layout["left"], layout["top"], layout["gap"], layout["rows"], *cell]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if len(numbers) != 6 or any(type(n) is not int or n < 0 for n in numbers):
        return {}
    left, top, gap, rows, width, height = numbers
    if not (0 < rows <= _MAX_ROWS and width and height):
        return {}
    right = left + _COLUMNS * width + (_COLUMNS - 1) * gap
    bottom = top + rows * height + (rows - 1) * gap
    return layout if right <= picture.width and bottom <= picture.height else {}


def _cells(
    picture: Image.Image, layout: dict[str, Any]
) -> tuple[Image.Image, int, float]:
    """Returns the cells of a picture side by side, their rows, and their aspect."""
    if not layout:
        picture.thumbnail((4 * _CELL, 16 * _CELL))
        return picture, 0, picture.width / picture.height
    width, height = layout["cell"]
    scale = min(_CELL / max(width, height), 1.0)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    sheet = Image.new("RGB", (_COLUMNS * size[0], layout["rows"] * size[1]))
    for row in range(layout["rows"]):
        for column in range(_COLUMNS):
            left = layout["left"] + column * (width + layout["gap"])
            top = layout["top"] + row * (height + layout["gap"])
            cell = picture.crop((left, top, left + width, top + height))
            cell = cell.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(cell, (column * size[0], row * size[1]))
    return sheet, layout["rows"], width / height


def gallery(run: RunFiles, problems: list[str]) -> dict[str, Any] | None:
    """Returns what `lightly_mim.gallery` has written, as far as it can be shown.

    Args:
        run:
            The run.
        problems:
            What cannot be shown is added here.

    Returns:
        None if there is nothing. Otherwise `from`, `count`, `labels` (a text for each
        image), `classes` (a number for each image), `files`, `thumbnails` and, each of
        them or None, `map`, `neighbours`, `patches` and `reconstructed`.
    """
    found = run.gallery
    if found is None:
        return None
    folder = run.path / GALLERY
    files = found.get("files")
    side = dig(found, "thumbnails", "side")
    columns = dig(found, "thumbnails", "columns")
    try:
        if not isinstance(files, list) or not 0 < len(files) <= _MAX_IMAGES:
            raise ValueError(f"{folder} lists no images")
        if not all(type(n) is int and 0 < n <= 512 for n in (side, columns)):
            raise ValueError(f"{folder} does not tell the size of its images")
        sheet, _ = read_picture(folder / "thumbnails.webp", "WEBP")
        rows = -(-len(files) // columns)
        if sheet.size != (columns * side, rows * side):
            raise ValueError(f"{folder}/thumbnails.webp has another size")
    except ValueError as error:
        problems.append(as_text(f"Features are not shown: {error}", 400))
        return None
    count = len(files)
    numbers = _whole_numbers(found.get("labels"), count)
    names = found.get("classes")
    names = names if isinstance(names, list) else []
    labels = [
        as_text(names[n], 60) if n is not None and 0 <= n < len(names) else ""
        for n in numbers or [None] * count
    ]
    return {
        "from": as_text(found.get("from", ""), 120),
        "of": found.get("of") if type(found.get("of")) is int else count,
        "count": count,
        "files": [as_text(file, 120) for file in files],
        "labels": labels,
        "classes": numbers,
        "thumbnails": {
            "uri": as_uri(sheet),
            "columns": columns,
            "rows": rows,
        },
        "map": _map(found, count),
        "neighbours": _neighbours(found, count),
        "patches": _patches(found, folder, count, problems),
        "reconstructed": _reconstructed(found, folder, problems),
    }


def _whole_numbers(value: Any, count: int) -> list[int | None] | None:
    """Returns a number for each image, None where it has none."""
    if not isinstance(value, list) or len(value) != count:
        return None
    return [n if type(n) is int and 0 <= n < 10**6 else None for n in value]


def _map(found: dict[str, Any], count: int) -> dict[str, Any] | None:
    place = as_mapping(found.get("map"))
    axes = [place.get(name) for name in ("x", "y")]
    for axis in axes:
        if not isinstance(axis, list) or len(axis) != count:
            return None
        if any((n := as_number(v)) is None or not 0 <= n <= 1 for v in axis):
            return None
    return {"x": axes[0], "y": axes[1], "how": as_text(place.get("how", ""))}


def _neighbours(found: dict[str, Any], count: int) -> list[dict[str, Any]]:
    rows = []
    for entry in as_mappings(found.get("neighbours"))[:50]:
        query, near, cosine = (entry.get(n) for n in ("image", "near", "cosine"))
        if not (isinstance(near, list) and isinstance(cosine, list)):
            continue
        if len(near) != len(cosine) or len(near) > 50:
            continue
        if any(type(n) is not int or not 0 <= n < count for n in [query, *near]):
            continue
        if any(as_number(value) is None for value in cosine):
            continue
        rows.append({"image": query, "near": list(zip(near, cosine, strict=True))})
    return rows


def _patches(
    found: dict[str, Any], folder: Path, count: int, problems: list[str]
) -> dict[str, Any] | None:
    patches = as_mapping(found.get("patches"))
    images: Any = patches.get("images")
    grid: Any = patches.get("grid")
    similarity: Any = patches.get("similarity")
    if not all(
        isinstance(v, list) and 0 < len(v) <= 50 for v in (images, grid, similarity)
    ):
        return None
    if len(grid) != 2 or any(
        type(n) is not int or not 0 < n <= _MAX_SIDE for n in grid
    ):
        return None
    if any(type(n) is not int or not 0 <= n < count for n in images):
        return None
    wanted = (grid[0] * grid[1]) ** 2
    try:
        raw = [base64.b64decode(str(text), validate=True) for text in similarity]
        if len(raw) != len(images) or any(len(each) != wanted for each in raw):
            raise ValueError("similarities of another size")
        sheet, _ = read_picture(folder / "patches.webp", "WEBP")
    except ValueError as error:
        problems.append(as_text(f"Patches are not shown: {error}", 400))
        return None
    return {
        "images": images,
        "grid": grid,
        "similarity": [base64.b64encode(each).decode() for each in raw],
        "uri": as_uri(sheet, 85),
        "aspect": sheet.width / 3 / (sheet.height / len(images)),
        "averaged": patches.get("averaged_from") is not None,
    }


def _reconstructed(
    found: dict[str, Any], folder: Path, problems: list[str]
) -> dict[str, Any] | None:
    best = as_mapping(found.get("reconstructed"))
    rows = as_mappings(best.get("rows"))
    if not rows:
        return None
    try:
        picture, texts = read_picture(folder / "reconstructed.png", "PNG")
    except ValueError as error:
        problems.append(as_text(error, 300))
        return None
    layout = _layout(texts, picture)
    if not layout or layout["rows"] != len(rows):
        return None
    cells, count, aspect = _cells(picture, layout)
    return {
        "uri": as_uri(cells, 85),
        "rows": count,
        "aspect": aspect,
        "note": as_text(best.get("note", "")),
        "of": best.get("of") if type(best.get("of")) is int else 0,
        "kinds": [_kind(row) for row in rows],
    }


def _kind(row: dict[str, Any]) -> dict[str, str]:
    error = as_number(row.get("error"))
    return {
        "kind": as_text(row.get("kind", ""), 20),
        "error": "" if error is None else f"{error:g}",
    }
