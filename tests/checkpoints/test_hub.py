from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_models_of_the_hub(tmp_path: Path) -> None:
    """By its real client, from a server of this machine that answers as the hub."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = {
        **{"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")},
        **{"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"},
    }
    (tmp_path / "models").mkdir()
    script = Path(__file__).with_name("hub.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(port), tmp_path / "models"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "All doors led to the hub." in done.stdout
