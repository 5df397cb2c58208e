"""What `import lightly_mim` brings, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightly_mim


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_import__leaves_pytorch_for_later() -> None:
    heavy = "{'torch', 'pytorch_lightning', 'timm', 'lightly'}"
    code = f"import sys, lightly_mim; print({heavy} & sys.modules.keys())"
    assert python(code) == "set()\n"


def test_import__rooms_without_importing_them() -> None:
    code = "import lightly_mim; print(lightly_mim.masking.RandomMasking.__name__)"
    assert python(code) == "RandomMasking\n"


def test_names__are_there() -> None:
    assert set(lightly_mim._HOMES) == set(lightly_mim.__all__)
    assert set(lightly_mim.__all__) <= set(dir(lightly_mim))
    for name in lightly_mim.__all__:
        assert getattr(lightly_mim, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        lightly_mim.nothing  # noqa: B018
    with pytest.raises(ImportError, match="SimMM"):
        exec("from lightly_mim import SimMM")
