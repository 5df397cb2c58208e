from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lightly_mim.encoders import MaskedEncoder, masked_encoder, pool_tokens
from lightly_mim.masking import Mask

VIT = "vit_tiny_patch16_224"
BEIT = "beit_base_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
SWIN_V2 = "swinv2_tiny_window8_256"
PLAIN: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_size": (4, 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    VIT: {**PLAIN, "reg_tokens": 2, "pos_embed": "sincos"},
    BEIT: {**PLAIN, "init_values": 0.1},
    SWIN: STAGES,
    SWIN_V2: {**STAGES, "pretrained_window_sizes": (0, 0)},
}
SIZE = (32, 48)
MASK = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]).bool().view(2, 2, 3)


def build(name: str = VIT, in_chans: int = 3, **changes: Any) -> MaskedEncoder:
    torch.manual_seed(0)
    options = {**OPTIONS[name], **changes}
    return masked_encoder(name, img_size=SIZE, in_chans=in_chans, **options).eval()


def images(channels: int = 3, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", OPTIONS)
class TestContract:
    def test_is_lightlys(self, name: str) -> None:
        encoder = build(name)
        assert isinstance(encoder, MaskedVisionTransformer)
        tokens = encoder.images_to_tokens(images())
        sequence = encoder.prepend_prefix_tokens(tokens)
        assert sequence.shape[:2] == (2, encoder.sequence_length)
        torch.testing.assert_close(
            encoder.add_pos_embed(sequence), encoder.preprocess(images())
        )
        assert encoder(images()).shape == (2, encoder.feature_dim)

    def test_rebuild_from_record(self, name: str) -> None:
        encoder = build(name, in_chans=2)
        record = json.loads(
            json.dumps(
                {
                    "encoder": encoder.name,
                    "img_size": encoder.img_size,
                    "in_chans": encoder.in_chans,
                    "pos_embed": encoder.pos_embed,
                    **encoder.options,
                }
            )
        )
        again = masked_encoder(**record).eval()
        again.vit.load_state_dict(encoder.vit.state_dict())
        torch.testing.assert_close(again(images(2)), encoder(images(2)))
        assert again.options == encoder.options
        assert repr(again.vit) == repr(encoder.vit)

    def test_state_dict_names(self, name: str) -> None:
        encoder = build(name)
        encoder.add_mask_token()
        names = set(encoder.state_dict())
        config = {k: v for k, v in OPTIONS[name].items() if k != "pos_embed"}
        expected = timm.create_model(name, num_classes=0, img_size=SIZE, **config)
        assert names == {f"vit.{one}" for one in expected.state_dict()} | {"mask_token"}

    def test_mask_token_is_missing(self, name: str) -> None:
        encoder: Any = build(name)
        idx_mask = torch.tensor([[3], [4]])
        mask = torch.zeros(2, encoder.sequence_length, dtype=torch.bool)
        calls: list[Callable[[], Any]] = [
            lambda: encoder.encode(images(), idx_mask=idx_mask),
            lambda: encoder.encode(images(), mask=mask),
            lambda: encoder.encode_masked(images(), MASK),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"Call add_mask_token\(\)"):
                call()

    def test_wrong_images(self, name: str) -> None:
        encoder: Any = build(name)
        encoder.add_mask_token()
        for call in (
            encoder,
            encoder.encode,
            encoder.images_to_tokens,
            encoder.feature_map,
            encoder.embed,
            lambda x: encoder.encode_masked(x, MASK),
        ):
            with pytest.raises(ValueError, match=r"\(batch_size, 3, height.*in_chans"):
                call(images(1))
            with pytest.raises(ValueError, match="batch_size, 3, height"):
                call(images()[0])
            with pytest.raises(ValueError, match=r"got torch\.uint8\. Convert"):
                call(images().to(torch.uint8))
            with pytest.raises(ValueError, match=r"img_size=\(48, 32\)"):
                call(images(size=(48, 32)))

    def test_wrong_masks(self, name: str) -> None:
        encoder: Any = build(name)
        encoder.add_mask_token()
        for wrong in (MASK.float(), MASK[0], MASK[:, 0]):
            with pytest.raises(
                ValueError, match=r"bool tensor with shape \(batch_size"
            ):
                encoder.encode_masked(images(), wrong)
        for masks in (MASK[:1], Mask(MASK[:1], 2), MASK.repeat(2, 1, 1)):
            with pytest.raises(ValueError, match=rf"2 images and {len(masks)} masks"):
                encoder.encode_masked(images(), masks)
        coarse = torch.eye(5, 3, dtype=torch.bool).expand(2, -1, -1)
        with pytest.raises(ValueError, match=r"5 x 3 cells.*grid of \d+ x \d+"):
            encoder.encode_masked(images(), coarse)
        with pytest.raises(ValueError, match=r"one entry per token.*encode_masked"):
            encoder.encode(images(), mask=MASK.flatten(1))
        with pytest.raises(ValueError, match="cannot both be set"):
            encoder.encode(images(), idx_mask=MASK[:, 0].long(), mask=MASK)

    def test_a_mask_and_its_tensor_are_the_same(self, name: str) -> None:
        encoder = build(name)
        encoder.add_mask_token()
        calls = [encoder.encode_masked]
        if encoder.can_drop_tokens:
            calls.append(encoder.encode_visible)
        fine = Mask(MASK, 2).on(encoder.grid)
        for call in calls:
            expected = call(images(), MASK)
            for mask in (Mask(MASK, 2), fine, fine.cells):
                torch.testing.assert_close(
                    call(images(), mask), expected, rtol=0, atol=0
                )

    def test_cell_tokens(self, name: str) -> None:
        encoder = build(name)
        encoder.add_mask_token()
        tokens = encoder.encode_masked(images(), MASK)
        height, width = encoder.stride
        cells = encoder.cell_tokens(tokens)
        assert cells.shape == (2, 32 // height * 48 // width, encoder.embed_dim)
        assert torch.equal(cells, tokens[:, tokens.shape[1] - cells.shape[1] :])
        unmasked = encoder.cell_tokens(encoder.encode(images()))
        assert torch.equal(
            encoder.feature_map(images()).flatten(2).transpose(1, 2), unmasked
        )

    @pytest.mark.parametrize("layer", [-3, 2])
    def test_wrong_layer(self, name: str, layer: int) -> None:
        with pytest.raises(ValueError, match=rf"layers 0 to 1 .*got {layer}"):
            build(name).embed(images(), layer=layer)

    @pytest.mark.parametrize("in_chans", [1, 2, 3])
    def test_statistics(self, name: str, in_chans: int) -> None:
        # timm's own for an untrained model are those of weights that it does not have.
        encoder = build(name, in_chans=in_chans)
        if in_chans == 3:
            assert encoder.mean == IMAGENET_DEFAULT_MEAN
            assert encoder.std == IMAGENET_DEFAULT_STD
        else:
            assert encoder.mean == pytest.approx([0.449] * in_chans)
            assert encoder.std == pytest.approx([0.226] * in_chans)


class TestEncodeVisible:
    def test_wrong_masks(self) -> None:
        encoder = build()
        uneven = torch.zeros(2, 2, 3, dtype=torch.bool)
        uneven[0, 0, 0] = True
        with pytest.raises(ValueError, match="same number of masked cells"):
            encoder.encode_visible(images(), uneven)
        for wrong in (MASK[0], MASK[0, 0], MASK.float()):
            with pytest.raises(ValueError, match="bool tensor with shape"):
                encoder.encode_visible(images(), wrong)
        for masks in (MASK[:1], Mask(MASK[:1], 2)):
            with pytest.raises(ValueError, match="2 images and 1 masks"):
                encoder.encode_visible(images(), masks)

    def test_needs_no_mask_token(self) -> None:
        # 2 of 6 cells, each with 4 of the 24 patches, are masked.
        assert build().encode_visible(images(), MASK).shape == (2, 3 + 16, 32)

    def test_sorts_a_mask_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = build()
        mask = Mask(MASK, 2).on(encoder.grid)
        sorts = []
        argsort = Tensor.argsort

        def count(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
            sorts.append(1)
            return argsort(self, *arguments, **options)

        monkeypatch.setattr(Tensor, "argsort", count)
        mask.index()
        encoder.encode_visible(images(), mask)
        encoder.encode_visible(images(), mask)
        assert len(sorts) == 1

    def test_does_not_look_at_masked_patches(self) -> None:
        encoder = build()
        mask = torch.zeros(2, 2, 3, dtype=torch.bool)
        mask[:, 0] = True
        changed = images()
        changed[:, :, :16] = float("nan")
        expected = encoder.encode_visible(images(), mask)
        torch.testing.assert_close(encoder.encode_visible(changed, mask), expected)
        encoder.add_mask_token()
        output = encoder.encode_masked(changed, mask)
        torch.testing.assert_close(output, encoder.encode_masked(images(), mask))


class TestPoolTokens:
    tokens = torch.tensor([[[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [5.0, 8.0]]])

    def test_pools(self) -> None:
        mean, cls = [4.0, 6.0], [1.0, 2.0]
        assert pool_tokens(self.tokens, 2).tolist() == [mean]
        assert pool_tokens(self.tokens, 2, "cls").tolist() == [cls]
        assert pool_tokens(self.tokens, 2, "cls+mean").tolist() == [cls + mean]

    def test_wrong(self) -> None:
        with pytest.raises(ValueError, match=r"mean, cls, cls\+mean, got 'max'"):
            pool_tokens(self.tokens, 2, "max")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"there is none\. Use 'mean'"):
            pool_tokens(self.tokens, 0, "cls")

    def test_registers_are_no_class_token(self) -> None:
        encoder = build(class_token=False, global_pool="")
        assert encoder.num_prefix_tokens == 2
        with pytest.raises(ValueError, match="this encoder has none"):
            encoder.embed(images(), pool="cls")


class TestMaskedEncoder:
    def test_size_of_timm_by_default(self) -> None:
        config: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        encoder = masked_encoder(VIT, **config)
        assert encoder.img_size == (224, 224)
        assert encoder.sequence_length == 1 + 14 * 14
        assert masked_encoder(VIT, img_size=64, **config).img_size == (64, 64)

    def test_record(self) -> None:
        encoder = build()
        assert encoder.name == VIT
        assert encoder.options == {**PLAIN, "reg_tokens": 2}
        assert encoder.pos_embed == "sincos"

    def test_pretrained_weights_are_kept(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        config: dict[str, Any] = {"img_size": SIZE, **PLAIN}
        vit: Any = timm.create_model(VIT, num_classes=5, **config)
        path = tmp_path / "weights.pth"
        torch.save(vit.state_dict(), path)
        overlay = {"file": str(path), "custom_load": False, "num_classes": 5}
        encoder = masked_encoder(
            VIT, pretrained=True, pretrained_cfg_overlay=overlay, **config
        )
        for name, value in encoder.vit.state_dict().items():
            assert torch.equal(value, vit.state_dict()[name])
        # The statistics of the weights, which are not ImageNet's.
        assert encoder.mean == encoder.std == (0.5, 0.5, 0.5)
        grey = masked_encoder(
            VIT, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay, **config
        )
        assert grey.mean == grey.std == (0.5,)

    def test_learned_positions(self) -> None:
        vit: Any = timm.create_model(VIT, img_size=SIZE, **PLAIN)
        vit.pos_embed.requires_grad_(False)
        before = vit.pos_embed.clone()
        encoder = masked_encoder(vit, pos_embed="learned")
        assert encoder.pos_embed == "learned"
        assert encoder.vit.pos_embed.requires_grad
        assert torch.equal(encoder.vit.pos_embed, before)

    def test_module(self) -> None:
        vit: Any = timm.create_model(VIT, img_size=SIZE, in_chans=2, **PLAIN)
        encoder = masked_encoder(vit)
        assert encoder.vit is vit
        assert encoder.name is None
        assert encoder.options == {}
        assert encoder.in_chans == 2
        assert masked_encoder(vit, img_size=SIZE, in_chans=2).vit is vit
        assert not isinstance(vit.head, nn.Linear)

    def test_masked_encoder(self) -> None:
        encoder = build()
        assert masked_encoder(encoder) is encoder
        assert masked_encoder(encoder, img_size=SIZE) is encoder

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"img_size": 64}, r"img_size=\(32, 48\), got img_size=64"),
            ({"in_chans": 4}, r"in_chans=3, got in_chans=4"),
            ({"pretrained": True}, r"timm\.create_model"),
            ({"depth": 3}, r"\['depth'\] to timm\.create_model"),
        ],
    )
    def test_module__other_arguments(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        vit: Any = timm.create_model(VIT, img_size=SIZE, **PLAIN)
        for encoder in (vit, build()):
            with pytest.raises(ValueError, match=message):
                masked_encoder(encoder, **arguments)

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            (
                "vit_tny_patch16_224",
                {},
                r"no model.*Did you mean.*vit_tiny_patch16_224",
            ),
            ("zzzzzz", {}, r"no model 'zzzzzz'\. Supported are.*Beit"),
            (VIT, {"dpth": 2}, r"cannot build.*'dpth': 2.*unexpected keyword"),
            (VIT, {"global_pool": "sum"}, r"cannot build.*pooling"),
            ("resnet10t", {"img_size": 64}, r"cannot build.*Supported are.*Beit"),
            ("resnet10t", {}, r"ResNet is not supported.*VisionTransformer, Beit"),
            (VIT, {"norm_layer": nn.LayerNorm}, r"as JSON.*timm\.create_model"),
            (VIT, {"pos_embed": "sine"}, r"'learned', 'sincos', got pos_embed='sine'"),
            (SWIN, {"pos_embed": "sincos"}, r"SwinTransformer was built without abs"),
            (VIT, {"img_size": (32, 0)}, r"img_size of .*\(32, 0\)"),
        ],
    )
    def test_bad_input(
        self, name: str, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            masked_encoder(name, **arguments)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("test_convnext", {}),
            ("deit_tiny_distilled_patch16_224", {"embed_dim": 32, "num_heads": 2}),
            ("test_vit_relpos", {}),
        ],
    )
    def test_unsupported_families(self, name: str, options: dict[str, Any]) -> None:
        # Two resemble a VisionTransformer but embed or attend differently.
        with pytest.raises(ValueError, match=r"is not supported\. Supported are"):
            masked_encoder(timm.create_model(name, **options))

    @pytest.mark.parametrize(
        "name",
        [VIT, "vit_base_patch16_clip_224", "eva02_tiny_patch14_224", BEIT, SWIN],
    )
    def test_module__is_normalised_as_timm_says(self, name: str) -> None:
        options = STAGES if name == SWIN else PLAIN
        vit: Any = timm.create_model(name, img_size=SIZE, **options)
        encoder = masked_encoder(vit)
        assert encoder.mean == tuple(vit.pretrained_cfg["mean"])
        assert encoder.std == tuple(vit.pretrained_cfg["std"])
        assert f"mean={encoder.mean}" in repr(encoder)
        # What the same name is built with for weights of one's own.
        new = masked_encoder(name, img_size=SIZE, **options)
        assert new.mean == IMAGENET_DEFAULT_MEAN
        assert new.std == IMAGENET_DEFAULT_STD
        # An encoder keeps what it has.
        encoder.mean = (0.1, 0.2, 0.3)
        assert masked_encoder(encoder).mean == (0.1, 0.2, 0.3)

    @pytest.mark.parametrize("in_chans", [1, 2, 5])
    def test_module__other_channels(self, in_chans: int) -> None:
        for name, mean, std in ((VIT, 0.5, 0.5), (SWIN, 0.449, 0.226)):
            options = STAGES if name == SWIN else PLAIN
            vit: Any = timm.create_model(
                name, img_size=SIZE, in_chans=in_chans, **options
            )
            encoder = masked_encoder(vit)
            assert encoder.mean == pytest.approx((mean,) * in_chans)
            assert encoder.std == pytest.approx((std,) * in_chans)

    def test_module__that_says_nothing(self) -> None:
        vit: Any = timm.create_model(VIT, img_size=SIZE, **PLAIN)
        for config in ({}, None, {"mean": None, "std": None}):
            vit.pretrained_cfg = config
            assert masked_encoder(vit).mean == IMAGENET_DEFAULT_MEAN
