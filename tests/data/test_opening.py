from __future__ import annotations

import errno
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_mim.data import BrokenImageError, opening
from lightly_mim.data.decode import decode_image
from lightly_mim.data.folder import ImageDataset, ReplacementName
from lightly_mim.data.segmentation import check_masks, find_masked, read_mask


def _grey(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), 100).save(path)
    return path


class TestRegularFiles:
    @pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.npy"])
    @pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
    def test_others_are_refused_at_once(
        self, tmp_path: Path, name: str, kind: str
    ) -> None:
        path = tmp_path / name
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(path))
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        with pytest.raises(BrokenImageError, match=f"{name}: it is a {kind}"):
            decode_image(path, 5 if name == "x.npy" else 3)
        with pytest.raises(BrokenImageError, match=f"the mask .*it is a {kind}"):
            read_mask(path)

    def test_masks_and_images_of_segmentation(self, tmp_path: Path) -> None:
        _grey(tmp_path / "images" / "0.png")
        _grey(tmp_path / "masks" / "0.png")
        files = find_masked(tmp_path)
        for folder in ("images", "masks"):
            (tmp_path / folder / "0.png").unlink()
            os.mkfifo(tmp_path / folder / "0.png")
            with pytest.raises(BrokenImageError, match="it is a FIFO"):
                check_masks(files)
            (tmp_path / folder / "0.png").unlink()
            _grey(tmp_path / folder / "0.png")

    def test_masks__only_png(self, tmp_path: Path) -> None:
        Image.new("L", (16, 16)).save(tmp_path / "x.png", "BMP")
        with pytest.raises(BrokenImageError, match="cannot identify its format"):
            read_mask(tmp_path / "x.png")


class TestLimits:
    @pytest.mark.parametrize("shape", [(5, 2**20, 2**20), (5, 2**40, 2**40), (5, 9, 9)])
    def test_array_that_claims_more_than_its_file(
        self, tmp_path: Path, shape: tuple[int, ...]
    ) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(300))
        with pytest.raises(BrokenImageError, match=r"x\.npy"):
            decode_image(tmp_path / "x.npy", 5)

    def test_array_beyond_the_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        np.save(tmp_path / "x.npy", np.zeros((5, 20, 20), np.uint8))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
        with pytest.raises(BrokenImageError, match="400 pixels, the limit is 398"):
            decode_image(tmp_path / "x.npy", 5)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        image: Any = decode_image(tmp_path / "x.npy", 5)
        assert image.shape == (5, 20, 20)

    @pytest.mark.parametrize("name", ["x.bmp", "x.png", "x.tif", "x.pgm", "x.jpg"])
    def test_picture_that_claims_more_than_its_file(
        self, tmp_path: Path, name: str
    ) -> None:
        Image.new("L", (12000, 12000)).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        if name == "x.tif":  # its header is at the end or the start
            content = content[:4000] + content[-4000:]
        (tmp_path / name).write_bytes(content[:9000])
        with pytest.raises(BrokenImageError, match=rf"{name}.*(claims|damaged|identi)"):
            decode_image(tmp_path / name)

    def test_memory_error_is_that_of_the_picture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(3):
            _grey(tmp_path / f"{number}.png")

        def load(image: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
            with pytest.raises(BrokenImageError, match=r"0\.png: there is not enough"):
                decode_image(tmp_path / "0.png")

        class Transform:
            fails = True

            def __call__(self, image: Any) -> Any:
                fails, self.fails = self.fails, False
                return torch.empty(2**60) if fails else image

        with pytest.raises(BrokenImageError, match=r"not enough memory .*1\.png"):
            ImageDataset(tmp_path, Transform())[1]
        _, _, name = ImageDataset(tmp_path, Transform(), on_error="skip")[1]
        assert isinstance(name, ReplacementName)

    def test_other_errors_of_a_transform_are_its_own(self, tmp_path: Path) -> None:
        _grey(tmp_path / "0.png")
        with pytest.raises(ZeroDivisionError):
            ImageDataset(tmp_path, lambda image: 1 / 0, on_error="skip")[0]


class TestPassingErrors:
    @pytest.fixture(autouse=True)
    def pauses(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        return pauses

    @staticmethod
    def _failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
        whole, left = Path.open, [times]

        def open_file(path: Path, *arguments: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return whole(path, *arguments)

        monkeypatch.setattr(Path, "open", open_file)

    @pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ESTALE", "EIO", "ETIMEDOUT"])
    def test_are_tried_again(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        name: str,
    ) -> None:
        _grey(tmp_path / "x.png")
        number = getattr(errno, name)
        self._failing(monkeypatch, number, 3)
        assert decode_image(tmp_path / "x.png").size == (16, 16)
        assert pauses == list(opening._PAUSES)
        self._failing(monkeypatch, number, 9)
        with pytest.raises(BrokenImageError, match="after 4 tries; the file may be wh"):
            try:
                decode_image(tmp_path / "x.png")
            except BrokenImageError as error:
                assert pickle.loads(pickle.dumps(error)).passing
                raise

    @pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.ENAMETOOLONG])
    def test_others_are_not(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pauses: list[float],
        number: int,
    ) -> None:
        _grey(tmp_path / "x.png")
        self._failing(monkeypatch, number, 1)
        with pytest.raises(BrokenImageError) as caught:
            decode_image(tmp_path / "x.png")
        assert not caught.value.passing
        assert pauses == []

    def test_damage_is_no_passing_error(
        self, tmp_path: Path, pauses: list[float]
    ) -> None:
        content = _grey(tmp_path / "x.png").read_bytes()
        (tmp_path / "x.png").write_bytes(content[:60])
        with pytest.raises(BrokenImageError) as caught:
            decode_image(tmp_path / "x.png")
        assert not caught.value.passing
        assert pauses == []


class TestExif:
    @pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
    @pytest.mark.parametrize(
        "damage",
        [
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
            b"Exif\0\0nonsense" * 9,
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\x08",
        ],
    )
    def test_damage_does_not_refuse_a_good_picture(
        self, tmp_path: Path, name: str, damage: bytes
    ) -> None:
        image = Image.new("RGB", (20, 10), (10, 200, 30))
        image.save(tmp_path / name, exif=damage, quality=95)
        decoded: Any = decode_image(tmp_path / name)
        assert decoded.size == (20, 10)
        assert abs(decoded.getpixel((5, 5))[1] - 200) < 4

    @pytest.mark.parametrize("orientation", [0, 9, 77, 65535])
    def test_unknown_orientation_is_upright(
        self, tmp_path: Path, orientation: int
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
        assert decode_image(tmp_path / "x.jpg").size == (20, 10)


class TestValueRange:
    @staticmethod
    def _write(path: Path, low: int, high: int) -> np.ndarray:
        values = np.linspace(low, high, 256).round().astype(np.uint16).reshape(4, 64)
        Image.fromarray(values).save(path)
        return values

    @pytest.mark.parametrize("high", [4095, 1023, 16383, 70])
    def test_range_is_scaled(self, tmp_path: Path, high: int) -> None:
        values = self._write(tmp_path / "x.png", 0, high)
        image = np.asarray(decode_image(tmp_path / "x.png", 1, value_range=(0, high)))
        assert np.abs(image - values * 255.0 / high).max() <= 0.5
        dataset = ImageDataset(tmp_path, in_chans=1, value_range=(0, high))
        assert np.array_equal(dataset[0][0], image)

    def test_range_begins_elsewhere(self, tmp_path: Path) -> None:
        values = self._write(tmp_path / "x.tif", 1000, 3000)
        image: Any = decode_image(tmp_path / "x.tif", 1, value_range=(1000, 3000))
        assert np.abs(image - (values - 1000.0) * 255 / 2000).max() <= 0.5

    def test_nothing_is_clipped(self, tmp_path: Path) -> None:
        self._write(tmp_path / "x.png", 5, 4096)
        for value_range in ((0, 4095), (6, 9000)):
            with pytest.raises(BrokenImageError, match="from 5 to 4096, beyond"):
                decode_image(tmp_path / "x.png", 1, value_range=value_range)

    @pytest.mark.parametrize(
        "value_range", [(0, 65536), (9, 9), (-1, 5), (1, 2, 3), (7, 2)]
    )
    def test_no_range(self, tmp_path: Path, value_range: Any) -> None:
        with pytest.raises(ValueError, match="value_range"):
            decode_image(_grey(tmp_path / "x.png"), value_range=value_range)
        with pytest.raises(ValueError, match="value_range"):
            ImageDataset(tmp_path, value_range=value_range)

    @pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
    @pytest.mark.parametrize(
        ("high", "warns"), [(4095, 1), (900, 1), (4096, 0), (0, 0)]
    )
    def test_dark_pictures_are_warned_of_once(
        self,
        tmp_path: Path,
        name: str,
        high: int,
        warns: int,
    ) -> None:
        self._write(tmp_path / name, 0, high)
        if 0 < high < 4096:
            bits = high.bit_length()
            message = rf"no value above {high}.*value_range=\(0, {2**bits - 1}\)"
            with pytest.warns(UserWarning, match=message):
                decode_image(tmp_path / name)
        decode_image(tmp_path / name)  # warnings are errors here
