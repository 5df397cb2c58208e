"""Every door out: weights in other libraries' layouts, with a card that says what."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightly_mim.arguments import checked
from lightly_mim.cards import is_card, model_card
from lightly_mim.checkpoints import encoder_spec, save_encoder, timm_model
from lightly_mim.checkpoints import huggingface_writing as huggingface
from lightly_mim.checkpoints import lightly_benchmark as lightly_layout
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation.loading import build_saved, origin_notes
from lightly_mim.masking import RandomMasking
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
from lightly_mim.methods.pretrained import find_weights, with_weights
from lightly_mim.targets import PatchNormalizedPixels

Layout = Literal[
    "timm", "huggingface", "lightly", "safetensors", "onnx", "torch_export"
]
_LIGHTLY_HEADS = 16  # of the decoder of lightly's benchmark


class _Converted(NamedTuple):
    """Files by their names, with what writes them, and what to say."""

    files: dict[str, Callable[[Path], None]]
    usage: str
    notes: list[str]


@checked
def convert(
    checkpoint: str | Path, to: Layout, out: str | Path, overwrite: bool = False
) -> Path:
    """Writes weights in another library's layout, into a folder with a model card.

    Args:
        checkpoint:
            A run directory, a file or folder of weights in any layout that is read, the
            name of a timm model, or OWNER/MODEL on the Hugging Face hub, see
            `MaskedImageModel.from_pretrained`.
        to:
            'timm': a folder for `timm.create_model("local-dir:OUT", pretrained=True)`,
            whose model.safetensors is also a `checkpoint_path`. 'huggingface': a folder
            for `from_pretrained` of transformers, as ViTMAEForPreTraining,
            ViTForMaskedImageModeling or SwinForMaskedImageModeling where decoder or
            head have a place there, else the encoder alone, with an image processor.
            'lightly': a checkpoint like those of lightly's benchmark of MAE.
            'safetensors': the encoder alone, under timm's names. 'onnx' and
            'torch_export': the encoder from normalised images to features, for any
            number of images.
        out:
            The folder to write. It appears as a whole or not at all.
        overwrite:
            Replace the folder if it is there.

    Returns:
        The folder.

    Raises:
        ValueError: If the weights cannot be read, if the layout has no place for them,
            if `out` is there, or if a package is missing that the layout needs.
    """
    out = Path(out)
    if out.exists() and not (overwrite and is_card(out / "README.md")):
        raise ValueError(
            f"{out} is there already: pass another folder as out, or overwrite to "
            "replace one that was written by convert."
        )
    weights = find_weights(checkpoint)
    encoder = build_saved(weights, checkpoint)  # with all that is said of it
    method: MaskedImageModel | None = None
    if weights.parts and weights.method:
        method = with_weights(weights, encoder, checkpoint)
        encoder.mask_token = method.encoder.mask_token
    encoder.eval()
    converted = _WRITERS[to](encoder, method)
    notes = [*origin_notes(encoder), *converted.notes]
    usage = converted.usage.format(out=out)
    card = model_card(checkpoint, weights, encoder, usage, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        made.mkdir()
        for name, write in converted.files.items():
            write(made / name)
        (made / "README.md").write_text(card)
        if out.exists():
            out.rename(Path(folder) / "replaced")  # removed once the new one is there
        made.rename(out)
    said = f"{to}: written to {out}. How to load it: {out / 'README.md'}"
    print("\n".join([*notes, said]), flush=True)
    return out


def _state(encoder: MaskedEncoder) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in encoder.vit.state_dict().items()}


def _parts(method: MaskedImageModel) -> dict[str, Tensor]:
    state = method.state_dict().items()
    own = ("decoder", "head")
    return {n: t.detach() for n, t in state if n.startswith(own)}


def _architecture(encoder: MaskedEncoder) -> str:
    name = encoder.vit.pretrained_cfg.get("architecture") or encoder.name
    return str(name).split(".")[0]


def _to_safetensors(
    encoder: MaskedEncoder, method: MaskedImageModel | None
) -> _Converted:
    return _Converted(
        {"encoder.safetensors": lambda path: save_encoder(encoder, path)},
        'encoder = lightly_mim.evaluation.load_encoder("{out}/encoder.safetensors")',
        [],
    )


def _to_timm(encoder: MaskedEncoder, method: MaskedImageModel | None) -> _Converted:
    spec = encoder_spec(encoder)
    spec["name"] = _architecture(encoder)
    mean = encoder.pool == "mean" and encoder.has_class_token
    if type(encoder.vit).__name__ == "VisionTransformer" and mean:
        # The norm stays where it is, in front of the mean.
        fc_norm = "fc_norm.weight" in encoder.vit.state_dict()
        pooling = {"global_pool": "avg", "fc_norm": fc_norm}
        spec["options"] = pooling | spec["options"]
    config, state = timm_model.write(spec, _state(encoder))
    return _Converted(
        {
            "config.json": lambda path: _write_json(path, config),
            "model.safetensors": lambda path: _save(state, path),
        },
        'model = timm.create_model("local-dir:{out}", pretrained=True)',
        _norm_notes(encoder),
    )


def _norm_notes(encoder: MaskedEncoder) -> list[str]:
    """Returns how the norms differ from those that timm builds, which no file says."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not there
        own = masked_encoder(
            str(encoder.name),
            img_size=encoder.img_size,
            in_chans=encoder.in_chans,
            **encoder.options,
        ).norm_eps
    if encoder.norm_eps == own:
        return []
    return [
        f"The norms of timm's model add {own:g} to the variance, and these weights "
        f"come with {encoder.norm_eps:g}: set eps of its norms for the same features."
    ]


def _to_lightly(encoder: MaskedEncoder, method: MaskedImageModel | None) -> _Converted:
    family = type(encoder.vit).__name__
    if family != "VisionTransformer":
        raise ValueError(
            "lightly's MaskedVisionTransformerTIMM is made for timm's "
            f"VisionTransformer, got a {family}. Convert it to timm."
        )
    parts: dict[str, Tensor] = {}
    notes = _norm_notes(encoder)
    if type(method) is MAE:
        heads = _decoder_heads(method)
        if heads == _LIGHTLY_HEADS:
            parts = _parts(method)
        else:
            notes.append(
                f"Without the decoder: it has {heads} attention heads, and that of "
                f"lightly's benchmark {_LIGHTLY_HEADS}."
            )
    elif method is not None:
        notes.append("Without the head: lightly has no place for it.")
    token = None if encoder.mask_token is None else encoder.mask_token.detach()
    checkpoint = lightly_layout.write(
        _state(encoder), token, parts, version("pytorch-lightning")
    )
    return _Converted(
        {"last.ckpt": lambda path: torch.save(checkpoint, path)},
        'state_dict = torch.load("{out}/last.ckpt", weights_only=True)["state_dict"]',
        notes,
    )


def _to_huggingface(
    encoder: MaskedEncoder, method: MaskedImageModel | None
) -> _Converted:
    family = type(encoder.vit).__name__
    facts = _facts(encoder)
    kind, notes = _place(method, family, facts)
    parts = {} if method is None or kind is None else _parts(method)
    if kind == "MAE" and isinstance(method, MAE):
        masking = method.masking
        ratio = masking.ratio if isinstance(masking, RandomMasking) else 0.75
        facts |= {
            "decoder_num_heads": _decoder_heads(method),
            "mask_ratio": ratio,
            "norm_pix_loss": isinstance(method.target, PatchNormalizedPixels),
        }
    token = None if encoder.mask_token is None else encoder.mask_token.detach()
    config, state, preprocessor = huggingface.write(
        family, encoder_spec(encoder), _state(encoder), facts, token, kind, parts
    )
    return _Converted(
        {
            "config.json": lambda path: _write_json(path, config),
            "preprocessor_config.json": lambda path: _write_json(path, preprocessor),
            "model.safetensors": lambda path: _save(state, path),
        },
        f'model = transformers.{config["architectures"][0]}.from_pretrained("{{out}}")',
        notes,
    )


def _facts(encoder: MaskedEncoder) -> dict[str, Any]:
    """Returns what the weights do not tell, see `huggingface_writing.write`."""
    vit = encoder.vit
    stages = getattr(vit, "layers", None)
    facts: dict[str, Any] = {
        "patch_size": encoder.patch_size,
        "stride": encoder.stride,
    }
    if stages is None:
        heads = getattr(vit.blocks[0].attn, "num_heads", None)
        return facts | {"num_heads": [heads]}
    blocks = [stage.blocks[0] for stage in stages]
    scale = 2 ** (len(blocks) - 1)
    grid = (encoder.grid[0] // scale, encoder.grid[1] // scale)
    facts |= {
        "num_heads": [block.attn.num_heads for block in blocks],
        "windows": [tuple(block.window_size) for block in blocks],
        "last_grid": grid,
    }
    units = [getattr(block.attn, "pretrained_window_size", (0, 0)) for block in blocks]
    if any(unit[0] for unit in units):
        facts["units"] = [unit[0] for unit in units]
    return facts


def _place(
    method: MaskedImageModel | None, family: str, facts: dict[str, Any]
) -> tuple[Literal["MAE", "SimMIM"] | None, list[str]]:
    """Returns as what Hugging Face has a class for a method, and what is left out."""
    if method is None:
        return None, []
    (p, q), encoder = facts["patch_size"], method.encoder
    values = facts["stride"][0] * facts["stride"][1] * encoder.in_chans
    head = getattr(method, "head", None)
    linear = isinstance(head, torch.nn.Linear) and head.out_features == values
    square = p == q and encoder.img_size[0] == encoder.img_size[1]
    vit = family == "VisionTransformer"
    if type(method) is MAE and linear and vit and square:
        return "MAE", []
    if type(method) is SimMIM and linear and family != "Beit" and square:
        return "SimMIM", []
    return None, [
        f"The encoder alone: transformers has no class for {type(method).__name__} "
        f"with this head on a {family}."
    ]


def _decoder_heads(method: MAE) -> int:
    block: Any = method.decoder.blocks[0]
    return int(block.attn.num_heads)


def _to_torch_export(
    encoder: MaskedEncoder, method: MaskedImageModel | None
) -> _Converted:
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        program = torch.export.export(
            encoder,
            (_pictures(encoder),),
            dynamic_shapes={"images": batch},
            strict=True,  # otherwise `len(images)` counts as a constant
        )
    return _Converted(
        {"encoder.pt2": lambda path: torch.export.save(program, path)},
        'features = torch.export.load("{out}/encoder.pt2").module()(images)',
        [],
    )


def _to_onnx(encoder: MaskedEncoder, method: MaskedImageModel | None) -> _Converted:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"to='onnx' needs packages that are not installed ({error.name}): pip "
            "install 'lightly-mim[onnx]'."
        ) from error
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own making
        program = torch.onnx.export(
            encoder,
            (_pictures(encoder),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: "batch"}},
            verbose=False,
        )
    if program is None:
        raise ValueError("PyTorch's exporter to ONNX made nothing of this encoder.")
    return _Converted(
        {"encoder.onnx": lambda path: program.save(path)},
        'session = onnxruntime.InferenceSession("{out}/encoder.onnx")\n'
        'features, = session.run(None, {{"images": images}})',
        [],
    )


def _pictures(encoder: MaskedEncoder) -> Tensor:
    return torch.zeros(2, encoder.in_chans, *encoder.img_size)


def _save(state: dict[str, Tensor], path: Path) -> None:
    # Clones, since safetensors refuses tensors that share their memory.
    whole = {n: t.contiguous().clone() for n, t in state.items()}
    save_file(whole, path, {"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


_WRITERS: dict[str, Callable[[MaskedEncoder, MaskedImageModel | None], _Converted]] = {
    "timm": _to_timm,
    "huggingface": _to_huggingface,
    "lightly": _to_lightly,
    "safetensors": _to_safetensors,
    "onnx": _to_onnx,
    "torch_export": _to_torch_export,
}
