"""Weights in files: writing and reading them, never building a model."""

from lightly_mim.checkpoints.encoder import (
    EncoderCheckpoint,
    encoder_spec,
    put_encoder,
    read_encoder,
    save_encoder,
)
from lightly_mim.checkpoints.layouts import read_weights
from lightly_mim.checkpoints.weights import Weights

__all__ = [
    "EncoderCheckpoint",
    "Weights",
    "encoder_spec",
    "put_encoder",
    "read_encoder",
    "read_weights",
    "save_encoder",
]
