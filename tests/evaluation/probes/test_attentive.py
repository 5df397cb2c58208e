from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.data.seeding import seed_from
from lightly_mim.evaluation.features import Features
from lightly_mim.evaluation.probes import attentive
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.evaluation.splits import assign_folds

RATES, DECAYS = [1e-3, 0.03], [0.0, 0.5]
KINDS = ["single", "efficient"]
DIM, QUERIES = 128, 4  # two heads, or four queries


def random_tokens(
    num_images: int = 23, num_tokens: int = 5, dim: int = DIM
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(num_images, num_tokens, dim, generator=generator).double()
    labels = torch.randint(3, (num_images,), generator=generator)
    return tokens * 2 + 1, labels


class PlainProbe(nn.Module):
    """One probe as the papers write it, with keys and values of every token."""

    def __init__(self, kind: str, dim: int, num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.heads = 2 if kind == "single" else QUERIES
        if kind == "single":
            self.query = nn.Parameter(torch.zeros(dim))
            self.key = nn.Linear(dim, dim, bias=False)
        else:
            self.query = nn.Parameter(torch.zeros(QUERIES, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.double()

    def load(self, probes: attentive.AttentiveProbes, i: int) -> None:
        """Takes the weights of probe i."""
        with torch.no_grad():
            self.query.copy_(probes.query[i].reshape(self.query.shape))
            if self.kind == "single":
                assert probes.key is not None
                self.key.weight.copy_(probes.key[i].flatten(0, 1))
            self.value.weight.copy_(probes.value[i].flatten(0, 1))
            self.head.weight.copy_(probes.weight[i])
            self.head.bias.copy_(probes.bias[i])

    def forward(self, tokens: Tensor) -> Tensor:
        num_images, _, dim = tokens.shape
        values = self.value(tokens).unflatten(2, (self.heads, -1))
        pooled = torch.zeros(num_images, self.heads, dim // self.heads).double()
        for image, head in itertools.product(range(num_images), range(self.heads)):
            if self.kind == "single":
                query = self.query.view(self.heads, -1)[head]
                keys = self.key(tokens[image]).unflatten(1, (self.heads, -1))[:, head]
            else:
                query, keys = self.query[head], tokens[image]
            attention = (keys @ query / math.sqrt(len(query))).softmax(dim=0)
            pooled[image, head] = attention @ values[image, :, head]
        logits: Tensor = self.head(self.norm(pooled.flatten(1)))
        return logits


@pytest.mark.parametrize("kind", KINDS)
def test_fit_attentive_grid__equals_training_alone(kind: attentive.Kind) -> None:
    tokens, labels = random_tokens()
    settings: dict[str, Any] = {"kind": kind, "queries": 4, "epochs": 3}
    settings |= {"batch_size": 8, "seed": 3}
    # The bound on the memory cuts the grid into single probes.
    for max_numbers in (1, 2**26):
        probes = attentive.fit_attentive_grid(
            tokens, labels, 3, RATES, DECAYS, max_numbers=max_numbers, **settings
        )
        state = probes.state_dict()
        assert state["weight"].shape == (4, 3, DIM)
        for i, pair in enumerate(itertools.product(RATES, DECAYS)):
            alone = attentive.fit_attentive_grid(
                tokens, labels, 3, [pair[0]], [pair[1]], **settings
            )
            for name, value in alone.state_dict().items():
                together = state[name].view(4, *value.view(1, -1).shape)[i]
                scale = float(value.abs().max())
                torch.testing.assert_close(
                    together, value.view(1, -1), rtol=1e-10, atol=1e-10 * scale
                )


@pytest.mark.parametrize("kind", KINDS)
def test_fit_attentive_grid__equals_plain_probes(kind: attentive.Kind) -> None:
    """Against modules with keys and values, trained one by one with PyTorch's AdamW."""
    tokens, labels = random_tokens(num_images=12, num_tokens=3)
    probes = attentive.fit_attentive_grid(
        tokens,
        labels,
        3,
        RATES,
        DECAYS,
        kind=kind,
        queries=QUERIES,
        epochs=2,
        batch_size=6,
        seed=3,
    ).eval()
    mean, std = tokens.mean(dim=(0, 1)), tokens.std(dim=(0, 1), correction=0)
    standardized = (tokens - mean) / std
    first = attentive.AttentiveProbes(
        1,
        3,
        Standardizer.fit(tokens),
        kind,
        QUERIES,
        seed_from(3, "attentive", "weights"),
    )
    for i, (rate, decay) in enumerate(itertools.product(RATES, DECAYS)):
        plain = PlainProbe(kind, DIM, 3)
        plain.load(first, 0)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 4))
        )
        generator = torch.Generator().manual_seed(seed_from(3, "attentive", "order"))
        for _ in range(2):
            order = torch.randperm(12, generator=generator)
            for index in (order[:6], order[6:]):
                optimizer.zero_grad()
                functional.cross_entropy(
                    plain(standardized[index]), labels[index]
                ).backward()
                optimizer.step()
                schedule.step()
        plain.eval()
        torch.testing.assert_close(
            probes(tokens)[i], plain(standardized), rtol=1e-7, atol=1e-7
        )


def test_attentive_probes__equal_multihead_attention() -> None:
    tokens, _ = random_tokens()
    generator = torch.Generator().manual_seed(1)
    probes = attentive.AttentiveProbes(2, 3, Standardizer.fit(tokens)).eval()
    for parameter in probes.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values)
    mean, std = tokens.mean(dim=(0, 1)), tokens.std(dim=(0, 1), correction=0)
    standardized = (tokens - mean) / std
    assert probes.key is not None
    for i, logits in enumerate(probes(tokens)):
        layer = nn.MultiheadAttention(DIM, 2, bias=False, batch_first=True).double()
        eye = torch.eye(DIM, dtype=torch.float64)
        key, value = probes.key[i].flatten(0, 1), probes.value[i].flatten(0, 1)
        layer.in_proj_weight.data.copy_(torch.cat([eye, key, value]))
        layer.out_proj.weight.data.copy_(eye)
        query = probes.query[i].view(1, 1, DIM).expand(len(tokens), -1, -1)
        pooled = layer(query, standardized, standardized)[0][:, 0]
        # Running statistics are 0 and 1, before any training.
        pooled = pooled / math.sqrt(1 + 1e-6)
        expected = functional.linear(pooled, probes.weight[i], probes.bias[i])
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_attentive_probes__gradient(kind: attentive.Kind) -> None:
    tokens, labels = random_tokens(num_images=5, num_tokens=3, dim=4)
    probes = attentive.AttentiveProbes(2, 3, Standardizer.fit(tokens), kind, 2)
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in probes.named_parameters()]
    inputs = [
        torch.randn(values.shape, generator=generator, dtype=torch.float64)
        for values in probes.parameters()
    ]

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        logits = torch.func.functional_call(probes, named, tokens)
        return functional.cross_entropy(logits.flatten(0, 1), labels.repeat(2))

    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in inputs])


def marked(num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """One token of 16 carries the class, in a sign that the mean does not show.

    It is told from the others by its first feature. All others have the class, too, of
    another image.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (num_images,), generator=generator)
    tokens = torch.randn(num_images, 16, 8, generator=generator) * 0.3
    place = torch.randint(16, (num_images,), generator=generator)
    rows = torch.arange(num_images)
    signs = torch.randint(2, (num_images, 16), generator=generator)
    signs[rows, place] = labels
    tokens[..., 1] += 2 * signs - 1.0
    tokens[rows, place, 0] += 4
    return tokens.half(), labels


@pytest.mark.parametrize("kind", KINDS)
def test_attentive__finds_the_token_that_tells(kind: attentive.Kind) -> None:
    train = Features({(3, "tokens"): marked(400, 0)[0]}, marked(400, 0)[1], [], 0.0)
    test = Features({(3, "tokens"): marked(200, 1)[0]}, marked(200, 1)[1], [], 0.0)
    protocol = attentive.Attentive(
        kind, queries=2, learning_rates=[1e-4, 0.03], weight_decays=[0.01], epochs=20
    )
    assert protocol.reads == "tokens"
    assert protocol.check(400) == []
    state = torch.get_rng_state()
    [outcome] = protocol(train, test, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert outcome.key == (3, "tokens")
    assert outcome.variant == ("" if kind == "single" else "efficient, 2")
    assert outcome.hyperparameters == {"learning_rate": 0.03, "weight_decay": 0.01}
    assert outcome.ranked.shape == (200, 2)
    assert float((outcome.ranked[:, 0] == test.labels).double().mean()) > 0.95
    again = protocol(train, test, 2, seed=1)
    assert torch.equal(again[0].ranked, outcome.ranked)


def test_choose_attentive__equals_a_held_out_part_by_hand() -> None:
    tokens, labels = random_tokens(num_images=40, dim=8)
    tokens[..., 0] += labels[:, None] * 2
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 10}
    grid_of = attentive.Attentive(
        learning_rates=RATES, weight_decays=DECAYS, num_parts=4, **settings
    )
    choice = attentive.choose_attentive(tokens, labels, 3, grid_of, seed=2)
    held_out = assign_folds(labels, 4, 2) == 0
    probes = attentive.fit_attentive_grid(
        tokens[~held_out], labels[~held_out], 3, RATES, DECAYS, seed=2, **settings
    ).eval()
    grid = []
    for pair, logits in zip(
        itertools.product(RATES, DECAYS), probes(tokens[held_out]), strict=True
    ):
        accuracy = (logits.argmax(dim=1) == labels[held_out]).double().mean()
        loss = functional.cross_entropy(logits, labels[held_out])
        grid.append((*pair, float(accuracy), float(loss)))
    best = max(grid, key=lambda row: (row[2], -row[3]))
    assert choice == pytest.approx(best, rel=1e-9)


def test_attentive__reads_a_batch_at_a_time() -> None:
    """No more than a batch is taken at a time, or a chunk for the statistics."""
    tokens, labels = random_tokens(num_images=40, dim=8)

    class Watched(Tensor):
        taken: list[int] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore
            parent: Any = super()
            result = parent.__torch_function__(func, types, args, kwargs or {})
            if func is Tensor.__getitem__:
                cls.taken.append(len(result))
                return result.as_subclass(Tensor)
            return result

    watched = tokens.as_subclass(Watched)
    plain = attentive.fit_attentive_grid(
        tokens, labels, 3, [0.01], [0.1], epochs=2, batch_size=16
    )
    probes = attentive.fit_attentive_grid(
        watched, labels, 3, [0.01], [0.1], epochs=2, batch_size=16
    )
    assert torch.equal(probes.weight, plain.weight)
    assert max(Watched.taken[-6:]) <= 16


def test_attentive__one_class_one_token_one_image_in_a_batch() -> None:
    tokens = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(0))
    data = Features({(0, "tokens"): tokens}, torch.zeros(5).long(), [], 0.0)
    protocol = attentive.Attentive(epochs=2, num_parts=2, batch_size=4)
    [outcome] = protocol(data, data, 1)
    assert torch.equal(outcome.ranked, torch.zeros(5, 1).long())
    assert outcome.selection[0]["accuracy"] == 1.0


def test_num_heads() -> None:
    expected = {32: 1, 64: 1, 192: 3, 384: 6, 768: 12, 200: 2, 130: 2, 97: 1}
    probes = {
        dim: attentive.AttentiveProbes(
            1, 2, Standardizer(torch.zeros(dim), torch.ones(dim))
        ).num_heads
        for dim in expected
    }
    assert probes == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "both"}, "kind of Attentive is one of"),
        ({"learning_rates": []}, "learning_rates of .* one or more"),
        ({"learning_rates": [0.0]}, "above 0, got learning_rates"),
        ({"weight_decays": []}, "weight_decays of .* one or more"),
        ({"weight_decays": [-1.0]}, "at least 0, got weight_decays"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 1}, "at least 2, got batch_size=1"),
        ({"queries": 0}, "at least 1"),
        ({"num_parts": 1}, "num_parts=1"),
        ({"num_parts": 31}, "num_folds=31 for 30 image"),
    ],
)
def test_attentive__bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attentive.Attentive(**settings).check(30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(5, 4)}, "not pooled features"),
        ({"tokens": torch.ones(4, 2, 4)}, "one number per image"),
        ({"labels": torch.full((5,), 3)}, r"lie in \[0, 3\)"),
        ({"kind": "efficient", "queries": 3}, "divisor of 4"),
    ],
)
def test_fit_attentive_grid__bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": torch.ones(5, 2, 4),
        "labels": torch.zeros(5, dtype=torch.int64),
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        attentive.fit_attentive_grid(**(arguments | change))
