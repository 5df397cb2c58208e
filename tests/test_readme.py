"""Every code block of the README and of the pages that it leads to runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from lightly_mim.cli import main

from .checkpoints import official
from .test_conversion import Benchmark

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("lightly_mim/*/README.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "slurm" / "README.md",
]

# A day's work as it stands in the README, an instant's here.
SHORTENED = [
    (r"epochs=\d+", "epochs=1"),
    (r"--epochs \d+", "--epochs 1"),
    (r"batch_size=\d+", "batch_size=4"),
    (r"--batch_size \d+", "--batch_size 4"),
    (r"vit_small_patch16_224", "vit_tiny_patch16_224"),
    (r"\(2, 384\)", "(2, 192)"),
    (r"(--out runs/a1 .*)", r"\1 --epochs 1"),
    (r"--minutes \d+", "--minutes 0.01"),
]


def shortened(source: str) -> str:
    for pattern, replacement in SHORTENED:
        source = re.sub(pattern, replacement, source)
    return source


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    found = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
    return [code for name, code in found if name == language]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Where a reader stands: images in photos/, an empty runs/."""
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("mae_visualize_vit_base.pth", "mae_pretrain_vit_base_full.pth"):
        torch.save({"model": official.mae()}, tmp_path / name)
    torch.save({"state_dict": Benchmark().state_dict()}, tmp_path / "lightly_mae.ckpt")
    deit = timm.create_model("deit3_small_patch16_224", depth=1)
    torch.save(deit.state_dict(), tmp_path / "deit3_small.pth")
    torch.save({"model": official.swin()}, tmp_path / "simmim_pretrain__swin_base.pth")
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    small |= {"intermediate_size": 64}
    small |= {f"decoder_{name}": value for name, value in small.items()}
    vit_mae = ViTMAEForPreTraining(ViTMAEConfig(image_size=64, **small))
    vit_mae.save_pretrained(tmp_path / "vit-mae-base")
    [site] = blocks("yaml")
    (tmp_path / "site.yaml").write_text(site)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str, folder: Path) -> None:
    run([sys.executable, "-c", shortened(code)], folder)


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for line in code.splitlines():
        planned_only = line.startswith("python slurm/submit.py")
        words = shlex.split(line if planned_only else shortened(line), comments=True)
        if not words:
            continue
        if words[0] == "make":
            # `make check` runs these for real, the main job in its shortest setting.
            planned = run([*words, "--dry-run", "-C", str(ROOT)], folder)
            assert "benchmarks/solar_cells.py" in planned or "pytest" in planned
        elif words[:2] == ["python", "benchmarks/solar_cells.py"]:
            help_text = run([*words[:1], str(ROOT / words[1]), "--help"], folder)
            for word in words[2:]:
                if word.startswith("--"):
                    assert word in help_text
        elif planned_only:
            split = words.index("--")
            words[split:split] = ["--dry-run"]
            planned = run([words[0], str(ROOT / words[1]), *words[2:]], folder)
            assert "sbatch" in planned.lower() or "local" in words
        else:
            assert words[0] == "lightly-mim", f"no test runs {line!r}"
            with warnings.catch_warnings():  # a warning is no error here
                warnings.simplefilter("default")
                main(words[1:])  # in this process: PyTorch is imported once


def test_there_are_blocks() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks("bash")) >= 3
    for page in PAGES:
        languages = {name for name, _ in BLOCK.findall(page.read_text())}
        assert languages <= {"python", "bash", "text", "yaml"}, page


def test_every_page_is_reached_from_the_readme() -> None:
    front, *rest = PAGES
    for page in rest:
        assert f"({page.relative_to(ROOT)})" in front.read_text()


def test_the_readme_is_a_front_page() -> None:
    assert len(PAGES[0].read_text().splitlines()) < 250


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_page(page: Path) -> None:
    text = page.read_text()
    assert "@@" not in text  # nothing is left to fill in
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            led_to = page if not file else page.parent / file
            assert led_to.exists(), target
            assert not anchor or anchor in anchors(led_to), target
