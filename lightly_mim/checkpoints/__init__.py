"""Weights in files: writing and reading them, never building a model."""

from lightly_mim.checkpoints.encoder import (
    EncoderCheckpoint,
    encoder_spec,
    hash_tensors,
    put_encoder,
    read_encoder,
    save_encoder,
)
from lightly_mim.checkpoints.layouts import read_weights
from lightly_mim.checkpoints.weights import Weights
from lightly_mim.checkpoints.whole import load_whole

__all__ = [
    "EncoderCheckpoint",
    "Weights",
    "encoder_spec",
    "hash_tensors",
    "load_whole",
    "put_encoder",
    "read_encoder",
    "read_weights",
    "save_encoder",
]
