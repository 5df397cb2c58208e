from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.data import LightlyDataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder

from lightly_mim.data import sources
from lightly_mim.data.loading import KeyedLoader
from lightly_mim.data.sources import TransformedDataset
from lightly_mim.transforms import EvalTransform, SimMIMTransform

# Two data sets of any kind.
open_data: Callable[..., tuple[Any, Any]] = sources.open_data
_PHOTO = Image.fromarray(load_sample_images().images[0])


def _write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _PHOTO.crop((number, 0, number + 50, 40)).save(root / name)
    return root


class TestOpenData:
    def test_train_and_val(self, tmp_path: Path) -> None:
        root = _write(
            tmp_path, "train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg"
        )
        train, val = open_data(
            root,
            transform=SimMIMTransform(32, normalize=None),
            val_transform=EvalTransform(32),
            in_chans=3,
        )
        assert train.classes == val.classes == ["a", "b"]
        assert train[1][1:] == (1, "b/1.jpg")
        assert train[1][0][0].dtype == torch.uint8
        assert val[1][1:] == (1, "b/3.jpg")
        assert val[1][0].dtype == torch.float32

    @pytest.mark.parametrize(
        ("names", "folder", "classes"),
        [
            (("0.jpg", "1.jpg"), ".", []),
            (("a/0.jpg", "b/1.jpg"), ".", ["a", "b"]),
            (("train/0.jpg", "train/1.jpg"), "train", []),
            (("train/a/0.jpg", ".cache/x.jpg"), "train", ["a"]),
            (("testbed/0.jpg", "bench/1.jpg"), ".", ["bench", "testbed"]),
        ],
    )
    def test_no_val(
        self, tmp_path: Path, names: Any, folder: str, classes: Any
    ) -> None:
        transform = SimMIMTransform(32)
        train, val = open_data(str(_write(tmp_path, *names)), transform=transform)
        assert val is None
        assert train.root == tmp_path / folder
        assert train.classes == classes
        assert train.transform is transform

    def test_val_from_elsewhere(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "x/train/0.jpg", "x/val/1.jpg", "y/2.jpg")
        transform = SimMIMTransform(32)
        train, val = open_data(root / "x", root / "y", transform=transform)
        assert (train.root, val.root) == (root / "x" / "train", root / "y")
        assert val.transform is transform

    @pytest.mark.parametrize(
        "names",
        [
            ("train/0.jpg", "test/1.jpg"),
            ("val/0.jpg",),
            ("train/0.jpg", "a/b.jpg"),
            ("test/0.jpg", "bench/1.jpg"),
        ],
    )
    def test_unclear_split(self, tmp_path: Path, names: Any) -> None:
        with pytest.raises(ValueError, match="Which images of .* are for training"):
            open_data(_write(tmp_path, *names))

    def test_val_that_is_a_whole_set(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "x/train/0.jpg", "x/val/1.jpg")
        with pytest.raises(ValueError, match=r'Give val=".*x/val"'):
            open_data(root / "x" / "train", root / "x")

    @pytest.mark.parametrize("which", ["data", "val"])
    def test_missing(self, tmp_path: Path, which: str) -> None:
        paths = {"data": _write(tmp_path, "0.jpg"), which: tmp_path / "nowhere"}
        with pytest.raises(
            ValueError, match="nowhere does not exist.*imagenette-160, solar-cells"
        ):
            open_data(**paths)
        with pytest.raises(ValueError, match=r"0\.jpg is a file"):
            open_data(**{**paths, which: tmp_path / "0.jpg"})

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize(
        ("val", "targets", "lacking"),
        [(("b", "c"), [1, 2], "a"), (("c",), [2], "a, b"), (("a", "c"), [0, 2], "b")],
    )
    def test_classes_that_val_lacks(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        val: Any,
        targets: Any,
        lacking: str,
        own: bool,
    ) -> None:
        _write(tmp_path, *(f"train/{name}/0.jpg" for name in "abc"))
        _write(tmp_path, *(f"val/{name}/0.jpg" for name in val))
        (tmp_path / "val" / "b").mkdir(exist_ok=True)  # empty, it is no class
        data: Any = tmp_path
        others: Any = None
        if own:
            empty = tmp_path / "val" / "b"
            if not any(empty.iterdir()):
                empty.rmdir()
            data, others = (ImageFolder(tmp_path / name) for name in ("train", "val"))
        first, second = open_data(data, others)
        assert first.classes == second.classes == ["a", "b", "c"]
        assert [second[index][1] for index in range(len(second))] == targets
        assert f"No validation images of {lacking}." in capsys.readouterr().out or own

    @pytest.mark.parametrize("val", ["d", "a b"])
    def test_other_classes(self, tmp_path: Path, val: str) -> None:
        root = _write(tmp_path, "train/a/0.jpg", "train/b/0.jpg", f"val/{val}/0.jpg")
        with pytest.raises(
            ValueError, match=f"Only in training: a, b; only in validation: {val}"
        ):
            open_data(root)
        train, second = open_data(root, labels=False)
        assert (train.classes, second.classes) == (["a", "b"], [val])
        train, flat = open_data(root / "train", _write(tmp_path / "flat", "0.jpg"))
        assert (train.classes, flat.classes) == (["a", "b"], [])

    def test_options_reach_the_files(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "train/0.png", "val/0.png")
        for dataset in open_data(root, in_chans=1, on_error="skip", min_size=(8, 9)):
            assert dataset[0][0].mode == "L"
            assert dataset.on_error == "skip"
            assert dataset.min_size == (8, 9)

    def test_solar_cells(self) -> None:
        transform = SimMIMTransform(32, normalize=None)
        train, val = open_data("solar-cells", transform=transform, in_chans=1)
        assert (len(train), len(val)) == (1968, 656)
        assert train[0][0][0].shape == (1, 32, 32)
        assert open_data("solar-cells", "solar-cells")[1].filenames == val.filenames

    def test_imagenette(self, tmp_path: Path) -> None:
        wnid = "n03425413"
        _write(
            tmp_path / "imagenette2-160",
            f"train/{wnid}/0.JPEG",
            f"train/{wnid}/1.JPEG",
            f"val/{wnid}/2.JPEG",
        )
        train, val = open_data("imagenette-160", data_dir=tmp_path)
        assert (len(train), len(val)) == (2, 1)
        assert train.classes == val.classes == ["gas pump"]
        with pytest.raises(ValueError, match="Cannot read Imagenette"):
            open_data("imagenette", data_dir=tmp_path)

    def test_data_sets(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "a/0.png", "b/1.png")
        transform = SimMIMTransform(32, normalize=None)
        plain = LightlyDataset(str(root))
        views: Any = SimMIMTransform(48)
        own = LightlyDataset(str(root), views)
        train, val = open_data(plain, own, transform=transform)
        assert train[1][0][0].shape == (3, 32, 32)
        assert train[1][1:] == (1, "b/1.png")
        assert val[0][0][0].shape == (3, 48, 48)
        assert plain.transform is None
        assert train.classes == ["a", "b"]
        views, targets, filenames = next(iter(KeyedLoader(train, 2, num_workers=0)))
        assert views[0].shape == (2, 3, 32, 32)
        assert sorted(filenames) == ["a/0.png", "b/1.png"]
        assert sorted(targets.tolist()) == [0, 1]

    @pytest.mark.parametrize("data", [3, iter(()), object(), None, b"x", {1: 2}])
    def test_no_data_set(self, data: Any) -> None:
        with pytest.raises(ValueError, match="__len__ and __getitem__"):
            open_data(data)


class TestTransformedDataset:
    def test_pairs_and_samples(self, tmp_path: Path) -> None:
        folder = ImageFolder(_write(tmp_path, "a/0.png", "b/1.png"))
        dataset = TransformedDataset(folder, SimMIMTransform(32))
        assert dataset.classes == ["a", "b"]
        assert len(dataset) == 2
        sample, target, filename = dataset[1]
        assert sample[0].shape == (3, 32, 32)
        assert (target, filename) == (1, "1")

        class Pixels(Dataset[Any]):
            def __len__(self) -> int:
                return 2

            def __getitem__(self, index: int) -> Tensor:
                return torch.full((3, 40, 40), index, dtype=torch.uint8)

        sample, target, filename = TransformedDataset(
            Pixels(), SimMIMTransform(32, normalize=None)
        )[1]
        assert (sample[0] == 1).all()
        assert (target, filename) == (0, "1")

    def test_own_transform_is_left_alone(self) -> None:
        images = torch.rand(2, 3, 8, 8)
        pairs = TensorDataset(images, torch.tensor([4, 5]))
        sample, target, _ = TransformedDataset(pairs, SimMIMTransform(32))[1]
        assert torch.equal(sample, images[1])
        assert target == 5
        assert TransformedDataset(pairs, None).classes == []
