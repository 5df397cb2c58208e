"""Protocols that train through the encoder, on augmented images."""

from lightly_mim.evaluation.supervised.supervised import (
    Classification,
    plan_batches,
    train_and_score,
)

__all__ = ["Classification", "plan_batches", "train_and_score"]
