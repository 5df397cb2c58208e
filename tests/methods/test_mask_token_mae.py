from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from torch.nn import functional

from lightly_mim.methods import MaskTokenMAE

from .mae_models import (
    LAYOUTS,
    VIT,
    assert_gradients_equal,
    build,
    gradients,
    images,
)

MODELS: dict[str, dict[str, Any]] = {
    "class token": VIT,
    "registers": {**VIT, "reg_tokens": 1},
    "no prefix tokens": LAYOUTS["fc_norm"],
}


@pytest.mark.parametrize("name", MODELS)
def test_forward__leaves_no_parameter_without_gradient(name: str) -> None:
    model = build(MODELS[name], MaskTokenMAE).train()
    pixels = images(model)
    output = model(pixels)
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    # All masked cells are predicted, in training as elsewhere.
    assert output.index.shape == (2, 12)
    all_masked = model.eval()(pixels, output.mask)
    assert torch.equal(output.index, all_masked.index)
    assert torch.equal(output.target, all_masked.target)
    torch.testing.assert_close(output.prediction, all_masked.prediction)


def test_forward__equals_lightlys_interfaces() -> None:
    model = build(VIT, MaskTokenMAE, reg_tokens=2)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    flat = functional.pad(mask.cells.flatten(1), (3, 0), value=False)
    encoder: Any = model.encoder
    tokens = encoder.encode(pixels, mask=flat)
    assert isinstance(model.decoder, MaskedVisionTransformerDecoderTIMM)
    decoded = model.decoder(model.decoder_embed(tokens))
    prediction = model.head(decoded[flat]).view(2, 12, -1)
    output = model(pixels, mask)
    torch.testing.assert_close(output.prediction, prediction)
    expected = functional.mse_loss(prediction, output.target)
    torch.testing.assert_close(output.loss, expected)


def test_forward__does_not_see_the_masked_pixels() -> None:
    model = build(VIT, MaskTokenMAE)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    changed = torch.where(mask.pixels((64, 64)), 100.0, pixels)
    prediction = model(pixels, mask).prediction
    assert torch.equal(model(changed, mask).prediction, prediction)


def test_checkpointing_and_compile__change_nothing() -> None:
    model = build(MODELS["registers"], MaskTokenMAE, depth=1, decoder_depth=1).train()
    pixels = images(model)
    mask = model.draw_mask(pixels)
    loss = model(pixels, mask).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    model(pixels, mask).loss.backward()
    assert_gradients_equal(gradients(model), expected)
    model.set_grad_checkpointing(False)
    model.compile(backend="aot_eager", fullgraph=True)
    compiled = model(pixels, mask).loss
    torch.testing.assert_close(compiled, loss)
