"""Image folders and named data sets, keyed loading, and what a broken file does."""

from lightly_mim.data.decode import decode_image
from lightly_mim.data.folder import ImageDataset, ReplacementName
from lightly_mim.data.items import KeyedDataset, collate
from lightly_mim.data.loading import GlobalBatches, KeyedLoader, default_num_workers
from lightly_mim.data.named import NAMED_DATA, imagenette, open_named, solar_cells
from lightly_mim.data.opening import BrokenImageError
from lightly_mim.data.seeding import keyed_random_state, seed_from
from lightly_mim.data.sources import (
    TransformedDataset,
    match_classes,
    open_data,
    spread_out,
)

__all__ = [
    "NAMED_DATA",
    "BrokenImageError",
    "GlobalBatches",
    "ImageDataset",
    "KeyedDataset",
    "KeyedLoader",
    "ReplacementName",
    "TransformedDataset",
    "collate",
    "decode_image",
    "default_num_workers",
    "imagenette",
    "keyed_random_state",
    "match_classes",
    "open_data",
    "open_named",
    "seed_from",
    "solar_cells",
    "spread_out",
]
