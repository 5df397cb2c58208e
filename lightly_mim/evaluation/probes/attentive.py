"""Attentive probe: learned queries look at frozen patch tokens, a linear layer answers.

- [0]: CAPI, 2025, https://arxiv.org/abs/2502.08769 (`eval_classification.py`: one
  query, a head per 64 dimensions, AdamW, 10 learning rates x 3 weight decays, a tenth
  of the training images held out to choose among them)
- [1]: Psomas et al., Attention, Please!, 2025, https://arxiv.org/abs/2506.10178
  ("efficient probing": 32 queries, keys are the tokens themselves, each query takes its
  own share of the values)

Masked image modelling does not put what it knows in one token or in the mean. A probe
that may choose where to look tells more of such an encoder than a linear one.

All probes of the grid see the same batches, and their products are one product. Keys
and values of all tokens, which are what costs in an attention layer, are never made:
with queries that are the same for all images, q (K x) = (q K) x, and the average of the
tokens' values is the value of their average. The numbers are those of the plain layer,
with 20 times fewer multiplications for 64 tokens of 192 dimensions.

The tokens are standardised per dimension with the statistics of the training tokens,
and what has been pooled goes through a BatchNorm without affine parameters, as in [1]
and MAE. At first the attention is even and the values are the tokens themselves:
training starts at the linear probe of the mean.

Shapes: N images, T tokens, D features, C classes, G probes (learning rates times weight
decays), H queries or heads, B images in a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from lightly_mim.arguments import (
    AtLeastTwo,
    Device,
    NonEmpty,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    checked,
)
from lightly_mim.data.seeding import seed_from
from lightly_mim.evaluation.base import (
    Outcome,
    best_key,
    describe_choices,
    hyperparameters,
    rank_classes,
)
from lightly_mim.evaluation.features import Features
from lightly_mim.evaluation.probes.linear import (
    MAX_NUMBERS,
    GridChoice,
    best_probe,
    tally,
)
from lightly_mim.evaluation.probes.standardize import Standardizer, check_label_range
from lightly_mim.evaluation.splits import assign_folds, check_folds

Kind = Literal["single", "efficient"]

# Half of [0]'s number of learning rates and two of its three weight decays. On held-out
# training images of the solar cells, 30 epochs (420 steps) were as good as 60 or 100:
# 81.5 %, with a learning rate of 1e-3 where 60 epochs took 3e-4. [1] has 90 epochs, of
# far larger sets.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAYS = (0.01, 1.0)


@checked
@dataclass(frozen=True)
class Attentive:
    """The attentive probe: layer, learning rate and weight decay chosen on a part.

    Attributes:
        kind:
            "single" for one query with several heads, or "efficient" for several
            queries without key projection, see `fit_attentive_grid`.
        queries:
            Number of queries of the efficient kind; divides the number of features.
        learning_rates:
            Learning rates to choose from.
        weight_decays:
            Weight decays to choose from, each with each learning rate.
        epochs:
            Number of passes over the training tokens. Few, since a probe that looks at
            all tokens soon knows a small training set by heart.
        batch_size:
            Largest number of images in a batch.
        num_parts:
            Number of parts of the training set, stratified by class. One is held out
            to choose, a tenth in [0].
        max_numbers:
            Bounds the memory, see `fit_attentive_grid`.
    """

    name: ClassVar[str] = "attentive"
    reads: ClassVar[str] = "tokens"

    kind: Kind = "single"
    queries: PositiveInt = 32
    learning_rates: NonEmpty[PositiveFloat] = LEARNING_RATES
    weight_decays: NonEmpty[NonNegativeFloat] = WEIGHT_DECAYS
    epochs: PositiveInt = 30
    batch_size: AtLeastTwo = 128
    num_parts: AtLeastTwo = 10
    max_numbers: PositiveInt = MAX_NUMBERS

    def check(self, num_train: int) -> list[str]:
        """See `FeatureProtocol`."""
        check_folds(self.num_parts, num_train)
        return []

    def __call__(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Outcome]:
        """See `FeatureProtocol`. The seed decides part, first weights and order."""
        choices = {
            key: choose_attentive(
                values, train.labels, num_classes, self, seed=seed, device=device
            )
            for key, values in train.values.items()
        }
        key = best_key(choices)
        chosen = hyperparameters(choices[key])
        probe = fit_attentive_grid(
            train.values[key],
            train.labels,
            num_classes,
            [chosen["learning_rate"]],
            [chosen["weight_decay"]],
            **self._training(seed, device),
        )
        batches = test.values[key].split(self.batch_size)
        logits = torch.cat([probe(tokens.to(device))[0] for tokens in batches])
        ranked = rank_classes(logits).cpu()
        variant = "" if self.kind == "single" else f"{self.kind}, {self.queries}"
        return [Outcome(key, chosen, describe_choices(choices), ranked, variant)]

    def _training(self, seed: int, device: torch.device | str) -> dict[str, Any]:
        """Returns the arguments of `fit_attentive_grid` that the grid shares."""
        shared = "kind", "queries", "epochs", "batch_size", "max_numbers"
        given = {name: getattr(self, name) for name in shared}
        return given | {"seed": seed, "device": device}


@checked
class AttentiveProbes(nn.Module):
    """A number of attentive probes that look at the same tokens.

    With one query q, keys K x, values V x and the scaled scores of H heads, as in
    `torch.nn.MultiheadAttention` without output projection, which the linear layer
    behind it would swallow. A bias of the keys would change no score, and one of the
    values is taken away by the BatchNorm. The efficient kind has a query with D
    features per head, and no K.

    Every probe starts from the same weights. Queries and keys are drawn from a normal
    distribution with standard deviation 0.02, cut off at two of them, so that all
    tokens have about the same attention; V is the identity, the linear layer zero.

    Attributes:
        num_probes:
            G.
        num_heads:
            H: for the single kind the largest divisor of D that is at most D / 64, or
            1; for the efficient kind the number of queries.

    Raises:
        ValueError: If the number of features is not a multiple of that of queries.
    """

    def __init__(
        self,
        num_probes: int,
        num_classes: PositiveInt,
        standardize: Standardizer,
        kind: Kind = "single",
        queries: PositiveInt = 32,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        dim = len(standardize.mean)
        if kind == "efficient" and dim % queries:
            raise ValueError(
                f"Each of the queries takes an equal share of the {dim} features, got "
                f"queries={queries}. Use a divisor of {dim}."
            )
        self.num_probes = num_probes
        self.num_heads = queries if kind == "efficient" else _num_heads(dim)
        self.standardize = standardize
        share = dim // self.num_heads
        generator = Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            values = torch.empty(shape, dtype=torch.float64)
            nn.init.trunc_normal_(
                values, std=0.02, a=-0.04, b=0.04, generator=generator
            )
            return values

        def parameter(values: Tensor) -> nn.Parameter:
            values = values.to(standardize.mean)
            return nn.Parameter(values.repeat(num_probes, *[1] * values.ndim))

        if kind == "single":
            self.query = parameter(drawn(self.num_heads, share))
            self.key: nn.Parameter | None = parameter(drawn(self.num_heads, share, dim))
            self.scale = share**-0.5
        else:
            self.query = parameter(drawn(self.num_heads, dim))
            self.register_parameter("key", None)
            self.scale = dim**-0.5
        self.value = parameter(torch.eye(dim).view(self.num_heads, share, dim))
        self.weight = parameter(torch.zeros(num_classes, dim))
        self.bias = parameter(torch.zeros(num_classes))
        # One after the other, as functional.batch_norm has them.
        zeros = standardize.mean.new_zeros(num_probes * dim)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", zeros)
        self.register_buffer("running_var", torch.ones_like(zeros))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits with shape (num_probes, batch_size, num_classes).

        Args:
            tokens:
                Tensor with shape (batch_size, num_tokens, dim), as extracted.
        """
        tokens = self.standardize(tokens)
        batch_size, num_tokens = tokens.shape[:2]
        query = self.query * self.scale
        if self.key is not None:
            query = (query[:, :, None] @ self.key)[:, :, 0]
        # One product for the scores of all probes and heads, (B, T, GH).
        scores = tokens.flatten(0, 1) @ query.flatten(0, 1).T
        attention = scores.view(batch_size, num_tokens, -1).softmax(dim=1)
        pooled = (attention.mT @ tokens).transpose(0, 1)  # (GH, B, D)
        values = pooled @ self.value.flatten(0, 1).mT  # (GH, B, D / H)
        values = values.view(self.num_probes, self.num_heads, batch_size, -1)
        values = values.permute(2, 0, 1, 3).flatten(1)  # (B, GD)
        values = functional.batch_norm(
            values,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=0.1,
            eps=1e-6,  # MAE's
        )
        values = values.view(batch_size, self.num_probes, -1).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], values, self.weight.mT)


@checked
def fit_attentive_grid(
    tokens: Tensor,
    labels: Tensor,
    num_classes: PositiveInt,
    learning_rates: NonEmpty[PositiveFloat] = LEARNING_RATES,
    weight_decays: NonEmpty[NonNegativeFloat] = WEIGHT_DECAYS,
    *,
    rows: Tensor | None = None,
    kind: Kind = "single",
    queries: PositiveInt = 32,
    epochs: PositiveInt = 30,
    batch_size: AtLeastTwo = 128,
    max_numbers: PositiveInt = MAX_NUMBERS,
    seed: Seed = 0,
    device: Device = "cpu",
) -> AttentiveProbes:
    """Trains an attentive probe with each learning rate and decay, all at once.

    AdamW on the cross-entropy, cosine schedule to zero over all steps. All probes start
    from the same weights and see the same batches, so each one ends with the weights
    that it would have if trained alone.

    Args:
        tokens:
            Tensor with shape (num_images, num_tokens, dim), as extracted; read a batch
            at a time, so that it may be a memory-mapped file. The dtype of the
            computation is its dtype, but at least float32.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        learning_rates:
            The learning rates, not scaled by the batch size.
        weight_decays:
            Weight decays of AdamW, on all weights.
        rows:
            int64 tensor with the numbers of the images to train on. By default all.
        kind:
            "single" for the probe of [0] with one query, "efficient" for that of [1].
        queries:
            Number of queries of the efficient kind. Default from [1].
        epochs:
            Number of passes over the images.
        batch_size:
            Largest number of images in a batch, at least 2. An epoch is cut into
            batches of sizes as equal as possible.
        max_numbers:
            Bounds the memory: so many probes are trained together, but at least one, as
            keep weights, moments and activations below this many numbers. The others
            follow, in further passes over the tokens.
        seed:
            Decides the first weights and the order of the images.
        device:
            Where to compute.

    Returns:
        The probes in evaluation mode and without gradients, in the order of
        `itertools.product(learning_rates, weight_decays)`.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    _check_fit(tokens, labels, num_classes)
    rows = torch.arange(len(labels)) if rows is None else rows
    if len(rows) < 2:
        raise ValueError(
            "The BatchNorm of the attentive probe takes at least 2 training images, "
            f"got {len(rows)}."
        )
    standardize = Standardizer.fit(tokens, rows)
    standardize = Standardizer(*(values.to(device) for values in standardize))
    grid = list(itertools.product(learning_rates, weight_decays))

    def build(num_probes: int) -> AttentiveProbes:
        key = seed_from(seed, "attentive", "weights")
        return AttentiveProbes(num_probes, num_classes, standardize, kind, queries, key)

    one = build(1)
    num_tokens, dim = tokens.shape[1:]
    # Weights, gradient and two moments; scores, attention and pooled tokens with their
    # gradients.
    each = 4 * sum(values.numel() for values in one.parameters())
    each += 4 * batch_size * one.num_heads * (num_tokens + dim)
    size = max(1, (max_numbers - 2 * batch_size * num_tokens * dim) // each)
    states = []
    for start in range(0, len(grid), size):
        part = grid[start : start + size]
        probes = build(len(part))
        _train(probes, part, tokens, labels, rows, epochs, batch_size, seed)
        states.append(probes.state_dict())
    together = build(len(grid)).eval().requires_grad_(False)
    together.load_state_dict(
        {name: torch.cat([state[name] for state in states]) for name in states[0]}
    )
    return together


@checked
def choose_attentive(
    tokens: Tensor,
    labels: Tensor,
    num_classes: PositiveInt,
    settings: Attentive = Attentive(),
    *,
    seed: Seed = 0,
    device: Device = "cpu",
) -> GridChoice:
    """Chooses learning rate and weight decay on a held-out part of the training set.

    Ties go to the lower cross-entropy, then to the first probe.

    Args:
        tokens:
            Tensor with shape (num_images, num_tokens, dim) of the training images.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        settings:
            The grid, and how it is trained.
        seed:
            Decides part, first weights and order of the images.
        device:
            Where to compute.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    _check_fit(tokens, labels, num_classes)
    parts = assign_folds(labels, settings.num_parts, seed)
    probes = fit_attentive_grid(
        tokens,
        labels,
        num_classes,
        settings.learning_rates,
        settings.weight_decays,
        rows=(parts != 0).nonzero().flatten(),
        **settings._training(seed, device),
    )
    held_out = (parts == 0).nonzero().flatten()
    correct = torch.zeros(probes.num_probes, dtype=torch.int64)
    loss = torch.zeros(probes.num_probes, dtype=torch.float64)
    for index in held_out.split(settings.batch_size):
        logits = probes(tokens[index].to(device))
        hits, lost = tally(logits.mT, labels[index].to(device))
        correct += hits
        loss += lost
    grid = list(itertools.product(settings.learning_rates, settings.weight_decays))
    return best_probe(grid, correct, loss, len(held_out))


def _train(
    probes: AttentiveProbes,
    grid: Sequence[tuple[float, float]],
    tokens: Tensor,
    labels: Tensor,
    rows: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Trains the probes, each with its own learning rate and weight decay."""
    device = probes.bias.device
    together = list(probes.parameters())
    # PyTorch's AdamW sees each probe as a group of its own: slices of the weights of
    # all, in the same memory.
    slices = [[values.detach()[i] for values in together] for i in range(len(grid))]
    groups = [
        {"params": params, "lr": rate, "weight_decay": decay}
        for params, (rate, decay) in zip(slices, grid, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    generator = Generator().manual_seed(seed_from(seed, "attentive", "order"))
    # The BatchNorm takes two images, so that of three with a batch size of two there is
    # one batch.
    num_batches = max(1, min(math.ceil(len(rows) / batch_size), len(rows) // 2))
    step = 0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for index in order.tensor_split(num_batches):
            index = index.sort().values  # a file is read forwards
            target = labels[index].to(device).repeat(len(grid))
            logits = probes(tokens[index].to(device)).flatten(0, 1)
            loss = functional.cross_entropy(logits, target, reduction="sum")
            gradients = torch.autograd.grad(loss / len(index), together)
            # The fused kernel goes through memory as it lies, whatever the strides.
            parts = zip(*(g.contiguous().unbind() for g in gradients), strict=True)
            for params, part in zip(slices, parts, strict=True):
                for param, gradient in zip(params, part, strict=True):
                    param.grad = gradient
            cosine = 0.5 * (1 + math.cos(math.pi * step / (epochs * num_batches)))
            for group, (rate, _) in zip(optimizer.param_groups, grid, strict=True):
                group["lr"] = rate * cosine
            optimizer.step()
            step += 1


def _num_heads(dim: int) -> int:
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if not dim % heads)


def _check_fit(tokens: Tensor, labels: Tensor, num_classes: int) -> None:
    if tokens.ndim != 3 or not tokens.numel() or labels.shape != tokens.shape[:1]:
        raise ValueError(
            "Tokens have shape (num_images, num_tokens, dim) and labels one number per "
            f"image, got shapes {tuple(tokens.shape)} and {tuple(labels.shape)}. The "
            "attentive probe reads all patch tokens, not pooled features."
        )
    check_label_range(labels, num_classes)
