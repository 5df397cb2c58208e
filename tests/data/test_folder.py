from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.datasets import ImageFolder

from lightly_mim.data import BrokenImageError
from lightly_mim.data.folder import ImageDataset
from lightly_mim.data.seeding import keyed_random_state
from lightly_mim.transforms import SimMIMTransform

_PHOTO = Image.fromarray(load_sample_images().images[1])  # 640 x 427


def _write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".png", ".jpeg"):
            box = (number, 0, number + 60, 40)
            _PHOTO.crop(box).save(path, quality=95)
        else:
            path.write_text("not an image")
    return root


class TestImageDataset:
    def test_class_folders__as_torchvision_and_lightly(self, tmp_path: Path) -> None:
        root = _write(
            tmp_path, "b/1.jpg", "b/0.PNG", "a/x/2.jpg", "a/10.jpg", "a/9.JPEG"
        )
        dataset: Any = ImageDataset(root)
        torchvision_dataset = ImageFolder(root)
        lightly_dataset: Any = LightlyDataset(str(root))
        assert dataset.classes == torchvision_dataset.classes
        ours = dict(zip(dataset.paths, dataset.targets, strict=True))
        theirs = {Path(path): target for path, target in torchvision_dataset.samples}
        assert ours == theirs
        expected = {filename: (s, t) for s, t, filename in lightly_dataset}
        for index, (sample, target, filename) in enumerate(dataset):
            assert expected[filename][1] == target == dataset.targets[index]
            assert np.array_equal(sample, expected[filename][0])
        assert dataset.filenames == [
            "a/10.jpg",
            "a/9.JPEG",
            "a/x/2.jpg",
            "b/0.PNG",
            "b/1.jpg",
        ]

    def test_flat(self, tmp_path: Path) -> None:
        dataset: Any = ImageDataset(_write(tmp_path, "1.jpg", "0.jpg", "notes.txt"))
        assert dataset.filenames == ["0.jpg", "1.jpg"]
        assert dataset.targets == [0, 0]
        assert dataset.classes == []
        assert [filename for _, _, filename in dataset] == ["0.jpg", "1.jpg"]

    def test_images_in_the_root_and_below__no_classes(self, tmp_path: Path) -> None:
        dataset = ImageDataset(_write(tmp_path, "2024/1.jpg", "2025/1.jpg", "0.jpg"))
        assert dataset.filenames == ["0.jpg", "2024/1.jpg", "2025/1.jpg"]
        assert dataset.classes == []
        assert dataset.targets == [0, 0, 0]

    def test_hidden_files_and_links(self, tmp_path: Path) -> None:
        _write(tmp_path / "elsewhere", "1.jpg")
        root = _write(
            tmp_path / "root", "a/0.jpg", "a/._0.jpg", ".git/x.jpg", "a/.t/x.jpg"
        )
        (root / "b").symlink_to(tmp_path / "elsewhere")
        (root / "b" / "loop").symlink_to(root)
        (root / "a" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
        (root / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
        dataset = ImageDataset(root)
        assert dataset.filenames == ["a/0.jpg", "a/2.jpg", "a/gone.jpg", "b/1.jpg"]
        with pytest.raises(BrokenImageError, match=r"gone\.jpg"):
            dataset[2]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ((), "there are no files"),
            ((".hidden.jpg",), "there are no files"),
            (
                ("a.txt", "b.txt", "c/d", "e.psd"),
                r"\.jpg, \.jpeg, .*found 4 other files \(2 x \.txt, 1 x no ending",
            ),
        ],
    )
    def test_no_images(self, tmp_path: Path, names: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"No images in .*{message}"):
            ImageDataset(_write(tmp_path, *names))

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere does not exist"):
            ImageDataset(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"0\.jpg is a file"):
            ImageDataset(_write(tmp_path, "0.jpg") / "0.jpg")

    @pytest.mark.parametrize(
        "arguments", [{"on_error": "ignore"}, {"in_chans": 0}, {"min_size": (0, 3)}]
    )
    def test_refuses(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            ImageDataset(_write(tmp_path, "0.jpg"), **arguments)

    def test_min_size(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "0.png")
        assert ImageDataset(root, min_size=(40, 60))[0][0].size == (60, 40)
        Image.new("RGB", (1, 1)).save(root / "1.png")
        with pytest.raises(
            BrokenImageError, match=r"1\.png is too small: 1 x 1 .*32 x 32 are needed"
        ):
            ImageDataset(root, min_size=32)[1]
        assert ImageDataset(root)[1][0].size == (1, 1)

    def test_skip__is_a_keyed_draw(self, tmp_path: Path) -> None:
        root = _write(tmp_path, *(f"{i % 2}/{i}.jpg" for i in range(12)))
        (root / "0" / "2.jpg").write_bytes(b"")
        with pytest.raises(BrokenImageError, match=r"2\.jpg: it is empty"):
            ImageDataset(root)[2]
        dataset = ImageDataset(root, on_error="skip")
        broken = dataset.filenames.index("0/2.jpg")

        def read(epoch: int) -> str:
            with keyed_random_state(0, epoch, broken):
                sample, target, filename = dataset[broken]
            index = dataset.filenames.index(filename)
            assert target == dataset.targets[index]
            assert sample.tobytes() == dataset[index][0].tobytes()
            return filename

        drawn = [read(epoch) for epoch in range(20)]
        assert drawn == [read(epoch) for epoch in range(20)]
        assert "0/2.jpg" not in drawn
        assert len(set(drawn)) > 5

    def test_skip__everything_broken(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "0.jpg", "1.jpg")
        for path in root.iterdir():
            path.write_bytes(b"")
        with pytest.raises(
            BrokenImageError, match=r"drawn from the 2 of .*\.jpg: it is empty"
        ):
            ImageDataset(root, on_error="skip")[0]

    def test_in_memory__decodes_once(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "0.png", "1.png")
        dataset = ImageDataset(root, SimMIMTransform(32), in_memory=True)
        with keyed_random_state(0):
            before = dataset[0][0][0]
        (root / "0.png").unlink()
        with keyed_random_state(0):
            assert torch.equal(dataset[0][0][0], before)
        with pytest.raises(BrokenImageError, match=r"0\.png"):
            pickle.loads(pickle.dumps(dataset))[0]

    def test_channels(self, tmp_path: Path) -> None:
        root = _write(tmp_path, "a/0.png")
        np.save(root / "a" / "1.npy", np.zeros((5, 8, 9), np.uint8))
        assert ImageDataset(root).filenames == ["a/0.png"]
        assert ImageDataset(root, in_chans=1)[0][0].mode == "L"
        sample, target, filename = ImageDataset(root, in_chans=5)[0]
        assert sample.shape == (5, 8, 9)
        assert (target, filename) == (0, "a/1.npy")
        with pytest.raises(ValueError, match=r"No images .*\.npy are looked for"):
            (root / "a" / "1.npy").unlink()
            ImageDataset(root, in_chans=5)

    def test_decode_size_of_the_transform_is_used(self, tmp_path: Path) -> None:
        _PHOTO.resize((2560, 1708)).save(tmp_path / "0.jpg")
        seen = []

        class Transform(SimMIMTransform):
            def __call__(self, image: Any) -> list[Tensor]:
                seen.append(image.size)
                return super().__call__(image)

        ImageDataset(tmp_path, Transform(96))[0]
        ImageDataset(tmp_path, Transform(96), in_memory=True)[0]
        assert seen == [(640, 427), (2560, 1708)]
