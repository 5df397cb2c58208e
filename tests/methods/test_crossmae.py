from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightly_mim.methods import CrossMAE

from .mae_models import (
    BEIT,
    LAYOUTS,
    VIT,
    assert_gradients_equal,
    build,
    gradients,
    images,
)

# Of the encoder's output, and everything predicted: what the decoder alone adds.
PLAIN: dict[str, Any] = {"predict_ratio": 1.0, "weighted_feature_maps": False}
MODELS: dict[str, dict[str, Any]] = {
    "as published": VIT,
    "plain": {**VIT, **PLAIN},
    "share": {**VIT, "weighted_feature_maps": False},
    "maps": {**VIT, "predict_ratio": 1.0, "reg_tokens": 2},
    "fc_norm": {**LAYOUTS["fc_norm"], "predict_ratio": 0.5},
    "Beit": {**BEIT, "predict_ratio": 1.0},
}


def test_defaults__are_the_papers() -> None:
    model = CrossMAE(**VIT)
    assert model.predict_ratio == 1 / 3
    assert model.weighted_feature_maps is True
    arguments = inspect.signature(CrossMAE).parameters
    assert arguments["predict_ratio"].default == 1 / 3
    # A third of the 12 of 16 patches that are masked: 25 % of all.
    assert model(images(model)).index.shape == (2, 4)


@pytest.mark.parametrize("name", MODELS)
def test_forward__leaves_no_parameter_without_gradient(name: str) -> None:
    model = build(MODELS[name], CrossMAE).train()
    pixels = images(model)
    output = model(pixels)
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    # The share of the cells that is predicted, and its targets.
    all_masked = model.eval()(pixels, output.mask)
    masked = all_masked.index.shape[1]
    share = model.init_args["predict_ratio"]
    assert output.index.shape == (2, math.ceil(masked * round(share, 6)))
    for b in range(2):
        rows = [all_masked.index[b].tolist().index(i) for i in output.index[b]]
        assert torch.equal(output.target[b], all_masked.target[b, rows])
        prediction = all_masked.prediction[b, rows]
        torch.testing.assert_close(output.prediction[b], prediction)


@pytest.mark.parametrize("name", ["plain", "maps"])
def test_checkpointing_and_compile__change_nothing(name: str) -> None:
    model = build(MODELS[name], CrossMAE, decoder_depth=1).train()
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


@pytest.mark.parametrize("weighted", [True, False])
def test_loss__equals_the_encoders_layers_and_the_decoder(weighted: bool) -> None:
    model = build(VIT, CrossMAE, weighted_feature_maps=weighted)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    visible = torch.stack([(~m).flatten().nonzero()[:, 0] for m in mask.cells])
    masked = torch.stack([m.flatten().nonzero()[:, 0] for m in mask.cells])
    idx_keep = torch.cat([torch.zeros(2, 1, dtype=torch.int64), visible + 1], dim=1)
    # lightly's way to leave tokens out.
    encoder: Any = model.encoder
    last, layers = encoder.forward_intermediates(pixels, idx_keep=idx_keep)
    tokens = torch.stack([layers[0], last]) if weighted else last
    decoded = model.decoder.decode_masked(tokens, idx_keep, masked + 1)
    patches = model.target(pixels, masked, (16, 16))
    expected = functional.mse_loss(model.head(decoded), patches)
    torch.testing.assert_close(model(pixels, mask).loss, expected)


def test_predict_ratio__draws_each_cell_as_often() -> None:
    options = {**PLAIN, "predict_ratio": 0.5, "depth": 1, "decoder_depth": 1}
    model = build(VIT, CrossMAE, **options).train()
    pixels = images(model, 1).expand(2000, -1, -1, -1)
    mask = torch.ones(2000, 4, 4, dtype=torch.bool)
    mask[:, 0] = False
    index = model(pixels, mask).index
    assert index.shape == (2000, 6)
    assert (index.diff() > 0).all()
    counts = index.flatten().bincount(minlength=16)
    # 1000 of 2000; the standard error is 22.
    assert (counts[4:] - 1000).abs().max() < 5 * 22
    assert counts[:4].sum() == 0
    # Pictures are whole in any mode.
    assert model(pixels[:1]).index.shape[1] == 6
    picture = model.reconstruct(pixels[:1], mask[:1])
    assert (picture != pixels[:1])[..., 16:, :].float().mean() > 0.99


def test_predict_ratio__saves_computing() -> None:
    flops = {}
    for share in (1.0, 1 / 3):
        model = build(VIT, CrossMAE, **{**PLAIN, "predict_ratio": share}).train()
        with FlopCounterMode(display=False) as counter:
            model(images(model))
        counts = counter.get_flop_counts()
        flops[share] = sum(counts["CrossMAE.head"].values())
    # 4 of 12 masked patches.
    assert flops[1.0] == 3 * flops[1 / 3] == 2 * 2 * 12 * 24 * 768


def test_choose_attention__changes_nothing() -> None:
    model = build(VIT, CrossMAE)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    losses = []
    blocks: Any = model.decoder.blocks
    for bf16 in (True, False):
        model.choose_attention(torch.device("cpu"), bf16)
        assert all(block.fused_attn is not bf16 for block in blocks)
        losses.append(model(pixels, mask).loss)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01])
def test_constructor__refuses_predict_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got predict_ratio={ratio}")):
        CrossMAE(**VIT, predict_ratio=ratio)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoder", "cross", "CrossMAE of lightly_mim.methods has the cross-att"),
        ("encoder_mask_tokens", True, "lightly_mim.methods.MaskTokenMAE"),
        ("norm_pix", False, r"target=Pixels\(\) for False"),
        ("sampling", "block", r"masking=BlockMasking\(\.\.\.\)"),
    ],
)
def test_constructor__says_what_replaced_an_argument(
    name: str, value: Any, message: str
) -> None:
    message = f"CrossMAE does not take {name}: .*{message}"
    with pytest.raises(ValueError, match=message):
        CrossMAE(**VIT, **{name: value})
