"""What the page says: the numbers of the files, and nothing that a file brings in."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest

from lightly_mim.files import sealed
from lightly_mim.reporting.page import REPORT, find_runs, write_page
from lightly_mim.reporting.page.comparison import compare_runs
from lightly_mim.reporting.page.curves import curves, thinned
from lightly_mim.reporting.page.facts import (
    commands,
    duration,
    facts,
    state,
    training_seconds,
)
from lightly_mim.reporting.page.findings import classes, heat_map, sentences
from lightly_mim.reporting.page.reading import names_of, read_run

EVIL = "</script><img src=x onerror=alert(1)><script>alert(1)//"


class Tags(HTMLParser):
    """Collects the tags of a page, and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.data = ""
        self.policy = ""
        self.script = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action")]
        assert not any(name.startswith("on") for name in found)
        if tag == "meta" and found.get("http-equiv"):
            self.policy = found["content"] or ""
        if tag == "script":
            self._within = "data" if found.get("id") == "data" else "script"

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "data":
            self.data += data
        elif self._within == "script":
            self.script += data


def write_run(folder: Path, metrics: str = "", **config: Any) -> Path:
    """Writes a run directory by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {
        "out": str(folder),
        "data": "photos",
        "method": {
            "class_path": "lightly_mim.MAE",
            "init_args": {"encoder": "vit_tiny_patch16_224", "img_size": 32},
        },
        "recipe": {
            **{"source": "lightly_mim.defaults", "epochs": 3, "batch_size": 8},
            **{"lr": 0.001, "lr_batch_size": 8},
        },
        "epochs": 3,
        "seed": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole | config))
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def row(
    model: str, low: float, top1: float, high: float, **more: Any
) -> dict[str, Any]:
    ends = {"top1_low": low, "top1": top1, "top1_high": high}
    plain = {"protocol": "knn", "variant": "", "layer": 0, "pooling": "mean"}
    return {"model": model, **plain, **ends, "num_test": 100, **more}


def write_results(folder: Path, *rows: dict[str, Any], **more: Any) -> None:
    content = {"rows": list(rows), "notes": [], "arguments": {"seed": 3}, **more}
    (folder / "results.json").write_text(json.dumps(content))


# The numbers.


def test_page__numbers_are_those_of_the_files(real_run: Path) -> None:
    page = Tags((real_run / REPORT).read_text())
    data = json.loads(page.data)
    text = (real_run / "metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    shown = {
        line["column"]: {step: value for step, value, _ in line["points"]}
        for figure in data["figures"]
        for line in figure["series"]
    }
    logged = {name for name in rows[0] if name not in ("step", "epoch")}
    assert shown.keys() == logged
    for name, points in shown.items():
        factor = 100 if name in ("probe_top1", "knn_top1") else 1
        wanted = {int(r["step"]): factor * float(r[name]) for r in rows if r[name]}
        assert points == wanted
    # And the same in the JSON files, and the PNG files beside them.
    for figure in data["figures"]:
        stem = real_run / "figures" / figure["key"]
        written = json.loads(stem.with_name(f"{stem.name}.json").read_text())
        assert written["series"] == figure["series"]
        with Image.open(stem.with_name(f"{stem.name}.png")) as picture:
            assert picture.width > 500
    with Image.open(real_run / "curves.png") as picture:
        assert picture.width > 1000


def test_page__results_are_those_of_the_file(real_run: Path) -> None:
    text = (real_run / REPORT).read_text()
    results = json.loads((real_run / "results.json").read_text())
    table = text[text.index('<table class="sort">') :]
    table = table[: table.index("</table>")]
    lines = re.findall(r"<tr.*?</tr>", table, flags=re.S)[1:]
    assert len(lines) == len(results["rows"]) == 6
    for line, entry in zip(lines, results["rows"], strict=True):
        assert f'data-value="{entry["top1"]}"' in line
        low, high = (f"{100 * entry[k]:.1f}" for k in ("top1_low", "top1_high"))
        assert f"{low} to {high}" in line
        assert f"<b>{100 * entry['top1']:.1f}</b>" in line
    for note in results["notes"]:
        assert note.split("'")[0][:60] in text


def test_page__asks_no_network_and_allows_one_script(real_run: Path) -> None:
    text = (real_run / REPORT).read_text()
    page = Tags(text)
    assert len(text) < 10_000_000
    assert page.tags.count("script") == 2
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    outside = re.findall(r"https?://[\w.]+", text)
    assert set(outside) <= {"http://www.w3.org"}  # the name of SVG, not a place
    assert "@import" not in text


def test_page__again_without_encoder_and_images(real_run: Path, tmp_path: Path) -> None:
    copied = tmp_path / real_run.name
    shutil.copytree(real_run, copied)
    (copied / "encoder.safetensors").unlink()
    shutil.rmtree(copied / "checkpoints")
    write_page([copied], copied)
    one, two = ((run / REPORT).read_text() for run in (real_run, copied))
    assert one.replace(str(real_run), "RUN") == two.replace(str(copied), "RUN")


# Half of it, or damaged.


def test_page__half_finished(tmp_path: Path) -> None:
    metrics = "epoch,step,train_loss,lr\n0,3,0.5,0.1\n1,7,0.25,0.1\n1,8,0.2"
    run = write_run(tmp_path / "run", metrics)
    text = write_page([run], run).read_text()
    assert state(read_run(run)) == ("open", "unfinished, in epoch 2 of 3")
    assert "--resume" in text
    assert "Pictures</h2>" not in text
    # The last row was cut off as it was written.
    assert read_run(run).metrics["train_loss"].values == [0.5, 0.25]


def test_page__just_begun_and_no_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_page([run], run)
    assert state(read_run(run)) == ("open", "nothing logged yet")


def test_page__evaluation_alone(tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    out.mkdir()
    write_results(out, row("vit.pth", 0.4, 0.5, 0.6), encoder={"name": "vit"})
    text = write_page([out], out).read_text()
    assert "50.0" in text and "40.0 to 60.0" in text


def test_page__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no run in"):
        find_runs(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        find_runs(tmp_path / "missing")
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match="There is nothing to report in"):
        write_page(find_runs(tmp_path), tmp_path)
    assert not (tmp_path / REPORT).exists()


@pytest.mark.parametrize("name", ["history.json", "results.json", "finished.json"])
@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000, "\udcff"])
def test_page__damaged_file(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run", "epoch,step,train_loss\n0,3,0.5\n")
    (run / name).write_bytes(content.encode(errors="surrogateescape"))
    text = write_page([run], run).read_text()
    assert f"{name} is damaged: " in text and "It is left out." in text


@pytest.mark.parametrize(
    "rows", [None, {}, [1, None], [{"model": 1}], [row("a", 0.1, math.nan, 0.3)]]
)
def test_page__damaged_rows(tmp_path: Path, rows: Any) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text(json.dumps({"rows": rows}))
    assert "results.json is damaged" in write_page([run], run).read_text()


def test_page__checksums(tmp_path: Path, real_run: Path) -> None:
    """A digit that has changed is no result."""
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    for name, was, now in (
        ("results.json", '"top1": ', '"top1": 1'),
        ("config.yaml", "\nseed: ", "\nseed: 1"),
        ("history.json", '"time": "', '"time": "1'),
        ("finished.json", '"epochs": ', '"epochs": 1'),
    ):
        file = run / name
        text = file.read_text()
        assert was in text
        file.write_text(text.replace(was, now, 1))
        page = write_page([run], run).read_text()
        assert f"{name} " in page and "its checksum is another" in page
        file.write_text(text)


@pytest.mark.parametrize("what", ["FIFO", "device", "folder", "loop"])
def test_page__what_is_no_file(tmp_path: Path, real_run: Path, what: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    picture = next((run / "reconstructions").iterdir()).name
    names = ["results.json", "config.yaml", "history.json", "gallery/gallery.json"]
    for name in (*names, "gallery/thumbnails.webp", f"reconstructions/{picture}"):
        (run / name).unlink(missing_ok=True)
        if what == "FIFO":
            os.mkfifo(run / name)
        elif what == "folder":
            (run / name).mkdir()
        else:
            (run / name).symlink_to("/dev/zero" if what == "device" else run / name)
    text = write_page([run], run).read_text()
    assert f"a {what}, only regular files are read" in text or what == "loop"
    (run / "metrics.csv").unlink()
    os.mkfifo(run / "metrics.csv")
    with pytest.raises(ValueError, match="There is nothing to report in .*a FIFO"):
        write_page([run], run)


def test_page__dense(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    dense = {"model": "a", "protocol": "knn", "layer": 3, "miou": 0.5}
    dense |= {"miou_low": 0.4, "miou_high": 0.6, "hyperparameters": {"k": 20}}
    (run / "dense.json").write_text(json.dumps(sealed({"rows": [dense]})))
    text = write_page([run], run).read_text()
    assert "Dense evaluation" in text and "40.0 to 60.0" in text and "k 20" in text


def test_page__odd_values_everywhere(tmp_path: Path) -> None:
    """No value of another kind than ours stops the page."""
    odd: list[Any] = [None, True, -1, 10**400, 1e999, "x", [], {}, [[1]], {"a": {}}]
    run = write_run(tmp_path / "run", "epoch,step,lr\n0,1,0.1\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    result = row("a", 0.1, 0.2, 0.3, hyperparameters={}, confusion=[[1]], selection=[])
    for value in odd:
        for name in ("method", "recipe", "normalize", "data", "seed", "precision"):
            text = json.dumps({**config, name: value})
            (run / "config.yaml").write_text(text)
            write_page([run], run)
        for name in [*result, "draws", "top5", "seconds"]:
            write_results(run, {**result, name: value}, data={"classes": value})
            write_page([run], run)
        for name in ("facts", "sessions", "changes"):
            (run / "history.json").write_text(json.dumps({name: value}))
            write_page([run], run)
        (run / "row.json").write_text(json.dumps({"axes": value, "row": value}))
        write_page([run, write_run(tmp_path / "other")], tmp_path)


def test_page__broken_pictures(tmp_path: Path, real_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    pictures = sorted((run / "reconstructions").iterdir())
    pictures[0].write_bytes(b"\x89PNG\r\n\x1a\n junk")
    pictures[1].write_bytes(pictures[2].read_bytes()[:3000])
    (run / "gallery" / "thumbnails.webp").write_bytes(b"junk")
    text = write_page([run], run).read_text()
    assert text.count("cannot be shown") == 3
    assert "Features are not shown" in text
    assert "epoch 3 of 3" in text


def test_page__gallery_of_a_stranger(tmp_path: Path, real_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    file = run / "gallery" / "gallery.json"
    whole = json.loads(file.read_text())
    text = json.dumps(whole).replace('"temple"', json.dumps(EVIL))
    file.write_text(text)
    page = write_page([run], run).read_text()
    assert Tags(page).tags.count("script") == 2 and "<img" not in page
    odd: list[Any] = [None, -1, 10**9, "x", [], {}, [1e999], [None] * 32, [{}]]
    for name in whole:
        for value in odd:
            file.write_text(json.dumps({**whole, name: value}))
            write_page([run], run)
    for name in ("images", "grid", "similarity"):
        for value in odd:
            changed = {**whole["patches"], name: value}
            file.write_text(json.dumps({**whole, "patches": changed}))
            write_page([run], run)


def test_page__text_is_escaped(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "ün <b> 名",
        f"epoch,step,{EVIL}\n0,1,1\n",
        data=EVIL,
        method={"class_path": f"os.system.{EVIL}", "init_args": {EVIL: EVIL}},
    )
    write_results(run, row(EVIL, 0.1, 0.2, 0.3), notes=[EVIL], command=EVIL)
    (run / "history.json").write_text(json.dumps({"sessions": [{"host": EVIL}] * 2}))
    page = Tags(write_page([run], run, title=EVIL).read_text())
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    json.loads(page.data)


def test_page__non_utf8_path(tmp_path: Path) -> None:
    run = write_run(tmp_path / "caf\udce9", "epoch,step,lr\n0,1,0.1\n")
    text = write_page([run], tmp_path).read_text()
    assert "caf\\udce9" in text


# Curves.


def test_curves__nan_is_said_and_marks_are_where_the_run_went_on(
    tmp_path: Path,
) -> None:
    metrics = "epoch,step,train_loss\n0,1,0.5\n0,2,nan\n0,3,inf\n1,4,0.25\n"
    run = write_run(tmp_path / "run", metrics)
    sessions = [
        {"step": 0, "time": "2026-01-01T00:00:00+00:00"},
        {"step": 2, "time": "2026-01-02T00:00:00+00:00"},
        {"step": 3, "restarts": 1, "job": "7"},
        {"step": "x"},
    ]
    (run / "history.json").write_text(json.dumps(sealed({"sessions": sessions})))
    (figure,) = curves([read_run(run)])
    assert figure["series"][0]["points"] == [
        *[(1, 0.5, 0), (2, None, 0), (3, None, 0), (4, 0.25, 1)]
    ]
    assert (
        "2 of 4 values of train_loss are not finite, the first one at step 2"
        in (figure["lost"])
    )
    assert [(m["x"], m["label"]) for m in figure["marks"]] == [
        (2, "resumed"),
        (3, "queued again"),
    ]
    write_page([run], run, figures=True)


def test_thinned__keeps_extremes_and_changes_no_value() -> None:
    points: list[tuple[int, float | None, int]] = [
        (n, math.sin(n / 500) + (n == 4321) * 9 - (n == 777) * 9, 0)
        for n in range(10_000)
    ]
    points[5000] = (5000, None, 0)
    kept = thinned(points)
    assert len(kept) <= 610
    assert set(kept) <= set(points)
    assert [step for step, _, _ in kept] == sorted(step for step, _, _ in kept)
    for step in (0, 777, 4321, 5000, 9999):
        assert points[step] in kept
    assert thinned(points[:50]) == points[:50]
    lost = [(n, None, 0) for n in range(2000)]
    assert thinned(lost)


# What was found.


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.55, 0.65, "above random initialisation (60.0 and 40.0 %)"),
        (0.55, 0.65, "do not overlap: beyond the draw of test images, it is better"),
        (0.45, 0.75, "The intervals overlap: they do not say which one is better"),
    ],
)
def test_sentences(tmp_path: Path, low: float, high: float, said: str) -> None:
    run = write_run(tmp_path / "run")
    other = row("random initialisation", 0.35, 0.4, 0.45 if low > 0.5 else 0.5)
    write_results(run, row("run", low, 0.6, high), other)
    found = sentences(read_run(run))
    assert said in found[0]
    assert "(this is seed 3)" in found[-1]


def test_sentences__worse(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_results(run, row("r", 0.1, 0.2, 0.3), row("raw pixels", 0.35, 0.4, 0.45))
    assert "20.0 points below raw pixels" in sentences(read_run(run))[0]
    assert sentences(read_run(run))[0].endswith("it is worse.")


def test_classes_and_heat_map(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    selection = [
        {"layer": layer, "pooling": pool, "accuracy": value, "k": 1}
        for layer, pool, value in [(0, "mean", 0.5), (1, "mean", 0.7), (1, "cls", 0.6)]
    ]
    more = {"confusion": [[8, 2], [1, 29]], "selection": selection, "layer": 1}
    write_results(run, row("r", 0.9, 0.92, 0.95, **more), data={"classes": ["a", "b"]})
    (group,) = classes(read_run(run))
    worst, best = group["bars"]["bars"]
    assert (worst["label"], worst["value"], worst["count"]) == ("a", 0.8, 10)
    interval = binomtest(8, 10).proportion_ci(method="wilson")
    assert (worst["low"], worst["high"]) == (interval.low, interval.high)
    assert best["value"] == 29 / 30
    assert group["confused"] == [("a", "b", "2 of 10"), ("b", "a", "1 of 30")]
    heat = heat_map(read_run(run))
    assert heat is not None and heat["layers"] == [0, 1]
    mean, cls = heat["rows"]
    assert {n: c["text"] for n, c in mean["cells"].items()} == {0: "50.0", 1: "70.0"}
    assert [c["chosen"] for c in mean["cells"].values()] == [False, True]
    assert cls["cells"].keys() == {1}
    assert cls["cells"][1]["share"] == pytest.approx(0.5)
    write_page([run], run, figures=True)


# What was run.


def test_facts__what_was_chosen(tmp_path: Path) -> None:
    metrics = "epoch,step,images_per_second\n0,4,20\n1,9,10\n"
    run = read_run(write_run(tmp_path / "run", metrics))
    recipe = {
        name: (value, origin) for name, value, origin in dict(facts(run))["Recipe"]
    }
    assert recipe["epochs"] == ("3", "given")
    assert recipe["lr"] == ("0.001 for 8 images", "chosen by the defaults")
    # 5 steps of 8 images at 20 images/s, then 5 at 10.
    assert training_seconds(run) == pytest.approx(2 + 4)


def test_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run")
    said = dict(commands(read_run(run)))
    assert f"'{run}/config.yaml'" in said["Run it again"]
    assert said["Next, go on where it stopped"].endswith("--resume")
    (run / "finished.json").write_text("{}")
    assert "--data photos" in dict(commands(read_run(run)))["Next, evaluate it"]
    write_results(run, row("r", 0.1, 0.2, 0.3))
    last = dict(commands(read_run(run)))["Next, fine-tune it"]
    assert last.startswith("lightly-mim evaluate --encoder")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.25, "1.2 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3661, "1 h 1 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Several runs.


def test_comparison(tmp_path: Path) -> None:
    runs = []
    for number, (lr, top1) in enumerate([(0.1, 0.5), (0.01, 0.6), (0.001, 0.9)]):
        metrics = f"epoch,step,train_loss\n0,1,{number}.5\n"
        recipe = {"epochs": 3, "batch_size": 8, "lr": lr}
        run = write_run(tmp_path / f"run{number}", metrics, recipe=recipe)
        baselines = [row("raw pixels", 0.2, 0.3, 0.4)]
        baselines.append(row("random initialisation", 0.1, 0.2 + lr, 0.4))
        own = row("r", top1 - 0.08, top1, top1 + 0.08)
        write_results(run, own, *baselines)
        axes = {
            "lr": {
                "place": number,
                "shown": str(lr),
                "paper": ["82.8", "", "x"][number],
            }
        }
        (run / "row.json").write_text(json.dumps({"axes": axes, "row": f"r{number}"}))
        runs.append(read_run(run))
    found = compare_runs([replace(run, row=None) for run in runs])
    assert found["varied"] == ["lr"]
    assert found["scores"] == ["kNN %", "training loss"]
    assert [line["scores"][0]["text"] for line in found["lines"]] == [
        "50.0",
        "60.0",
        "90.0",
    ]
    cells = {line["name"]: line["scores"][0] for line in found["baselines"]}
    pixels, start = cells["raw pixels"], cells["random initialisation"]
    assert (pixels["text"], pixels["beside"]) == ("30.0", "20.0 to 40.0")
    assert (start["text"], start["beside"]) == ("23.7", "mean of 3, 20.1 to 30.0")
    assert "run2 is highest (90.0 %), beyond the draw" in found["says"][0]
    (figure,) = found["multiples"]
    assert [p["x"] for p in figure["points"]] == [0.1, 0.01, 0.001]
    assert [p["y"] for p in figure["points"]] == pytest.approx([50, 60, 90])
    assert figure["log"]
    # As the study tells it.
    found = compare_runs(runs)
    assert [line["paper"] for line in found["lines"]] == ["82.8", "", "x"]
    (figure,) = found["multiples"]
    assert figure["categories"] == ["0.1", "0.01", "0.001"]
    assert [p["x"] for p in figure["points"]] == [0, 1, 2]
    assert figure["points"][0]["text"] == "lr 0.1: 50.0 (42.0 to 58.0); paper: 82.8"
    page = write_page([run.path for run in runs], tmp_path, figures=True)
    assert "82.8" in page.read_text()
    assert (tmp_path / "figures" / "multiple_0.png").exists()


def test_comparison__parts_of_parts_and_a_papers_numbers(tmp_path: Path) -> None:
    runs = []
    for number, ratio in enumerate((0.5, 0.75)):
        masking = {"class_path": "RandomMasking", "init_args": {"ratio": ratio}}
        method = {"class_path": "MAE", "init_args": {"masking": masking}}
        run = write_run(tmp_path / f"run{number}", method=method, seed=number)
        linear = row("r", 0.4, 0.5, 0.6, protocol="linear")
        write_results(run, row("r", 0.5, 0.6, 0.7, protocol="finetune"), linear)
        runs.append(read_run(run))
    found = compare_runs(runs)
    assert found["varied"] == ["masking ratio", "seed"]
    lines = [line["varied"] for line in found["lines"]]
    assert lines == [["0.5", "0"], ["0.75", "1"]]
    assert {figure["x"] for figure in found["multiples"]} == {"masking ratio"}
    entry = {"place": 0, "shown": "half", "paper": "84.9 / 70.0"}
    rows = [{"axes": {"ratio": {**entry, "shown": s}}} for s in ("half", "more")]
    runs = [replace(run, row=row) for run, row in zip(runs, rows, strict=True)]
    tuned, linear = compare_runs(runs)["multiples"]
    assert (tuned["y"], linear["y"]) == ("fine-tuning %", "linear probe %")
    for figure, paper in ((tuned, 84.9), (linear, 70.0)):
        assert [p["y"] for p in figure["points"] if p.get("paper")] == [paper] * 2
        assert "rings the paper's" in figure["says"]


def test_comparison__what_one_method_alone_has_is_left_out(tmp_path: Path) -> None:
    runs = []
    for number, (name, ratio) in enumerate([("SimMIM", 0.6), ("MAE", 0.75)] * 2):
        arguments = {
            "mask_ratio": ratio,
            "depth": 1 + number // 2,
            "width": number // 2,
        }
        arguments |= {"window": 7} if name == "SimMIM" else {"heads": 3}
        method = {"class_path": name, "init_args": arguments}
        run = write_run(tmp_path / f"run{number}", method=method)
        write_results(run, row("r", 0.4, 0.5, 0.6))
        runs.append(read_run(run))
    found = compare_runs(runs)
    assert found["varied"] == ["method", "depth", "mask ratio", "width"]
    # Method and ratio cannot be told apart, nor depth and width.
    assert [figure["x"] for figure in found["multiples"]] == ["method", "depth"]


def test_find_runs__of_a_study(tmp_path: Path) -> None:
    for name in ("tasks/b10/run/MAE-seed0", "tasks/b9/run/MAE-seed0", "c"):
        write_run(tmp_path / name)
    found = find_runs(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        *["c", "tasks/b9/run/MAE-seed0", "tasks/b10/run/MAE-seed0"]
    ]
    assert names_of(found[1:]) == ["b9/run/MAE-seed0", "b10/run/MAE-seed0"]
    assert find_runs(tmp_path / "c") == [tmp_path / "c"]
