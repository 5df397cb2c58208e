"""Serves two models as the Hugging Face hub does, and reads them through every door.

    HF_ENDPOINT=http://127.0.0.1:PORT python tests/checkpoints/hub.py PORT EMPTY_FOLDER

The hub's address is read when its package is imported, so this is a process of its own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from safetensors.torch import load_file

from lightly_mim import MAE, convert
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import Mask
from lightly_mim.patches import sincos_positions

COMMIT = "a" * 40
CONFIG = transformers.ViTMAEConfig(
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=192,
    image_size=32,
    patch_size=8,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=128,
)


class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's API a download asks for."""

    protocol_version = "HTTP/1.1"
    models: ClassVar[dict[str, Path]] = {}

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, whole: bool) -> None:
        path = self.path.partition("?")[0]
        code, body, head = 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        for name, folder in self.models.items():
            files = sorted(folder.iterdir())
            if path.startswith(f"/api/models/{name}/revision/"):
                listed = [{"rfilename": file.name} for file in files]
                about = {"id": name, "sha": COMMIT, "siblings": listed, "tags": []}
                code, body, head = 200, json.dumps(about).encode(), {}
            elif path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size,
                     "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
                    for file in files
                ]  # fmt: skip
                code, body, head = 200, json.dumps(tree).encode(), {}
            elif path.startswith(f"/{name}/resolve/"):
                content = (folder / Path(path).name).read_bytes()
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                code, body = 200, content
                head = {"ETag": tag, "X-Repo-Commit": COMMIT}
        self.send_response(code)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if whole:
            self.wfile.write(body)


def main(port: int, root: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(CONFIG)
    theirs.eval()
    # As published ones have them; transformers leaves them at zero.
    for positions in (
        theirs.vit.embeddings.position_embeddings,
        theirs.decoder.decoder_pos_embed,
    ):
        positions.data.copy_(sincos_positions((4, 4), positions.shape[-1], 1))
    theirs.save_pretrained(root / "safetensors")
    (root / "bin").mkdir()
    shutil.copy(root / "safetensors" / "config.json", root / "bin")
    weights = load_file(root / "safetensors" / "model.safetensors")
    torch.save(weights, root / "bin" / "pytorch_model.bin")
    Hub.models = {f"someone/{name}": root / name for name in ("safetensors", "bin")}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    images = torch.randn(1, 3, 32, 32)
    for name in Hub.models:
        ours = MAE.from_pretrained(name).eval()
        assert isinstance(ours, MAE)
        with torch.no_grad():
            out = theirs(images, noise=torch.rand(1, 16))
            found = ours(images, Mask.of(out.mask.reshape(1, 4, 4).bool()))
        width = out.logits.shape[-1]
        index = found.index[..., None].expand(-1, -1, width)
        expected = out.logits.gather(1, index)
        torch.testing.assert_close(found.prediction, expected, rtol=1e-5, atol=1e-5)
        encoder = load_encoder(name)
        folder = convert(name, "safetensors", root / f"{Path(name).name}-out")
        for other in (encoder, load_encoder(folder / "encoder.safetensors")):
            for key, tensor in ours.encoder.vit.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[f"vit.{key}"]), key
    try:
        MAE.from_pretrained("someone/none")
    except ValueError as error:
        assert "cannot be fetched (RepositoryNotFoundError)" in str(error)
    else:
        raise AssertionError("a model that is not there was found")
    server.shutdown()
    server.server_close()
    for name in Hub.models:  # from the cache
        MAE.from_pretrained(name)
    print("All doors led to the hub.")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
