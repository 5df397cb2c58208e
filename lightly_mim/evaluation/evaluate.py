"""`evaluate(...)`: several protocols for one encoder, and baselines beside it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightly_mim.arguments import (
    InnerShare,
    NonEmpty,
    PositiveInt,
    Seed,
    Share,
    Workers,
    check_arguments,
    checked,
)
from lightly_mim.data import ImageDataset, keyed_random_state
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.sources import Data
from lightly_mim.encoders import Encoder, MaskedEncoder, Pool, resize_encoder
from lightly_mim.evaluation.base import FeatureProtocol, ImageProtocol
from lightly_mim.evaluation.classifier_files import CLASSIFIERS, save_classifier
from lightly_mim.evaluation.features import EncoderFeatures, Encoding, Precision
from lightly_mim.evaluation.foreign_encoders import AnyEncoder, RawPixels
from lightly_mim.evaluation.images import (
    EvaluationImages,
    image_notes,
    own_value_range,
    shared_notes,
)
from lightly_mim.evaluation.loading import (
    at_random,
    check_loading,
    describe_encoder,
    load_encoder,
    origin_notes,
)
from lightly_mim.evaluation.processes import World
from lightly_mim.evaluation.protocols import (
    LABEL_FREE,
    PROTOCOLS,
    ProtocolName,
    check_encoder,
    resolve_protocols,
)
from lightly_mim.evaluation.provenance import (
    choose_device,
    evaluation_record,
    model_name,
    to_json,
)
from lightly_mim.evaluation.results import (
    PIXELS,
    RANDOM,
    RESULTS_FILE,
    Result,
    Results,
    results_file,
    to_text,
)
from lightly_mim.evaluation.resume import Kept, Task, conditions
from lightly_mim.evaluation.runner import (
    Runner,
    check_labels_of,
    class_notes,
    num_images,
)
from lightly_mim.files import atomic_write
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.training.machine import (
    ONE,
    Layout,
    check_precision,
    choose_layout,
    start,
)
from lightly_mim.transforms import EvalTransform

Baseline = Literal["random", "pixels"]

# Images that settings are checked for before there are any.
_MANY = 1_000_000


@checked
def evaluate(
    encoder: Encoder | Path,
    data: Data,
    protocols: NonEmpty[ProtocolName | FeatureProtocol | ImageProtocol] = (
        "knn",
        "linear",
    ),
    *,
    val: Data | None = None,
    holdout: InnerShare | None = None,
    layers: NonEmpty[int] = (-1,),
    pools: NonEmpty[Pool] | None = None,
    baselines: Sequence[Baseline] = (),
    label_free: bool = False,
    out: Path | str | None = None,
    cache: Path | str | None = None,
    overwrite: bool = False,
    seed: Seed = 0,
    batch_size: PositiveInt = 64,
    num_workers: Workers | None = None,
    device: str | None = None,
    devices: int | str | list[int] | None = None,
    num_nodes: PositiveInt | None = None,
    compile: bool = False,
    precision: Precision = "32",
    on_error: OnError = "raise",
    value_range: ValueRange | None = None,
    crop_ratio: Share = 224 / 256,
    pixel_size: PositiveInt = 32,
    distributed: bool = False,
    progress: bool | None = None,
    **loading: Any,
) -> Results:
    """Evaluates an encoder on labelled images.

    For all protocols but two the encoder is frozen, and the images go through it once,
    resized and cropped at the centre, without augmentation. Layer, pooling and
    hyper-parameters are chosen on the training images; the test images are scored once
    with that choice.

    With `out`, features, finished rows and checkpoints are kept there as they come. An
    evaluation that was cut, called again with the same arguments, ends with the same
    numbers and makes nothing twice. That takes images in a folder or behind a name, or
    a data set that has a `fingerprint` (a string or number that changes with its
    images).

    Args:
        encoder:
            The directory of a pretraining run or its `encoder.safetensors`; a file or
            folder of published weights; the name of a timm model; or, in Python, a timm
            model, one of our encoders, one of lightly's, or a module with
            `feature_function`. See `load_encoder`.
        data:
            A folder with train/ and val/ and one folder per class in each; the name of
            a data set; or a data set of (image, label, filename). See
            `lightly_mim.data.open_data`.
        protocols:
            Names, for a protocol with its default settings, or protocols with yours:
            `["knn", Linear(epochs=30)]`. On features: "knn" (weighted k nearest
            neighbours), "linear" (linear probe, a grid trained at once), "logistic"
            (logistic regression), "low_label" (logistic regression on few images per
            class). On patch tokens: "attentive" (attentive probe). Through the encoder,
            with augmented images: "linear_mae" (MAE's linear probe), "finetune". One of
            your own is an object with a `name`, see
            `lightly_mim.evaluation.FeatureProtocol`.
        val:
            The test images, if they do not come with `data`.
        holdout:
            Share of the training images, in (0, 1), that is scored in place of the test
            images, which are not read; drawn class by class, by the seed. A data set
            from elsewhere is read once more for its labels. For settings
            that a protocol does not choose itself, such as those of "linear_mae" and
            "finetune": try them on held-out images first, and score the test images
            once.
        layers:
            Layers to choose from: blocks of a ViT or stages of a Swin, from 0, or from
            the end if negative. For protocols on features.
        pools:
            Poolings to choose from: "mean" of the patch tokens, "cls" for the class
            token, "cls+mean" for both. By default "mean", and "cls" if there is one.
        baselines:
            Any of "random" (the same encoder at random initialisation) and "pixels"
            (raw pixels, for protocols on pooled features), which go through the same
            protocols.
        label_free:
            Measure the training images' features without labels as well, see
            `lightly_mim.evaluation.label_free_measures`.
        out:
            Directory that `results.json` and `report.html` are written to, and the
            classifiers of "linear", "logistic" and "finetune", see `predict`.
        cache:
            Directory of features on disk, which several evaluations may share. By
            default features/ in `out`, or, without `out`, the memory of this process:
            mind the size of patch tokens then.
        overwrite:
            Replace a `results.json` that is there.
        seed:
            Seed of random weights, of the probes and of the intervals.
        batch_size:
            Number of images that are encoded at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        devices:
            How many devices of this kind of each machine, which of them, or "auto" for
            all: "linear_mae" and "finetune" train on them together, and protocols on
            features share the images out. Each has a process of its own, which runs the
            program from its beginning, as with Lightning. By default one device; give
            "auto" in a SLURM step, for one per task.
        num_nodes:
            Number of machines. By default 1, or with `devices` those of the SLURM step.
        compile:
            Compile what "linear_mae" and "finetune" train with `torch.compile`.
        precision:
            "32", "bf16" to compute in bfloat16 autocast, several times as fast where
            the hardware has it, or on GPUs "16" for float16 autocast.
        on_error:
            What an image does that cannot be read: "raise" an error that names it, or
            "skip", which leaves it out, says how many there were, by reason, and notes
            it. All images are read once more for that. For folders and named data sets.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits. By default those that a run was pretrained with, else
            (0, 65535). For folders.
        crop_ratio:
            Side of the central crop over that of the resized image. 1 for pictures
            whose margin counts.
        pixel_size:
            Side that images are resized to for the baseline "pixels".
        distributed:
            Share the images out over the processes of `torch.distributed`, which has
            been initialised (by torchrun and `init_process_group`) and whose processes
            all call this function with the same arguments. Features must be kept on a
            disk that they share. For protocols on features; each process runs those
            itself, and the first one writes. `devices` does the same and starts them.
        progress:
            Show progress bars. By default on a terminal.
        loading:
            Other arguments of `load_encoder`, such as `img_size=224`. Features and rows
            of a module with a `feature_function` are kept on disk if that has a
            `fingerprint`, a string or number that changes with what it does.

    Returns:
        One row per model, protocol and variant, notes, and what it takes to run it
        again.

    Raises:
        ValueError: If an argument is out of range, if the data has no labels or no test
            images, or if `out` holds results already. Nothing has been written then.
        OSError: If `out` or `cache` cannot be written.
    """
    given = dict(locals())
    if distributed and (devices is not None or num_nodes is not None):
        raise ValueError(
            "distributed is for processes that have found each other, and devices and "
            "num_nodes let them: pass one or the other."
        )
    chosen = resolve_protocols(protocols)
    for unused in _unused(given, chosen):
        warnings.warn(unused, stacklevel=3)
    file = None if out is None else results_file(Path(out), overwrite, RESULTS_FILE)
    loading = check_loading("evaluate", loading, PROTOCOLS)
    with keyed_random_state(seed, "evaluation", "encoder"):
        model = load_encoder(encoder, **loading)
    transform = EvalTransform(model.img_size, crop_ratio, normalize=None)
    show = sys.stdout.isatty() if progress is None else progress
    place, layout, world = _start(device, devices, num_nodes, distributed, precision)
    images = EvaluationImages(
        data,
        val,
        transform,
        model.in_chans,
        holdout,
        seed,
        num_workers,
        on_error,
        own_value_range(model, data, val) if value_range is None else value_range,
        world,
        show,
    )
    notes = origin_notes(model, resized=loading.get("img_size") is not None)
    notes += [*images.notes, *_check_images(chosen, images, holdout)]
    notes += image_notes(images.test, transform, model)
    notes += shared_notes(images.train, images.test)
    pools = _pools(model, layers, pools, notes)
    check_encoder(chosen, model, distributed)

    models = {model_name(encoder, model): model}
    models |= _baselines(baselines, model, seed, pixel_size)
    reads = {name: each.reads for name, each in chosen.items()}
    if label_free:
        reads[LABEL_FREE] = "pooled"
    if "pixels" in baselines and {*reads.values()} != {"pooled"}:
        skipped = [name for name, kind in reads.items() if kind != "pooled"]
        notes.append(f"No raw pixels for {', '.join(skipped)}, made for encoders.")
    tasks = [
        Task(name, protocol)
        for name, each in models.items()
        for protocol, kind in reads.items()
        if kind == "pooled" or not isinstance(each, RawPixels)
    ]
    shared = conditions(transform, model, precision, place)
    kept = Kept(models, (images.train, images.test), out, cache, shared)
    if world.size > 1 and kept.cache is None and {*reads.values()} != {"images"}:
        raise ValueError(
            "Processes share features through a directory on a disk: pass out or "
            "cache, and images in a folder, behind a name, or with a `fingerprint`."
        )
    settings = {"layers": list(layers), "pools": list(pools), "seed": seed}
    keys = {
        task: kept.row_key(task, chosen.get(task.protocol), settings) for task in tasks
    }
    runner = Runner(
        models,
        chosen,
        reads,
        images,
        kept,
        world,
        Encoding(batch_size, num_workers, place, precision, show),
        layers=layers,
        pools=pools,
        seed=seed,
        layout=layout,
        compile=compile,
    )
    saved = None if out is None or world.rank else Path(out) / CLASSIFIERS

    def run(task: Task) -> dict[str, Any]:
        row, outcomes = runner.run(task, keys[task])
        if saved is not None and task.model == tasks[0].model:
            for outcome in outcomes:
                save_classifier(
                    saved / f"{task.protocol}.safetensors",
                    outcome,
                    model,
                    None if isinstance(encoder, torch.nn.Module) else str(encoder),
                    row["classes"],
                    crop_ratio=crop_ratio,
                    value_range=images.value_range,
                )
        return row

    found = kept.rows(keys, runner.encode, run, world)
    rows = [Result(**row) for task in tasks for row in found[task]["rows"]]
    measures = [row for task in tasks for row in found[task]["measures"]]
    notes += class_notes(found[tasks[0]])
    if any(len(row.draws or ()) > 1 for row in rows):
        notes.append("± is the standard deviation over draws of the training images.")
    described = {
        "classes": found[tasks[0]]["classes"],
        "num_train": num_images(images.train),
        "num_test": num_images(images.test),
    }
    record = evaluation_record(given, chosen, describe_encoder(model), described)
    results = Results(rows, [*notes, *kept.notes], record, measures)
    world.wait()  # all have seen that there were no results
    if file is not None and world.rank == 0:
        with atomic_write(file) as temporary:
            temporary.write_text(to_text(results.to_dict()))
        for other in (file.parent / CLASSIFIERS).glob("*.safetensors"):
            if other.stem not in chosen:  # of an evaluation that was overwritten
                other.unlink()
        kept.clear(list(keys.values()))
        write_page_or_warn(file.parent)
    return results


@checked
def check_evaluation(
    encoder: MaskedEncoder | None, arguments: Mapping[str, Any]
) -> None:
    """Finds what `evaluate` would refuse of an encoder, without images or weights.

    Args:
        encoder:
            What stands for the encoder, for example on PyTorch's device "meta". An
            `img_size` among the arguments changes it. None checks the arguments alone.
        arguments:
            Arguments of `evaluate`, those of `load_encoder` included, by their names.
            Of those that are missing, the defaults are taken. `encoder` and `data` are
            not looked at.

    Raises:
        ValueError: If protocols, layers, poolings, image size or settings are out of
            range or do not fit the encoder.
    """
    parameters = inspect.signature(evaluate).parameters
    loading = {k: v for k, v in arguments.items() if k not in parameters}
    given = {p.name: p.default for p in parameters.values()} | dict(arguments)
    settled = parameters.keys() - {"encoder", "data", "loading"}
    check_arguments(evaluate, {name: given[name] for name in settled})
    loading = check_loading("evaluate", loading, PROTOCOLS)
    chosen = resolve_protocols(given["protocols"])
    for each in chosen.values():
        each.check(_MANY)
    if encoder is None:
        return
    _pools(encoder, given["layers"], given["pools"], [])
    check_encoder(chosen, encoder, given["distributed"])
    if (img_size := loading.get("img_size")) is not None:
        resize_encoder(encoder, img_size, loading.get("tables"))


def _start(
    device: str | None,
    devices: int | str | list[int] | None,
    num_nodes: int | None,
    distributed: bool,
    precision: Precision,
) -> tuple[torch.device, Layout, World]:
    """Returns where this process computes, and the processes that it works with.

    Those of `devices` and `num_nodes` are started, see `evaluate`.
    """
    place, layout = choose_device(device), ONE
    check_precision(precision, place)
    if devices is not None or num_nodes is not None:
        layout = choose_layout("auto" if devices is None else devices, num_nodes)
        place = start(layout, place.type)
    together = distributed or layout.world_size > 1
    return place, layout, World.distributed() if together else World()


def _check_images(
    chosen: Mapping[str, Any], images: EvaluationImages, holdout: float | None
) -> list[str]:
    """Lets protocols refuse the images, and returns what to say of their number."""
    train = images.train
    notes = [note for each in chosen.values() for note in each.check(num_images(train))]
    if isinstance(train, ImageDataset):
        check_labels_of(chosen.values(), torch.tensor(train.targets), train.classes)
    if holdout is not None:
        notes.append(
            f"Scored are {num_images(images.test)} held-out training images, not the "
            "test images."
        )
    return notes


def _baselines(
    names: Sequence[Baseline], model: AnyEncoder, seed: int, pixel_size: int
) -> dict[str, AnyEncoder]:
    """Returns what the encoder is compared with, by its name in the results."""
    found: dict[str, AnyEncoder] = {}
    if "random" in names:
        found[RANDOM] = at_random(model, seed)
    if "pixels" in names:
        pixels = RawPixels(model.img_size, model.in_chans, pixel_size)
        pixels.mean, pixels.std = model.mean, model.std
        found[PIXELS] = pixels
    return found


def _unused(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[str]:
    """Yields what to say of arguments of `evaluate` that nothing would read."""
    baselines = list(given["baselines"])
    unused = {}
    if all(each.reads == "images" for each in chosen.values()):
        if not given["label_free"]:
            why = f"protocols={list(chosen)} has none on features"
            unused = {"layers": why, "pools": why}
    if all(each.reads != "images" for each in chosen.values()):
        unused["compile"] = f"protocols={list(chosen)} has none that trains an encoder"
    if "pixels" not in baselines:
        unused["pixel_size"] = f"baselines={baselines} does not name 'pixels'"
    parameters = inspect.signature(evaluate).parameters
    for name, why in unused.items():
        if to_json(given[name]) != to_json(parameters[name].default):
            yield f"{name} does nothing here: {why}."


def _pools(
    model: AnyEncoder,
    layers: Sequence[int],
    pools: Sequence[Pool] | None,
    notes: list[str],
) -> Sequence[Pool]:
    """Returns the poolings to choose from, and refuses layers and poolings early."""
    if getattr(model, "names_features", False):
        if pools is not None or list(layers) != [-1]:
            raise ValueError(
                "feature_function decides what the features are: leave layers and "
                f"pools out, got layers={list(layers)} and pools={pools}."
            )
        return ()
    taken: list[Pool] = ["mean"] if pools is None else [*pools]
    if pools is None and model.has_class_token:
        taken.append("cls")
    elif pools is None and isinstance(model, MaskedEncoder):
        notes.append("The encoder has no class token: features are means of patches.")
    EncoderFeatures(model, layers, taken)
    return taken
