"""Image folders and named data sets, keyed loading, and what a broken file does."""

from lightly_mim.data.decode import BrokenImageError, decode_image
from lightly_mim.data.folder import ImageDataset
from lightly_mim.data.seeding import keyed_random_state, seed_from

__all__ = [
    "BrokenImageError",
    "ImageDataset",
    "decode_image",
    "keyed_random_state",
    "seed_from",
]
