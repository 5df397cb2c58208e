"""Masked image modelling for lightly."""

__version__ = "0.1.0"
