"""Measures speed and memory as ratios: every variant in one run, on one thread.

Variants take turns, round by round, in one process. What is compared is the process's
CPU time; what is reported is the median over the rounds of each round's ratio, with the
smallest and the largest. CPU time leaves waiting out, but not what other processes do
to the caches: take differences of less than a tenth for nothing.

`mae` shows what MAE saves by leaving the masked patches out of the encoder.
`masks` compares masks drawn for a batch at once with loops over the images.
`evaluation` compares kNN and linear probes with lightly's own and with plain loops.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

from studies.script import script  # isort: skip  # before PyTorch
import numpy as np
import pytorch_lightning as pl
import torch
from lightly.models import utils
from lightly.utils.benchmarking.knn import knn_predict
from lightly.utils.benchmarking.linear_classifier import LinearClassifier
from measuring.cpu import added_memory, forward_flops, processor, take_turns
from peers.masks import numpy_block, numpy_random
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightly_mim import MAE, masked_encoder
from lightly_mim.evaluation import Features, Linear, fit_linear_grid, knn_predict_grid
from lightly_mim.evaluation.probes.linear import LEARNING_RATES
from lightly_mim.masking import BlockMasking, RandomMasking
from lightly_mim.methods import CrossMAE, MaskTokenMAE
from lightly_mim.optim import build_optimizer
from lightly_mim.pretraining import default_precision
from lightly_mim.reporting.study import markdown_table

# What MAE is compared with is the paper's own ablation (table 1c): the same weights and
# decoder, with mask tokens in an encoder that sees all patches.
DENSE = "mask tokens in the encoder"
MAE_VARIANTS: dict[str, Callable[..., MAE]] = {
    DENSE: MaskTokenMAE,
    "visible patches only (MAE)": MAE,
    "the same, a third predicted by cross-attention (CrossMAE)": partial(
        CrossMAE, weighted_feature_maps=False
    ),
}

# BEiT's ratio and grid: the loops take longer for more.
NUM_MASKS, MASK_GRID, MASK_RATIO = 256, 14, 0.4
MASK_CALLS = 10  # of a round: one call takes a few milliseconds

# The sizes of Imagenette and of a part of ImageNet, in features of a ViT-S.
KNN_SIZES = {
    "Imagenette": (9_469, 3_925, 10),
    "ImageNet, a part": (100_000, 10_000, 1_000),
}
DIM = 384
K, TEMPERATURE = 200, 0.1  # lightly's defaults

EPILOG = """\
examples:
  python benchmarks/throughput.py mae                   the README's table, minutes
  python benchmarks/throughput.py masks                 seconds
  python benchmarks/throughput.py evaluation            the same for evaluation
  python benchmarks/throughput.py mae --encoder vit_large_patch16_224 --rounds 3
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    parser = argparse.ArgumentParser(
        prog="throughput.py",
        description=__doc__.split("\n\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    mae = commands.add_parser(
        "mae", help="MAE with visible patches only against all of them"
    )
    mae.add_argument("--encoder", default="vit_base_patch16_224", help="timm name")
    mae.add_argument("--batch-size", type=int, default=8, help="images in a step")
    mae.add_argument("--memory-of", choices=MAE_VARIANTS, help=argparse.SUPPRESS)
    masks = commands.add_parser("masks", help="a batch at once against image by image")
    evaluation = commands.add_parser("evaluation", help="kNN and linear probes")
    evaluation.add_argument(
        "--only", choices=["knn", "grid", "linear"], help="one of the three tables"
    )
    for each in (mae, masks, evaluation):
        each.add_argument("--rounds", type=int, default=5, help="default: 5")
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Prints the tables that were asked for."""
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is at least 1, got {arguments.rounds}.")
    torch.set_num_threads(1)
    if arguments.what == "mae" and arguments.memory_of:
        print(_peak_memory(arguments))
        return
    print(
        f"{processor()}, one thread, PyTorch {torch.__version__}, {command}",
        flush=True,
    )
    if arguments.what == "mae":
        _compare_mae(arguments)
        return
    if arguments.what == "masks":
        _compare_masks(arguments.rounds)
        return
    compare = {"knn": _compare_knn, "grid": _compare_grid, "linear": _compare_linear}
    for name, function in compare.items():
        if arguments.only in (None, name):
            function(arguments.rounds)


# MAE.


def _compare_mae(arguments: argparse.Namespace) -> None:
    steps = {name: _Step(arguments, name) for name in MAE_VARIANTS}
    timings = take_turns(steps, arguments.rounds)
    memories = {name: _memory_in_a_process(arguments, name) for name in MAE_VARIANTS}
    dense_memory = memories[DENSE]
    lines = [
        [
            name,
            f"{step.gigaflops('encoder'):.1f}",
            f"{step.gigaflops():.1f}",
            f"{1000 * median(timing.seconds) / arguments.batch_size:.0f}",
            timing.ratio(timings[0]),
            f"{memories[name]:,.0f}",
            f"{1 - memories[name] / dense_memory:.0%}",
        ]
        for (name, step), timing in zip(steps.items(), timings, strict=True)
    ]
    _print(
        f"Training steps of MAE, {arguments.encoder}, {arguments.batch_size} images, "
        f"{default_precision('cpu')}, {arguments.rounds} rounds",
        [
            "Variant",
            "Encoder GFLOPs",
            "All GFLOPs",
            "ms per image",
            "times as fast",
            "MiB of a step",
            "less",
        ],
        lines,
        "GFLOPs are those of one image forward, by PyTorch's counter. MiB are the peak "
        "of a process with this variant alone, over what it has between steps.",
    )


class _Step:
    """A training step of one variant on one batch, with weights of its own."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        torch.manual_seed(0)
        self.bf16 = default_precision("cpu") == "bf16-mixed"
        self.model = MAE_VARIANTS[name](arguments.encoder)
        self.model.choose_attention(torch.device("cpu"), self.bf16)
        self.images = torch.randn(arguments.batch_size, 3, *self.model.encoder.img_size)
        self.optimizer, _ = build_optimizer(
            self.model,
            self.model.recipe(),
            batch_size=arguments.batch_size,
            steps_per_epoch=1,
            total_steps=1000,
            no_weight_decay=self.model.no_weight_decay(),
        )

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.images).loss
        loss.backward()
        self.optimizer.step()

    def gigaflops(self, part: str = "") -> float:
        """Counts the forward pass of one image, or what a part of the model does."""

        def encode() -> None:
            mask, encoder = self.model.draw_mask(self.images), self.model.encoder
            if isinstance(self.model, MaskTokenMAE):
                encoder.encode_masked(self.images, mask)
            else:
                encoder.encode_visible(self.images, mask)

        whole = partial(self.model, self.images)
        flops = forward_flops(self.model, encode if part == "encoder" else whole)
        self.model.choose_attention(torch.device("cpu"), self.bf16)
        return flops / len(self.images) / 1e9


def _memory_in_a_process(arguments: argparse.Namespace, name: str) -> float:
    words = [sys.executable, __file__, "mae", "--memory-of", name]
    words += ["--encoder", arguments.encoder]
    words += ["--batch-size", str(arguments.batch_size)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_memory(arguments: argparse.Namespace) -> float:
    """Returns the MiB that a step takes over weights, gradients and Adam's averages."""
    step = _Step(arguments, arguments.memory_of)
    step()  # makes the state of the optimiser
    step.optimizer.zero_grad(set_to_none=False)
    return added_memory(step)


# Masks.


def _compare_masks(rounds: int) -> None:
    size = (16 * MASK_GRID, 16 * MASK_GRID)
    block, uniform = BlockMasking(16, MASK_RATIO), RandomMasking(16, MASK_RATIO)
    tables: dict[str, dict[str, Callable[[], Tensor]]] = {
        "Block-wise": {
            "BEiT's loop in NumPy, image by image": partial(_one_by_one, numpy_block),
            "lightly's random_block_mask": partial(
                utils.random_block_mask,
                (NUM_MASKS, MASK_GRID, MASK_GRID),
                batch_mask_ratio=1.0,
                min_image_mask_ratio=MASK_RATIO,
                max_image_mask_ratio=MASK_RATIO,
                min_num_masks_per_block=16,
            ),
            "ours, BlockMasking": lambda: block(NUM_MASKS, size).cells,
        },
        "Random": {
            "permutations in NumPy, image by image": partial(_one_by_one, numpy_random),
            "ours, RandomMasking": lambda: uniform(NUM_MASKS, size).cells,
        },
    }
    for name, variants in tables.items():
        timings = take_turns(
            {key: partial(_often, draw) for key, draw in variants.items()}, rounds
        )
        microseconds = 1e6 / (MASK_CALLS * NUM_MASKS)
        _print(
            f"{name} masks, {NUM_MASKS} of {MASK_GRID} x {MASK_GRID} patches, ratio "
            f"{MASK_RATIO}, {rounds} rounds of {MASK_CALLS}",
            ["Variant", "us per mask", "masked, mean", "ours is times as fast"],
            [
                [
                    key,
                    f"{microseconds * median(timing.seconds):.1f}",
                    f"{draw().sum().item() / NUM_MASKS:.1f}",
                    timings[-1].ratio(timing),
                ]
                for (key, draw), timing in zip(variants.items(), timings, strict=True)
            ],
            f"{math.ceil(MASK_RATIO * MASK_GRID**2)} patches are to be masked; the "
            "loops of BEiT and lightly may stop before.",
        )


def _often(draw: Callable[[], Tensor]) -> None:
    for _ in range(MASK_CALLS):
        draw()


def _one_by_one(draw: Callable[[int, int], np.ndarray]) -> Tensor:
    """Draws masks as the transform of a data set does, and collates them."""
    count = math.ceil(MASK_RATIO * MASK_GRID**2)
    masks = [draw(MASK_GRID, count) for _ in range(NUM_MASKS)]
    return torch.from_numpy(np.stack(masks))


# Evaluation.


def _compare_knn(rounds: int) -> None:
    for name, (num_train, num_test, num_classes) in KNN_SIZES.items():
        bank, labels = _features(num_train, num_classes, seed=0)
        queries, _ = _features(num_test, num_classes, seed=1)
        data = queries, bank, labels, num_classes
        lightly, ours = partial(_predict_lightly, *data), partial(_predict_ours, *data)
        timings = take_turns({"lightly": lightly, "ours": ours}, rounds)
        same = (lightly() == ours()).double().mean().item()
        _print(
            f"kNN, k = {K}, T = {TEMPERATURE}, {name}: {num_test:,} queries, "
            f"{num_train:,} x {DIM} features, {num_classes:,} classes, {rounds} rounds",
            ["Variant", "CPU seconds", "times as fast"],
            [
                ["lightly's knn_predict", str(timings[0]), "1"],
                ["ours", str(timings[1]), timings[1].ratio(timings[0])],
            ],
            f"{same:.4%} of the predictions are the same.",
        )


def _predict_lightly(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    bank = functional.normalize(bank, dim=1).T.contiguous()
    predictions = [
        knn_predict(
            functional.normalize(part, dim=1), bank, labels, num_classes, K, TEMPERATURE
        )[:, 0]
        for part in torch.split(queries, 256)  # the batches of its benchmarks
    ]
    return torch.cat(predictions)


def _predict_ours(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    predictions = knn_predict_grid(
        queries, bank, labels, num_classes, [K], [TEMPERATURE]
    )
    return predictions[0, 0, :, 0]


def _compare_grid(rounds: int) -> None:
    num_train, _, num_classes = KNN_SIZES["Imagenette"]
    features, labels = _features(num_train, num_classes, seed=0)
    epochs, batch_size = 10, 128
    fit = partial(
        fit_linear_grid,
        features,
        labels,
        num_classes,
        epochs=epochs,
        batch_size=batch_size,
    )

    def modules() -> None:
        for rate in LEARNING_RATES:
            _train_module(features, labels, num_classes, rate, epochs, batch_size)

    timings = take_turns(
        {
            "PyTorch": modules,
            "single": lambda: [fit([rate]) for rate in LEARNING_RATES],
            "grid": lambda: fit(LEARNING_RATES),
        },
        rounds,
    )
    names = [
        f"nn.Linear and torch.optim.SGD, {len(LEARNING_RATES)} runs",
        f"ours, {len(LEARNING_RATES)} runs of one rate",
        "ours, all at once",
    ]
    _print(
        f"{len(LEARNING_RATES)} learning rates of a linear probe, {num_train:,} x "
        f"{DIM} features, {num_classes} classes, {epochs} epochs in batches of "
        f"{batch_size}, {rounds} rounds",
        ["Variant", "CPU seconds", "times as fast"],
        [
            [name, str(timing), timing.ratio(timings[0])]
            for name, timing in zip(names, timings, strict=True)
        ],
        f"All at once is {timings[2].ratio(timings[1])} times as fast as our own "
        "single runs.",
    )


def _train_module(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
) -> None:
    probe = nn.Linear(features.shape[1], num_classes)
    optimizer = torch.optim.SGD(probe.parameters(), learning_rate, momentum=0.9)
    num_batches = math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * num_batches
    )
    for _ in range(epochs):
        for index in torch.randperm(len(features)).tensor_split(num_batches):
            optimizer.zero_grad()
            functional.cross_entropy(probe(features[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()


def _compare_linear(rounds: int) -> None:
    """Compares lightly's linear protocol with ours, on few images and scaled up."""
    num_train, num_test, num_classes = KNN_SIZES["Imagenette"]
    few, epochs = 64, 90
    encoder = masked_encoder("vit_small_patch16_224").eval()
    images = torch.randn(few, 3, 224, 224)
    labels = torch.arange(few) % num_classes
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)

    def lightly() -> None:
        probe = LinearClassifier(
            encoder, 32, feature_dim=DIM, num_classes=num_classes, topk=(1, 5)
        )
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(probe, loader)

    def ours() -> None:
        with torch.no_grad():
            for batch, _ in loader:
                encoder(batch)

    timings = take_turns({"lightly": lightly, "ours": ours}, rounds)
    train, train_labels = _features(num_train, num_classes, seed=0)
    test, test_labels = _features(num_test, num_classes, seed=1)
    start = time.process_time()
    _run_linear(train, train_labels, test, test_labels, num_classes)
    probe_seconds = time.process_time() - start
    passes = epochs * (num_train + num_test)  # it scores the test images every epoch
    lightly_seconds = median(timings[0].seconds) / few * passes
    encoding = median(timings[1].seconds) / few * (num_train + num_test)
    our_seconds = encoding + probe_seconds
    _print(
        f"Linear protocol, ViT-S/16 at 224 pixels in float32, {num_train:,} training "
        f"and {num_test:,} test images",
        ["Variant", "CPU seconds", "times as fast"],
        [
            [
                f"lightly's LinearClassifier, {epochs} epochs, one rate",
                f"{lightly_seconds:,.0f} (scaled)",
                "1",
            ],
            [
                f"ours, {len(LEARNING_RATES)} rates, cross-validated",
                f"{our_seconds:,.0f} (encoding scaled: {encoding:,.0f})",
                f"{lightly_seconds / our_seconds:.0f}",
            ],
        ],
        f"Passes through the encoder were measured on {few} images in memory and "
        "scaled by count; our probe was measured at full size. lightly's protocol "
        "augments the training images in every epoch, ours sees each image once.",
    )


def _run_linear(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int
) -> None:
    key = (-1, "mean")
    Linear()(
        Features({key: train}, labels, [], 0.0),
        Features({key: test}, test_labels, [], 0.0),
        num_classes,
    )


def _features(count: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws features around the centres of classes, about as far apart as real ones."""
    centres = torch.randn(num_classes, DIM, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    noise = torch.randn(count, DIM, generator=generator)
    return centres[labels] + 4 * noise, labels


def _print(
    title: str, header: Sequence[str], lines: Sequence[Sequence[str]], note: str
) -> None:
    print(f"\n{title}\n\n{markdown_table(header, lines)}\n{note}", flush=True)


if __name__ == "__main__":
    main()
