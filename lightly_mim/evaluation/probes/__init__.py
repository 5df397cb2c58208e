"""Probes: features of training and test images in, predictions out."""
