from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import elpv_dataset.utils
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import datasets as torchvision_datasets

from lightly_mim.data.named import NAMED_DATA, imagenette, open_named, solar_cells

_PHOTO = Image.fromarray(load_sample_images().images[0])
_WNIDS = ["n01440764", "n02102040", "n03888257"]


@pytest.fixture(scope="module")
def cells() -> dict[str, tuple[float, str]]:
    root = Path(elpv_dataset.__file__).parent / "data"
    table = np.genfromtxt(root / "labels.csv", dtype=None, encoding="utf-8")
    return {str(row[0]): (float(row[1]), str(row[2])) for row in table}


class TestSolarCells:
    def test_split__sizes_and_strata(self, cells: dict[str, tuple[float, str]]) -> None:
        train, val = solar_cells("train"), solar_cells("val")
        assert (len(train), len(val)) == (1968, 656)
        assert set(train.filenames) | set(val.filenames) == set(cells)
        assert not set(train.filenames) & set(val.filenames)
        for stratum in set(cells.values()):
            whole = [name for name in cells if cells[name] == stratum]
            part = [name for name in val.filenames if cells[name] == stratum]
            assert abs(len(part) - len(whole) / 4) < 1

    def test_split__never_changes(self) -> None:
        # Published numbers depend on it.
        names = "\n".join(solar_cells("val").filenames)
        assert hashlib.sha256(names.encode()).hexdigest()[:16] == "07d36c90b2277128"

    def test_labels(self, cells: dict[str, tuple[float, str]]) -> None:
        for split in ("train", "val"):
            dataset = solar_cells(split)
            for name, target in zip(dataset.filenames, dataset.targets, strict=True):
                probability, kind = cells[name]
                condition = "defective" if probability >= 0.5 else "functional"
                assert dataset.classes[target] == f"{kind} {condition}"

    def test_images__as_the_package_gives_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Its load_dataset decodes all images: let it read a shorter table.
        dataset = solar_cells("train")
        lines = (dataset.root / "labels.csv").read_text().splitlines(keepends=True)
        chosen = [line for line in lines if line.split()[0] in dataset.filenames[:4]]
        (tmp_path / "labels.csv").write_text("".join(chosen))
        (tmp_path / "images").symlink_to(dataset.root / "images")
        images, probabilities, kinds = elpv_dataset.utils.load_dataset(
            str(tmp_path / "labels.csv")
        )
        for index in range(4):
            sample, target, _ = dataset[index]
            assert (np.asarray(sample) == images[index]).all()
            assert dataset.classes[target].startswith(kinds[index])
            assert ("defective" in dataset.classes[target]) == (
                probabilities[index] >= 0.5
            )

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match=r"pip install 'lightly-mim\[benchmarks\]'"
        ):
            solar_cells()


def _write_tree(root: Path) -> Path:
    """Writes a small tree of Imagenette's layout."""
    for split, count in (("train", 3), ("val", 2)):
        for number, wnid in enumerate(_WNIDS):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                left = 40 * number + 10 * index
                picture = _PHOTO.crop((left, 0, left + 64, 48))
                picture.save(folder / f"{wnid}_{index}.JPEG")
    return root


class TestImagenette:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_as_torchvision(self, tmp_path: Path, split: Any) -> None:
        _write_tree(tmp_path / "imagenette2-160")
        ours: Any = imagenette(split, size="160px", data_dir=tmp_path)
        theirs: Any = torchvision_datasets.Imagenette(tmp_path, split, size="160px")
        assert ours.classes == [names[0] for names in theirs.classes]
        assert len(ours) == len(theirs)
        for (sample, target, filename), (image, label) in zip(
            ours, theirs, strict=True
        ):
            assert (np.asarray(sample) == np.asarray(image)).all()
            assert target == label
            assert filename.startswith(_WNIDS[label])

    def test_the_tree_itself(self, tmp_path: Path) -> None:
        dataset = imagenette("val", size="full", data_dir=_write_tree(tmp_path / "x"))
        assert len(dataset) == 6

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="it is not there") as caught:
            imagenette(size="320px", data_dir=tmp_path)
        for part in (
            "imagenette2-320.tgz",
            "--data-dir",
            "--download",
            "solar_cells.py",
        ):
            assert part in str(caught.value)

    def test_download__without_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise URLError("no network")

        monkeypatch.setattr(
            torchvision_datasets.imagenette, "download_and_extract_archive", fail
        )
        with pytest.raises(ValueError, match=r"download failed .*no network"):
            imagenette(size="160px", data_dir=tmp_path / "new", download=True)
        assert list((tmp_path / "new").iterdir()) == []

    def test_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def fetch(url: str, root: Path, md5: str) -> None:
            calls.append(url)
            _write_tree(Path(root) / "imagenette2-160")

        monkeypatch.setattr(
            torchvision_datasets.imagenette, "download_and_extract_archive", fetch
        )
        for _ in range(2):
            dataset = imagenette(size="160px", data_dir=tmp_path, download=True)
            assert len(dataset) == 9
        assert len(calls) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["imagenette2-160"]

    def test_download__another_process_was_faster(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(url: str, root: Path, md5: str) -> None:
            _write_tree(Path(root) / "imagenette2-160")
            _write_tree(tmp_path / "imagenette2-160")

        monkeypatch.setattr(
            torchvision_datasets.imagenette, "download_and_extract_archive", fetch
        )
        assert len(imagenette(size="160px", data_dir=tmp_path, download=True)) == 9

    def test_size(self) -> None:
        size: Any = "64px"
        with pytest.raises(ValueError, match="'320px', '160px', got size='64px'"):
            imagenette(size=size)


class TestOpenNamed:
    @pytest.mark.parametrize("name", NAMED_DATA[:3])
    def test_imagenette(self, tmp_path: Path, name: str) -> None:
        folder = name.replace("imagenette", "imagenette2")
        _write_tree(tmp_path / folder)
        dataset = open_named(name, "val", data_dir=tmp_path, in_chans=1)
        assert dataset.root == tmp_path / folder / "val"
        assert dataset[0][0].mode == "L"

    def test_solar_cells(self) -> None:
        assert len(open_named("solar-cells", "val", in_chans=3)) == 656

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="'cifar10'.*imagenette-160, solar-cells"):
            open_named("cifar10", "train")
