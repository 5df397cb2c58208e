"""Segmentation with frozen patch tokens."""
