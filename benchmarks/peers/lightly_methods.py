"""SimMIM and MAE of lightly's blocks, as its documentation puts them together.

Encoder, masks, decoder and transform are lightly's; optimiser, batches, statistics and
the size of the encoder are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import timm
import torch
from lightly.models import utils
from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.transforms.mae_transform import MAETransform
from studies.small_sets import Images
from timm.models import VisionTransformer
from torch import Tensor, nn

from lightly_mim import MaskedImageModel, masked_encoder
from lightly_mim.data import KeyedLoader, keyed_random_state, open_data
from lightly_mim.defaults import decoder_size, num_heads
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.optim import build_optimizer
from lightly_mim.settings import channel_statistics, set_statistics, settings_of


class Lightly(nn.Module):
    """An encoder of lightly's blocks and its random masks, for the methods below.

    Args:
        options:
            Those of the encoder, a timm ViT.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.backbone = MaskedVisionTransformerTIMM(vit=self._vit())
        self.patch_size: int = options["patch_size"]
        self.pixels = self.patch_size**2 * options["in_chans"]

    def _vit(self) -> VisionTransformer:
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **self.options)
        assert isinstance(vit, VisionTransformer)
        return vit

    def encoder(self, statistics: dict[str, list[float]]) -> MaskedEncoder:
        """Returns a copy of the encoder as ours, with the mean and std of images."""
        vit = self._vit()
        vit.load_state_dict(self.backbone.vit.state_dict())
        encoder = masked_encoder(vit)
        set_statistics(encoder, statistics)
        return encoder

    def mask(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the indices of visible and masked tokens, and the masked patches."""
        idx_keep, idx_mask = utils.random_token_mask(
            size=(len(images), self.backbone.sequence_length), mask_ratio=0.75
        )
        patches = utils.patchify(images, self.patch_size)
        return idx_keep, idx_mask, utils.get_at_index(patches, idx_mask - 1)


class LightlySimMIM(Lightly):
    """SimMIM: mask tokens, a linear layer, L1 on plain pixels."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.decoder = nn.Linear(options["embed_dim"], self.pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss."""
        _, idx_mask, target = self.mask(images)
        encoded = self.backbone.encode(images, idx_mask=idx_mask)
        predicted = self.decoder(utils.get_at_index(encoded, idx_mask))
        return nn.functional.l1_loss(predicted, target)


class LightlyMAE(Lightly):
    """MAE: visible patches, a transformer, squared error on plain pixels."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        dim, depth = decoder_size(options["embed_dim"], options["depth"])
        self.decoder = MAEDecoderTIMM(
            num_patches=self.backbone.sequence_length - 1,
            patch_size=self.patch_size,
            in_chans=options["in_chans"],
            embed_dim=options["embed_dim"],
            decoder_embed_dim=dim,
            decoder_depth=depth,
            decoder_num_heads=num_heads(dim),
            mlp_ratio=4.0,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss."""
        idx_keep, idx_mask, target = self.mask(images)
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=idx_keep))
        size = (len(images), self.backbone.sequence_length)
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, idx_keep, encoded.type_as(tokens))
        decoded = utils.get_at_index(self.decoder.decode(tokens), idx_mask)
        return nn.functional.mse_loss(self.decoder.predict(decoded), target)


LIGHTLY = {"SimMIM": LightlySimMIM, "MAE": LightlyMAE}


def train_lightly(
    name: str,
    options: Mapping[str, Any],
    train: Images,
    epochs: int,
    seed: int,
    like: MaskedImageModel,
) -> tuple[MaskedEncoder, MaskedEncoder]:
    """Trains with lightly's blocks, and our optimiser and statistics.

    Args:
        name:
            One of `LIGHTLY`.
        options:
            Those of the encoder.
        train:
            The images.
        epochs:
            Number of epochs.
        seed:
            Seed of weights, batches, crops and masks.
        like:
            Our method, whose recipe is taken.

    Returns:
        The encoder before and after.
    """
    pixels = np.stack([np.asarray(picture) for picture in train.pictures])
    tensor = torch.from_numpy(pixels.reshape(len(pixels), *pixels.shape[1:3], -1))
    normalize = channel_statistics(tensor.permute(0, 3, 1, 2))
    transform = MAETransform(input_size=options["img_size"], normalize=normalize)
    names = ("recipe", "batch_size", "lr", "warmup_epochs", "weight_decay", "min_scale")
    arguments = dict.fromkeys(names) | {"epochs": epochs}
    recipe = settings_of(like, arguments, num_images=len(train))
    with keyed_random_state(seed, "weights"):
        model = LIGHTLY[name](options)
        start = model.encoder(normalize)
        steps = len(train) // recipe.batch_size
        optimizer, schedule = build_optimizer(
            model, recipe, recipe.batch_size, steps, epochs * steps
        )
        loader = KeyedLoader(
            open_data(train, transform=transform)[0],
            recipe.batch_size,
            training=True,
            seed=seed,
            num_workers=0,
            labels=False,
        )
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for views, *_ in loader:
                optimizer.zero_grad()
                model(views[0]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or 1e9)
                optimizer.step()
                schedule.step()
    return start, model.encoder(normalize)
