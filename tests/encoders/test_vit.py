from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from torch import Tensor

from lightly_mim.encoders import MaskedEncoder, Pool, masked_encoder
from lightly_mim.encoders.vit import MaskedViT
from lightly_mim.masking import Mask
from lightly_mim.patches import sincos_positions

SIZE = (32, 48)
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
}
NAME = "vit_tiny_patch16_224"

# What timm's VisionTransformer can be built with: (name, options, in_chans).
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "class token": (NAME, {}, 3),
    "no class token": (NAME, {"class_token": False, "global_pool": ""}, 3),
    "fc_norm": (NAME, {"class_token": False, "global_pool": "avg"}, 3),
    "fc_norm and class token": (NAME, {"global_pool": "avg"}, 3),
    "registers": (NAME, {"reg_tokens": 4}, 3),
    "registers only": (
        NAME,
        {"reg_tokens": 2, "class_token": False, "global_pool": ""},
        3,
    ),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {}, 3),
    "no_embed_class": (NAME, {"no_embed_class": True, "reg_tokens": 1}, 3),
    "dynamic": (NAME, {"dynamic_img_size": True}, 3),
    "one channel": (NAME, {}, 1),
    "five channels": (NAME, {"dynamic_img_size": True, "no_embed_class": True}, 5),
    "sincos": (NAME, {"pos_embed": "sincos"}, 3),
    "CLIP": ("vit_base_patch16_clip_224", {}, 3),
    "AIMv2": ("aimv2_large_patch14_224", {"mlp_ratio": 2}, 3),
    "layer scale": ("deit3_small_patch16_224", {"init_values": 0.1}, 3),
    "parallel": ("vit_small_patch16_18x2_224", {}, 3),
}


def build(variant: str) -> MaskedViT:
    name, options, in_chans = VARIANTS[variant]
    torch.manual_seed(0)
    encoder = masked_encoder(name, in_chans=in_chans, **TINY | options)
    assert isinstance(encoder, MaskedViT)
    encoder.add_mask_token()
    # timm starts some tokens and scales near zero, which would hide mistakes.
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def draw(
    encoder: MaskedEncoder, size: tuple[int, int] = SIZE, grid: tuple[int, int] = (2, 3)
) -> tuple[Tensor, Tensor]:
    """Images and a mask with two True cells per image."""
    torch.manual_seed(1)
    images = torch.randn(3, encoder.in_chans, *size)
    order = torch.rand(3, grid[0] * grid[1]).argsort(dim=1)
    return images, (order < 2).view(3, *grid)


def plain_encode(
    encoder: MaskedViT, images: Tensor, mask: Tensor, drop: bool
) -> Tensor:
    """What SimMIM (drop=False) and MAE (drop=True) do, image by image, with timm."""
    vit, mask_token = encoder.vit, encoder.mask_token
    assert mask_token is not None
    size = images.shape[-2:]
    columns = size[1] // 8
    outputs = []
    for image, picture in zip(images, mask, strict=True):
        masked = [
            bool(
                picture[
                    8 * (i // columns) * picture.shape[0] // size[0],
                    8 * (i % columns) * picture.shape[1] // size[1],
                ]
            )
            for i in range(size[0] // 8 * columns)
        ]
        tokens = vit.patch_embed(image[None])
        shape = tokens.shape
        tokens = tokens.reshape(1, -1, shape[-1])
        if not drop:
            rows = [
                mask_token[0, 0] if is_masked else token
                for token, is_masked in zip(tokens[0], masked, strict=True)
            ]
            tokens = torch.stack(rows)[None]
        tokens = vit._pos_embed(tokens.reshape(shape))
        if drop:
            prefix = vit.num_prefix_tokens
            keep = list(range(prefix))
            keep += [prefix + i for i, is_masked in enumerate(masked) if not is_masked]
            tokens = tokens[:, keep]
        outputs.append(vit.fc_norm(vit.norm(vit.blocks(vit.norm_pre(tokens)))))
    return torch.cat(outputs)


def assert_same_gradients(
    encoder: MaskedEncoder, output: Tensor, expected: Tensor, atol: float = 1e-6
) -> None:
    weights = torch.randn_like(output)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    got = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(
        (expected * weights).sum(), parameters, allow_unused=True
    )
    scale = max(float(g.abs().max()) for g in want if g is not None)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants:
    def test_encode(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        expected = encoder.vit.fc_norm(encoder.vit.forward_features(images))
        torch.testing.assert_close(encoder.encode(images), expected)
        assert encoder.sequence_length == expected.shape[1]

    def test_encode_masked(self, variant: str) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        output = encoder.encode_masked(images, mask)
        expected = plain_encode(encoder, images, mask, drop=False)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert_same_gradients(encoder, output, expected)

    def test_encode_masked__empty_mask(self, variant: str) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        output = encoder.encode_masked(images, Mask(torch.zeros_like(mask), 0))
        torch.testing.assert_close(output, encoder.encode(images))

    def test_encode_visible(self, variant: str) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        output = encoder.encode_visible(images, mask)
        expected = plain_encode(encoder, images, mask, drop=True)
        assert output.shape == (3, encoder.num_prefix_tokens + 16, 32)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert_same_gradients(encoder, output, expected)

    def test_forward_intermediates(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        for norm in (False, True):
            tokens, layers = encoder.forward_intermediates(images, norm=norm)
            _, expected = encoder.vit.forward_intermediates(
                images, return_prefix_tokens=True, norm=norm, output_fmt="NLC"
            )
            torch.testing.assert_close(tokens, encoder.encode(images))
            assert len(layers) == len(expected) == encoder.num_layers == 3
            for layer, pair in zip(layers, expected, strict=True):
                if encoder.num_prefix_tokens:
                    patches, prefix = pair
                    want = torch.cat([prefix, patches], dim=1)
                else:
                    want = pair
                want = encoder.vit.fc_norm(want) if norm else want
                torch.testing.assert_close(layer, want)

    def test_every_parameter_takes_part(self, variant: str) -> None:
        encoder = build(variant).train()
        images, mask = draw(encoder)
        tokens = encoder.encode_masked(images, mask)[:, encoder.num_prefix_tokens :]
        tokens.square().sum().backward()
        unused = [
            name
            for name, parameter in encoder.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        assert unused == []

    def test_feature_map(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        feature_map = encoder.feature_map(images)
        assert feature_map.shape == (3, 32, 4, 6)
        tokens = encoder.encode(images)
        last = tokens[:, encoder.num_prefix_tokens + 6 * 2 + 5]
        torch.testing.assert_close(feature_map[:, :, 2, 5], last)


@pytest.mark.parametrize("variant", ["fc_norm", "fc_norm and class token"])
def test_forward__fc_norm(variant: str) -> None:
    encoder = build(variant)
    images, _ = draw(encoder)
    vit = encoder.vit
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder(images), expected)
    torch.testing.assert_close(encoder.embed(images), expected)
    # The norm of the mean is not the mean of the norms.
    mean = encoder.encode(images)[:, encoder.num_prefix_tokens :].mean(dim=1)
    assert not torch.allclose(mean, expected, atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward__as_timm_pools(variant: str) -> None:
    encoder = build(variant)
    images, _ = draw(encoder)
    vit = encoder.vit
    expected = vit.forward_head(vit.forward_features(images))
    if vit.global_pool == "":  # timm's are all tokens then, not one feature
        expected = expected[:, encoder.num_prefix_tokens :].mean(dim=1)
    assert encoder.pool == ("cls" if vit.global_pool == "token" else "mean")
    torch.testing.assert_close(encoder(images), expected)
    torch.testing.assert_close(encoder.embed(images, encoder.pool), expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_forward__as_lightlys(pool: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"global_pool": pool, "fc_norm": False, "reg_tokens": 2}
    vit: Any = timm.create_model(NAME, **TINY, **options)
    lightlys = MaskedVisionTransformerTIMM(
        vit, weight_initialization="skip", pos_embed_initialization="skip"
    ).eval()
    encoder = masked_encoder(vit).eval()
    images, _ = draw(encoder)
    torch.testing.assert_close(encoder(images), lightlys(images))
    idx_keep = torch.tensor([[0, 1, 2, 9, 11, 7]]).expand(3, -1)
    torch.testing.assert_close(
        encoder(images, idx_keep=idx_keep), lightlys(images, idx_keep=idx_keep)
    )


def test_pool__sets_what_forward_returns() -> None:
    encoder = build("registers")
    images, _ = draw(encoder)
    tokens = encoder.vit.forward_features(images)
    cls, mean = tokens[:, 0], tokens[:, 5:].mean(dim=1)
    torch.testing.assert_close(encoder(images), cls)
    assert "pool='cls'" in repr(encoder)
    cases: list[tuple[Pool, Tensor]] = [
        ("mean", mean),
        ("cls+mean", torch.cat([cls, mean], dim=1)),
        ("cls", cls),
    ]
    for pool, expected in cases:
        encoder.pool = pool
        assert f"pool='{pool}'" in repr(encoder)
        torch.testing.assert_close(encoder(images), expected)
        assert encoder.feature_dim == expected.shape[1]
        # An evaluation that does not say its pooling takes the mean as ever.
        torch.testing.assert_close(encoder.embed(images), mean)
    assert copy.deepcopy(encoder).pool == "cls"
    encoder.pool = "cls+mean"
    assert pickle.loads(pickle.dumps(encoder)).pool == "cls+mean"


def test_pool__that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"mean, cls, cls\+mean, got 'max'"):
        build("registers").pool = "max"  # type: ignore[assignment]
    encoder = build("registers only")
    for pool in ("cls", "cls+mean"):
        with pytest.raises(ValueError, match="this encoder has none"):
            encoder.pool = pool
    assert encoder.pool == "mean"
    for other in ("max", "avgmax"):
        with pytest.raises(ValueError, match=f"pools by '{other}'.*'avg'.*'token'"):
            masked_encoder(NAME, global_pool=other, **TINY)


@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean"])
def test_forward__idx_keep_in_any_order(pool: Any) -> None:
    encoder = build("registers")
    encoder.pool = pool
    images, _ = draw(encoder)
    shuffled = torch.tensor([[9, 0, 11, 2, 7]]).expand(3, -1)
    tokens = encoder.encode(images, idx_keep=shuffled)
    parts = {"cls": tokens[:, 1], "mean": tokens[:, [0, 2, 4]].mean(dim=1)}
    expected = torch.cat([parts[name] for name in pool.split("+")], dim=1)
    torch.testing.assert_close(encoder(images, idx_keep=shuffled), expected)


def test_forward__idx_keep_and_fc_norm() -> None:
    encoder = build("fc_norm and class token")
    images, _ = draw(encoder)
    every = torch.arange(25).expand(3, -1)
    for pool in ("mean", "cls", "cls+mean"):
        encoder.pool = pool
        torch.testing.assert_close(encoder(images, idx_keep=every), encoder(images))


def test_embed__pools_and_layers() -> None:
    encoder = build("registers")
    images, _ = draw(encoder)
    tokens, layers = encoder.forward_intermediates(images)
    cls, mean = tokens[:, 0], tokens[:, 5:].mean(dim=1)
    torch.testing.assert_close(encoder.embed(images, pool="cls"), cls)
    both = encoder.embed(images, pool="cls+mean", layer=2)
    torch.testing.assert_close(both, torch.cat([cls, mean], dim=1))
    first = encoder.embed(images, layer=0)
    torch.testing.assert_close(first, layers[0][:, 5:].mean(dim=1))
    torch.testing.assert_close(encoder.embed(images, layer=-3), first)
    many = encoder.embed_layers(images, [0, -1], ["mean", "cls"])
    assert set(many) == {(0, "mean"), (0, "cls"), (-1, "mean"), (-1, "cls")}
    torch.testing.assert_close(many[0, "mean"], first)
    torch.testing.assert_close(many[-1, "cls"], cls)


def test_embed__fc_norm_of_class_token_and_mean() -> None:
    encoder = build("fc_norm and class token")
    images, _ = draw(encoder)
    tokens = encoder.vit.forward_features(images)
    parts = [tokens[:, 0], tokens[:, 1:].mean(dim=1)]
    expected = torch.cat([encoder.vit.fc_norm(part) for part in parts], dim=1)
    torch.testing.assert_close(encoder.embed(images, pool="cls+mean"), expected)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (64, 64), (24, 72)])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_dynamic_img_size(size: tuple[int, int], no_embed_class: bool) -> None:
    torch.manual_seed(0)
    encoder = masked_encoder(
        NAME, dynamic_img_size=True, no_embed_class=no_embed_class, **TINY
    ).eval()
    encoder.add_mask_token()
    # A mask of the largest cells that divide any of these sizes into 8 x 8 patches.
    images, mask = draw(encoder, size, (size[0] // 8, size[1] // 8))
    torch.testing.assert_close(
        encoder.encode(images), encoder.vit.forward_features(images)
    )
    assert encoder.feature_map(images).shape[-2:] == (size[0] // 8, size[1] // 8)
    assert isinstance(encoder, MaskedViT)
    for drop, output in (
        (False, encoder.encode_masked(images, mask)),
        (True, encoder.encode_visible(images, mask)),
    ):
        torch.testing.assert_close(output, plain_encode(encoder, images, mask, drop))


class TestAgainstLightly:
    """Same weights and indices as in lightly's wrapper, where that works."""

    def wrappers(
        self, variant: str
    ) -> tuple[MaskedViT, MaskedVisionTransformerTIMM, Tensor]:
        encoder = build(variant)
        theirs = MaskedVisionTransformerTIMM(
            vit=encoder.vit,
            mask_token=encoder.mask_token,
            weight_initialization="skip",
            pos_embed_initialization="skip",
        )
        images, _ = draw(encoder)
        return encoder, theirs, images

    @pytest.mark.parametrize(
        "variant", ["class token", "no class token", "registers", "CLIP"]
    )
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("how", ["none", "idx_mask", "mask"])
    def test_same(self, variant: str, keep: bool, how: str) -> None:
        encoder, theirs, images = self.wrappers(variant)
        order = torch.rand(3, encoder.sequence_length).argsort(dim=1)
        arguments: dict[str, Tensor] = {}
        if keep:
            arguments["idx_keep"] = order[:, :9]
        if how == "idx_mask":
            arguments["idx_mask"] = order[:, 5:12]
        if how == "mask":
            arguments["mask"] = order < 7
        for method in ("preprocess", "encode"):
            torch.testing.assert_close(
                getattr(encoder, method)(images, **arguments),
                getattr(theirs, method)(images, **arguments),
            )
        for norm in (False, True):
            tokens, layers = encoder.forward_intermediates(
                images, norm=norm, **arguments
            )
            expected, expected_layers = theirs.forward_intermediates(
                images, norm=norm, **arguments
            )
            torch.testing.assert_close(tokens, expected)
            torch.testing.assert_close(layers, expected_layers)
        assert encoder.sequence_length == theirs.sequence_length

    def test_lightlys_names(self) -> None:
        encoder, theirs, images = self.wrappers("registers")
        tokens = encoder.images_to_tokens(images)
        torch.testing.assert_close(tokens, theirs.images_to_tokens(images))
        for name in ("prepend_prefix_tokens", "add_prefix_tokens"):
            prepended = getattr(encoder, name)(tokens)
            torch.testing.assert_close(prepended, getattr(theirs, name)(tokens))
        torch.testing.assert_close(
            encoder.add_pos_embed(prepended), theirs.add_pos_embed(prepended)
        )


class TestLightlysTraps:
    """What goes wrong in lightly's wrapper, see the issue that asked for ours."""

    @pytest.mark.parametrize("variant", ["registers", "DINOv2", "registers only"])
    def test_prefix_tokens_are_never_masked(self, variant: str) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        seen = []
        encoder.vit.blocks[0].register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        encoder.encode(images)
        encoder.encode_masked(images, mask)
        encoder.encode_masked(images, Mask(torch.ones_like(mask), 6))
        encoder.encode_visible(images, mask)
        prefix = encoder.num_prefix_tokens
        for tokens in seen[1:]:
            torch.testing.assert_close(tokens[:, :prefix], seen[0][:, :prefix])
        assert not torch.allclose(seen[1], seen[0])

    @pytest.mark.parametrize("no_embed_class", [False, True])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_sincos__no_embed_class_and_non_square(
        self, no_embed_class: bool, dynamic: bool
    ) -> None:
        encoder = masked_encoder(
            NAME,
            pos_embed="sincos",
            reg_tokens=3,
            no_embed_class=no_embed_class,
            dynamic_img_size=dynamic,
            **TINY,
        )
        prefix = 0 if no_embed_class else 4
        positions = encoder.vit.pos_embed
        assert positions.shape == (1, prefix + 24, 32)
        assert not positions.requires_grad
        assert positions[:, :prefix].abs().sum() == 0
        torch.testing.assert_close(positions[0, prefix:], sincos_positions((4, 6), 32))

    def test_weights_and_positions_are_kept(self) -> None:
        vit: Any = timm.create_model(NAME, num_classes=5, **TINY)
        before = {name: value.clone() for name, value in vit.state_dict().items()}
        encoder = masked_encoder(vit)
        after = encoder.state_dict()
        expected = {f"vit.{name}" for name in before if not name.startswith("head.")}
        assert set(after) == expected
        for name in expected:
            assert torch.equal(after[name], before[name.removeprefix("vit.")])
        assert encoder.vit is vit
        assert all(parameter.requires_grad for parameter in encoder.parameters())

    def test_mask_token_is_drawn(self) -> None:
        encoder = masked_encoder(NAME, **TINY | {"embed_dim": 512})
        assert encoder.mask_token is None
        assert "mask_token" not in encoder.state_dict()
        encoder.add_mask_token()
        token = encoder.mask_token
        assert token is not None
        assert token.shape == (1, 1, 512)
        assert 0.015 < token.std().item() < 0.025
        encoder.add_mask_token()
        assert encoder.mask_token is token


class TestTraining:
    @pytest.mark.parametrize("variant", ["class token", "parallel"])
    def test_set_drop_path__as_timm(self, variant: str) -> None:
        name, options, _ = VARIANTS[variant]
        options = {**TINY, **options, "depth": 4}
        encoder = masked_encoder(name, **options)
        for rate in (0.3, 0.1, 0.0):
            expected = timm.create_model(
                name, num_classes=0, drop_path_rate=rate, **options
            )
            encoder.set_drop_path(rate)
            assert repr(encoder.vit) == repr(expected)
            rates = [
                [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
                for model in (encoder.vit, expected)
            ]
            assert rates[0] == rates[1]
            assert bool(rates[0]) == (rate > 0)

    def test_set_drop_path__keeps_the_mode(self) -> None:
        encoder = build("class token")
        images, _ = draw(encoder)
        before = encoder(images)
        encoder.set_drop_path(0.9)
        torch.testing.assert_close(encoder(images), before)
        encoder.train()
        assert not torch.allclose(encoder(images), before)

    @pytest.mark.parametrize("rate", [-0.1, 1.0])
    def test_set_drop_path__out_of_range(self, rate: float) -> None:
        with pytest.raises(ValueError, match=r"lies in \[0, 1\)"):
            build("class token").set_drop_path(rate)

    def test_set_grad_checkpointing(self) -> None:
        encoder = build("registers").train()
        images, mask = draw(encoder)
        plain = encoder.encode_masked(images, mask)
        calls = []
        encoder.vit.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        encoder.set_grad_checkpointing()
        output = encoder.encode_masked(images, mask)
        assert_same_gradients(encoder, output, plain)
        assert len(calls) == 2
        encoder.set_grad_checkpointing(False)
        encoder.encode_masked(images, mask).sum().backward()
        assert len(calls) == 3

    def test_no_weight_decay(self) -> None:
        encoder = build("registers")
        expected = {"mask_token", "vit.cls_token", "vit.reg_token", "vit.pos_embed"}
        assert encoder.no_weight_decay() == expected
        plain = masked_encoder(NAME, **TINY)
        assert plain.no_weight_decay() == {"vit.cls_token", "vit.pos_embed"}

    def test_compile(self) -> None:
        encoder = build("registers")
        images, mask = draw(encoder)
        calls: list[Callable[[], Tensor]] = [
            lambda: encoder.encode_masked(images, Mask(mask, 2)),
            lambda: encoder.encode_visible(images, Mask(mask, 2)),
        ]
        for call in calls:
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(), call())

    def test_deepcopy_and_pickle(self) -> None:
        encoder = build("registers")
        images, mask = draw(encoder)
        expected = encoder.encode_masked(images, mask)
        for other in (
            copy.deepcopy(encoder),
            pickle.loads(pickle.dumps(encoder)),
        ):
            torch.testing.assert_close(other.encode_masked(images, mask), expected)
            assert other.options == encoder.options

    def test_bfloat16_autocast(self) -> None:
        encoder = build("registers")
        images, mask = draw(encoder)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masked = encoder.encode_masked(images, mask)
            visible = encoder.encode_visible(images, mask)
        for output, drop in ((masked, False), (visible, True)):
            expected = plain_encode(encoder, images, mask, drop)
            assert (output - expected).abs().mean() < 0.05


class TestUnsupported:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            (NAME, {"patch_drop_rate": 0.5}, "patch_drop_rate=0"),
            (
                NAME,
                {"dynamic_img_size": True, "dynamic_img_pad": True},
                "dynamic_img_pad=False",
            ),
            (NAME, {"global_pool": "map"}, "global_pool=''"),
        ],
    )
    def test_options(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            masked_encoder(name, **TINY, **options)

    def test_hybrid(self) -> None:
        with pytest.raises(ValueError, match=r"HybridEmbed.*without a hybrid stem"):
            masked_encoder("vit_tiny_r_s16_p8_224", embed_dim=24, depth=1, num_heads=2)

    def test_size_does_not_divide(self) -> None:
        # timm cuts off the rest without a word.
        with pytest.raises(ValueError, match=r"36 x 32 pixels.*patch_size 8 x 8"):
            masked_encoder(NAME, **TINY | {"img_size": (36, 32)})
        encoder = masked_encoder(NAME, dynamic_img_size=True, **TINY)
        with pytest.raises(ValueError, match=r"36 x 32 pixels.*patch_size 8 x 8"):
            encoder(torch.zeros(1, 3, 36, 32))

    def test_other_size(self) -> None:
        encoder = masked_encoder(NAME, **TINY)
        with pytest.raises(ValueError, match=r"32 x 48.*48 x 32.*img_size=\(48, 32\)"):
            encoder(torch.zeros(1, 3, 48, 32))
