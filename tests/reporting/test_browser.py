"""The page in a real browser: nothing is asked of a network, and all of it works."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightly_mim.report import report

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1200, 900), (390, 844)


@contextmanager
def opened(
    browser: Any, page: Path, size: tuple[int, int], scheme: str = "light"
) -> Iterator[Any]:
    """Opens a page, and fails for errors and for requests to any network."""
    options = {"viewport": {"width": size[0], "height": size[1]}}
    context = browser.new_context(**options, color_scheme=scheme)
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.absolute().as_uri())
    # wait_for_function() polls by eval(), which the page's policy forbids.
    tab.locator(".chart:not(:has(svg))").first.wait_for(state="detached")
    yield tab
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file")]) == 1
    context.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page__fits_the_screen(
    browser: Any, real_run: Path, size: tuple[int, int], scheme: str
) -> None:
    with opened(browser, real_run / "report.html", size, scheme) as tab:
        wide = "[document.documentElement.scrollWidth, window.innerWidth]"
        scrolled, width = tab.evaluate(wide)
        assert scrolled <= width
        headings = tab.locator("h2").all_text_contents()
        assert headings == ["Results", "Pictures", "Features", "Curves", "What was run"]
        # Every chart was drawn, and the text of none of them is cut off at the side.
        charts = tab.locator(".chart[data-figure]")
        assert charts.count() >= 7
        for number in range(charts.count()):
            assert charts.nth(number).locator("path").count() > 0
        background = "getComputedStyle(document.body).backgroundColor"
        channel = int(tab.evaluate(background).split("(")[1].split(",")[0])
        assert (channel < 60) == (scheme == "dark")


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__theme(browser: Any, real_run: Path, size: tuple[int, int]) -> None:
    with opened(browser, real_run / "report.html", size) as tab:
        background = "getComputedStyle(document.body).backgroundColor"
        before = tab.evaluate(background)
        tab.locator("#theme").click()
        assert tab.evaluate(background) != before
        tab.locator("#theme").click()
        assert tab.evaluate(background) == before


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__hover_tells_the_values_of_the_file(
    browser: Any, real_run: Path, size: tuple[int, int]
) -> None:
    text = (real_run / "metrics.csv").read_text()
    rows = [r for r in csv.DictReader(text.splitlines()) if r["train_loss_step"]]
    losses = {int(r["step"]): float(r["train_loss_step"]) for r in rows}
    with opened(browser, real_run / "report.html", size) as tab:
        chart = tab.locator('.chart[data-figure="loss"]')
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        seen = set()
        for share in (0.3, 0.6, 0.9):
            tab.mouse.move(box["x"] + share * box["width"], box["y"] + 80)
            tip = chart.locator(".tip")
            assert tip.is_visible()
            lines = tip.locator("div").all_text_contents()
            step = int(tip.locator("b").text_content().split()[1].rstrip(","))
            (line,) = (each for each in lines if each.startswith("training, one batch"))
            if "(step" not in line:
                value = float(line.rpartition(" ")[2])
                assert value == pytest.approx(losses[step], rel=1e-5)
                seen.add(step)
        assert seen
        chart.focus()
        before = chart.get_attribute("data-step")
        tab.keyboard.press("ArrowLeft")
        assert int(chart.get_attribute("data-step")) < int(before)
        tab.mouse.move(0, 0)
        assert not tip.is_visible()


def test_page__legend_and_log_scale(browser: Any, real_run: Path) -> None:
    with opened(browser, real_run / "report.html", DESKTOP) as tab:
        figure = tab.locator("figure", has=tab.locator('[data-figure="loss"]'))
        assert figure.locator("path:not(.lost)").count() == 3
        figure.locator(".legend button", has_text="validation").click()
        assert figure.locator("path:not(.lost)").count() == 2
        before = figure.locator("path.line").get_attribute("d")
        figure.locator("button.log").click()
        assert figure.locator("path.line").get_attribute("d") != before


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__slider_and_all_images(
    browser: Any, real_run: Path, size: tuple[int, int]
) -> None:
    picture = "getComputedStyle(document.querySelector('.frame')).backgroundImage"
    with opened(browser, real_run / "report.html", size) as tab:
        slider = tab.locator(".slider input")
        assert tab.locator(".slider output").text_content() == "epoch 3"
        last = tab.evaluate(picture)
        slider.focus()
        tab.keyboard.press("Home")
        assert tab.locator(".slider output").text_content() == "epoch 1"
        assert "epoch 1 of 3" in tab.locator("#frames-0-title").text_content()
        first = tab.evaluate(picture)
        assert first != last
        assert first.startswith('url("data:image/webp;base64,')
        shown = "[...document.querySelectorAll('.frame')].filter(c => c.offsetParent)"
        assert tab.evaluate(f"{shown}.length") == 16
        tab.locator("[data-unfold]").click()
        assert tab.evaluate(f"{shown}.length") == 32


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__similar_patches(
    browser: Any, real_run: Path, size: tuple[int, int]
) -> None:
    pixels = """() => [...document.querySelector('[data-similar="0"] canvas')
        .getContext('2d').getImageData(0, 0, 4, 4).data]"""
    with opened(browser, real_run / "report.html", size) as tab:
        cell = tab.locator('[data-image="0"]')
        cell.scroll_into_view_if_needed()
        assert cell.get_attribute("data-patch") == "10"  # the middle of 4 x 4
        box = cell.bounding_box()
        # The first patch of the second row.
        cell.click(position={"x": box["width"] * 0.1, "y": box["height"] * 0.4})
        assert cell.get_attribute("data-patch") == "4"
        after = tab.evaluate(pixels)
        assert after[40:43] != [253, 231, 37]
        assert after[16:19] == [253, 231, 37]  # a patch is most similar to itself
        cell.press("ArrowRight")
        assert cell.get_attribute("data-patch") == "5"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__map(browser: Any, real_run: Path, size: tuple[int, int]) -> None:
    found = json.loads((real_run / "gallery" / "gallery.json").read_text())
    with opened(browser, real_run / "report.html", size) as tab:
        host = tab.locator("[data-map]")
        host.scroll_into_view_if_needed()
        box = host.locator("svg").bounding_box()
        place = found["map"]
        x = box["x"] + box["width"] * (30 + 740 * place["x"][3]) / 800
        y = box["y"] + box["height"] * (30 + 540 * (1 - place["y"][3])) / 600
        tab.mouse.move(x, y)
        tip = host.locator(".tip")
        assert tip.is_visible()
        assert tip.locator(".soft").text_content() == found["files"][3]
        label = found["classes"][found["labels"][3]]
        assert tip.locator("b").text_content() == label


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__sort(browser: Any, real_run: Path, size: tuple[int, int]) -> None:
    results = json.loads((real_run / "results.json").read_text())["rows"]
    shown = [f"{100 * row['top1']:.1f}" for row in results]
    with opened(browser, real_run / "report.html", size) as tab:
        table = tab.locator("#results table.sort").first
        column = table.locator("tbody td:nth-child(3)")
        assert column.all_text_contents() == shown
        head = table.locator("th", has_text="top-1 %")
        head.click()
        assert column.all_text_contents() == sorted(shown, key=float)
        head.click()
        assert column.all_text_contents() == sorted(shown, key=float, reverse=True)
        head.press("Enter")
        assert column.all_text_contents() == sorted(shown, key=float)


def test_page__copy(browser: Any, real_run: Path) -> None:
    with opened(browser, real_run / "report.html", DESKTOP) as tab:
        button = tab.locator("[data-copy]").first
        button.click()
        tab.get_by_text(re.compile("^(copied|marked)$")).wait_for()


def test_page__prints(browser: Any, real_run: Path, tmp_path: Path) -> None:
    with opened(browser, real_run / "report.html", DESKTOP, "dark") as tab:
        tab.emulate_media(media="print")
        assert not tab.locator("nav").is_visible()
        shown = "[...document.querySelectorAll('.frame')].filter(c => c.offsetParent)"
        assert tab.evaluate(f"{shown}.length") == 32
        assert tab.pdf().startswith(b"%PDF")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a run directory of a stranger, which tries to run code on the page."""
    evil = "</script><img src=x onerror=\"document.title='run'\"><script>"

    def write(**files: str) -> Path:
        out = tmp_path_factory.mktemp("hostile") / "ünïcode 名前 <b>run"
        out.mkdir()
        config = {
            "out": evil,
            "data": evil,
            "method": {"class_path": "os.system", "init_args": {"command": evil}},
            "recipe": {"source": evil, "epochs": 3, "batch_size": 8},
        }
        row = {
            "model": evil,
            "protocol": evil,
            "top1": 0.5,
            "top1_low": 0.4,
            "top1_high": 0.6,
            "confusion": [[3, 1], [0, 4]],
            "hyperparameters": {evil: evil},
            "selection": [
                {"layer": n, "pooling": evil, "accuracy": 0.5 + n / 10} for n in (0, 1)
            ],
        }
        results = {"rows": [row], "notes": [evil], "data": {"classes": [evil, "b"]}}
        (out / "config.yaml").write_text(json.dumps(config))
        (out / "results.json").write_text(json.dumps({**results, "command": evil}))
        lines = ["epoch,step,train_loss," + evil.replace(",", " ").replace('"', "")]
        lines += [f"0,{n},{'nan' if n == 5 else 1 / (n + 1)},1" for n in range(10_000)]
        (out / "metrics.csv").write_text("\n".join(lines))
        for name, text in files.items():
            (out / name).write_text(text)
        return out

    return write


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__of_a_stranger(
    browser: Any, hostile: Callable[..., Path], size: tuple[int, int]
) -> None:
    out = hostile()
    page = report(out, features=False)
    with opened(browser, page, size) as tab:
        assert tab.title() == "ünïcode 名前 <b>run"
        assert tab.locator("img").count() == 0
        assert tab.locator("script").count() == 2
        said = tab.locator("#run").text_content()
        assert "</script><img src=x onerror=" in said
        chart = tab.locator('.chart[data-figure="loss"]')
        assert chart.locator("path.lost").count() == 1
        drawn = chart.locator("path.line").get_attribute("d")
        assert 100 < len(drawn.split("L")) < 1000
        figure = tab.locator("figure", has=chart)
        assert "1 of 10000 values of train_loss are not finite" in (
            figure.text_content()
        )


def test_page__of_several_runs(browser: Any, real_run: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for number, run in enumerate(runs):
        shutil.copytree(real_run, run)
        text = (run / "config.yaml").read_text()
        text = text.partition("\n")[2]  # its checksum
        config = yaml.safe_load(text)
        config["recipe"]["lr"] = 10.0 ** -(number + 1)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = report(runs, out=tmp_path / "out", title="Three & more")
    with opened(browser, page, PHONE) as tab:
        wide = "document.documentElement.scrollWidth - window.innerWidth"
        assert tab.evaluate(wide) <= 0
        heads = tab.locator("#study th").all_text_contents()
        assert heads[:2] == ["run", "lr"]
        rates = tab.locator("#study tbody:nth-of-type(1) td:nth-child(2)")
        assert rates.all_text_contents() == ["0.1", "0.01", "0.001"]
        tab.locator("#study th").nth(1).click()
        assert rates.all_text_contents() == ["0.001", "0.01", "0.1"]
        loss = tab.locator("figure", has=tab.locator('[data-figure="loss"]'))
        assert loss.locator(".legend button").count() == 9
        assert tab.locator('[data-figure="multiple_0"] circle').count() == 3
        tab.locator('[data-figure="multiple_0"] circle').first.hover()
        assert "lr 0." in tab.locator('[data-figure="multiple_0"] .tip').text_content()


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_page__of_a_study(browser: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    """Names beside their dots, a paper's numbers as rings, marks where runs went on."""
    shown = ["a quarter of all the patches of an image", "half", "three quarters"]
    for number, text in enumerate(shown):
        run = tmp_path / f"run{number}"
        run.mkdir()
        (run / "config.yaml").write_text(f"seed: {number}\n")
        (run / "metrics.csv").write_text("epoch,step,train_loss\n0,1,2\n1,9,1\n")
        sessions = [{"step": 0}, {"step": 4, "time": "2026-01-02"}]
        (run / "history.json").write_text(json.dumps({"sessions": sessions}))
        ends = {"top1_low": 0.4, "top1": 0.5 + number / 10, "top1_high": 0.8}
        rows = [{"model": "r", "protocol": "linear", **ends}]
        (run / "results.json").write_text(json.dumps({"rows": rows}))
        axis = {"place": 2 - number, "shown": text, "paper": "84.0 / 65.5"}
        (run / "row.json").write_text(json.dumps({"axes": {"ratio": axis}}))
    page = report(tmp_path, features=False)
    with opened(browser, page, size) as tab:
        wide = "document.documentElement.scrollWidth - window.innerWidth"
        assert tab.evaluate(wide) <= 0
        figure = tab.locator('[data-figure="multiple_0"]')
        names = figure.locator("text", has=tab.locator("title")).all_text_contents()
        assert names[0].startswith("three quarters") and names[1].startswith("half")
        assert names[2].startswith("a quarter")
        assert figure.locator("circle").count() == 3 + 3
        # All of it is within the picture.
        box = figure.bounding_box()
        for dot in figure.locator("circle").all():
            place = dot.bounding_box()
            assert box["x"] <= place["x"] <= box["x"] + box["width"]
        figure.locator("circle").first.hover()
        assert "paper: 84.0 / 65.5" in figure.locator(".tip").text_content()
        loss = tab.locator('.chart[data-figure="loss"]')
        assert loss.locator("line.mark").count() == 3
        papers = tab.locator("#study tbody tr").first.text_content()
        assert "84.0 / 65.5" in papers


@pytest.mark.slow
def test_page__of_the_main_job(browser: Any, tmp_path: Path) -> None:
    """The solar cells' run, as the README has it."""
    script = Path(__file__).parents[2] / "benchmarks" / "solar_cells.py"
    words = [
        str(script),
        "--quick",
        "--num-workers",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run([sys.executable, *words], check=True, cwd=tmp_path)
    (run,) = (tmp_path / "out").glob("SimMIM-seed0")
    page = report(run)
    assert page.stat().st_size < 10_000_000
    results = json.loads((run / "results.json").read_text())["rows"]
    for size in (DESKTOP, PHONE):
        with opened(browser, page, size) as tab:
            shown = tab.locator("#results table.sort tbody tr").all_text_contents()
            for row, text in zip(results, shown, strict=True):
                assert f"{100 * row['top1']:.1f}" in text
            assert tab.locator("[data-map] circle").count() == 300
            assert not math.isnan(tab.evaluate("document.body.scrollHeight"))
