"""Weights in files: writing and reading them, never building a model."""

from lightly_mim.checkpoints.encoder import (
    EncoderCheckpoint,
    encoder_spec,
    put_encoder,
    read_encoder,
    save_encoder,
)

__all__ = [
    "EncoderCheckpoint",
    "encoder_spec",
    "put_encoder",
    "read_encoder",
    "save_encoder",
]
