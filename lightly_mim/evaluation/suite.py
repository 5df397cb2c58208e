"""`evaluate(...)`: several protocols for one encoder, and baselines beside it.

Every choice (layer, pooling, k, temperature, learning rate) is made on training images;
the test images are scored once per protocol, with that choice.

Protocols on features share one pass over the images. Each row is kept as soon as it is
there, so an evaluation that was cut goes on with what is missing.
"""

from __future__ import annotations

import inspect
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

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
from lightly_mim.data import (
    ImageDataset,
    KeyedLoader,
    keyed_random_state,
    seed_from,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.notes import printable, some
from lightly_mim.data.sources import Data
from lightly_mim.encoders import (
    Encoder,
    MaskedEncoder,
    Pool,
    choose_attention,
    resize_encoder,
)
from lightly_mim.encoders.base import AnyPool
from lightly_mim.encoders.tables import Tables
from lightly_mim.evaluation.adaptors import (
    FeatureEncoder,
    FunctionEncoder,
    ModuleFunction,
)
from lightly_mim.evaluation.attentive import Attentive
from lightly_mim.evaluation.cache import World, cached_features
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    FunctionFeatures,
    PixelFeatures,
    Precision,
    collect_features,
    evaluating,
)
from lightly_mim.evaluation.finetune import FineTune
from lightly_mim.evaluation.images import (
    EvaluationImages,
    class_names,
    image_notes,
    own_value_range,
    read_labels,
    shared_notes,
)
from lightly_mim.evaluation.keeper import Keeper, Task
from lightly_mim.evaluation.knn import KNN
from lightly_mim.evaluation.linear import Linear
from lightly_mim.evaluation.linear_mae import LinearMAE
from lightly_mim.evaluation.loading import (
    at_random,
    describe_encoder,
    load_encoder,
    origin_notes,
)
from lightly_mim.evaluation.logistic import Logistic
from lightly_mim.evaluation.low_label import LowLabel
from lightly_mim.evaluation.protocol import LabelledImages, Outcome
from lightly_mim.evaluation.rank import label_free as measure_features
from lightly_mim.evaluation.record import (
    choose_device,
    model_name,
    package_versions,
    results_file,
    to_json,
    to_text,
)
from lightly_mim.evaluation.results import (
    PIXELS,
    RANDOM,
    RESULTS_FILE,
    Result,
    Results,
)
from lightly_mim.evaluation.scores import score
from lightly_mim.files import atomic_write
from lightly_mim.patches import Size
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.transforms import EvalTransform

ProtocolName = Literal[
    "knn", "linear", "logistic", "attentive", "low_label", "linear_mae", "finetune"
]
Baseline = Literal["random", "pixels"]

IMAGE_PROTOCOLS = ("linear_mae", "finetune")
LABEL_FREE = "label_free"


# Images that settings are checked for before there are any.
_MANY = 1_000_000


@checked
def evaluate(
    encoder: Encoder | Path,
    data: Data,
    protocols: NonEmpty[ProtocolName] = ("knn", "linear"),
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
    precision: Precision = "32",
    on_error: OnError = "raise",
    value_range: ValueRange | None = None,
    crop_ratio: Share = 224 / 256,
    pixel_size: PositiveInt = 32,
    img_size: Size | None = None,
    tables: Tables | None = None,
    in_chans: PositiveInt = 3,
    pretrained: bool = True,
    feature_function: ModuleFunction | None = None,
    knn: KNN = KNN(),  # noqa: B008, frozen
    linear: Linear = Linear(),  # noqa: B008, frozen
    logistic: Logistic = Logistic(),  # noqa: B008, frozen
    attentive: Attentive = Attentive(),  # noqa: B008, frozen
    low_label: LowLabel = LowLabel(),  # noqa: B008, frozen
    linear_mae: LinearMAE = LinearMAE(),  # noqa: B008, frozen
    finetune: FineTune = FineTune(),  # noqa: B008, frozen
    distributed: bool = False,
    progress: bool | None = None,
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
            Any of these. On features: "knn" (weighted k nearest neighbours), "linear"
            (linear probe, a grid trained at once), "logistic" (logistic regression),
            "low_label" (logistic regression on few images per class). On patch tokens:
            "attentive" (attentive probe). Through the encoder, with augmented images:
            "linear_mae" (MAE's linear probe), "finetune".
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
            `lightly_mim.evaluation.rank`.
        out:
            Directory that `results.json` is written to, and `report.html`.
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
        precision:
            "32", or "bf16" to encode in bfloat16 autocast, several times as fast where
            the hardware computes in it.
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
        img_size:
            For a run, the name of a timm model and a module with `feature_function`:
            size of the images in pixels, one number or height and width. By default the
            size that the model was made for. The encoder of a run is resized, as for
            fine-tuning at a higher resolution than pretraining.
        tables:
            For a Swin of a run and `img_size`: how its tables of relative positions are
            resampled, "timm" (linearly) or "simmim" (by the cubic spline of SimMIM's
            code). By default "simmim" if it was pretrained by a recipe of that code.
        in_chans:
            For the name of a timm model and a module with `feature_function`: number of
            image channels.
        pretrained:
            For the name of a timm model: load timm's pretrained weights.
        feature_function:
            For a module: function from normalised images to features with shape
            (batch_size, dim), or to a dictionary of them. `layers` and `pools` do not
            apply then. See `load_encoder`. Features and rows are kept on disk if it has
            a `fingerprint`, a string or number that changes with what it does.
        knn:
            Settings of kNN.
        linear:
            Settings of the linear probe.
        logistic:
            Settings of the logistic regression.
        attentive:
            Settings of the attentive probe.
        low_label:
            Settings of the evaluation with few labels.
        linear_mae:
            Settings of MAE's linear probe.
        finetune:
            Settings of fine-tuning.
        distributed:
            Share the images out over the processes of `torch.distributed`, which has
            been initialised (by torchrun and `init_process_group`) and whose processes
            all call this function with the same arguments. Features must be kept on a
            disk that they share. For protocols on features; each process runs those
            itself, and the first one writes.
        progress:
            Show progress bars. By default on a terminal.

    Returns:
        One row per model, protocol and variant, notes, and what it takes to run it
        again.

    Raises:
        ValueError: If an argument is out of range, if the data has no labels or no test
            images, or if `out` holds results already. Nothing has been written then.
        OSError: If `out` or `cache` cannot be written.
    """
    given = dict(locals())
    arguments = {name: to_json(value) for name, value in given.items()}
    world = World.distributed() if distributed else World()
    for unused in _unused(given):
        warnings.warn(unused, stacklevel=3)
    file = None if out is None else results_file(Path(out), overwrite, RESULTS_FILE)
    settings: dict[str, Any] = {
        "knn": knn,
        "linear": linear,
        "logistic": logistic,
        "attentive": attentive,
        "low_label": low_label,
        "linear_mae": linear_mae,
        "finetune": finetune,
    }
    protocols = list(dict.fromkeys(protocols))
    with keyed_random_state(seed, "evaluation", "encoder"):
        model = load_encoder(
            encoder,
            img_size=img_size,
            tables=tables,
            in_chans=in_chans,
            pretrained=pretrained,
            feature_function=feature_function,
        )
    transform = EvalTransform(model.img_size, crop_ratio, normalize=None)
    show = sys.stdout.isatty() if progress is None else progress
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
    train, test = images.train, images.test
    notes = [*origin_notes(model, resized=img_size is not None), *images.notes]
    notes += [note for name in protocols for note in settings[name].check(_len(train))]
    if "low_label" in protocols and isinstance(train, ImageDataset):
        low_label.check_labels(torch.tensor(train.targets), train.classes)
    if holdout is not None:
        notes.append(
            f"Scored are {_len(test)} held-out training images, not the test images."
        )
    notes += image_notes(test, transform, model)
    notes += shared_notes(train, test)
    taken = _pools(model, layers, pools, notes)
    _check_protocols(protocols, settings, model, world)

    models: dict[str, FeatureEncoder | None] = {model_name(encoder, model): model}
    if "random" in baselines:
        models[RANDOM] = at_random(model, seed)
    if "pixels" in baselines:
        models[PIXELS] = None
        skipped = [name for name in protocols if not _takes_pixels(name, settings)]
        if skipped:
            notes.append(f"No raw pixels for {', '.join(skipped)}, made for encoders.")
    tasks = [
        Task(name, protocol)
        for name, each in models.items()
        for protocol in [*protocols, *([LABEL_FREE] if label_free else [])]
        if each is not None or _takes_pixels(protocol, settings)
    ]
    place = choose_device(device)
    keeper = Keeper(
        models,
        (train, test),
        None if out is None else Path(out),
        None if cache is None else Path(cache),
        {
            "transform": vars(transform),
            "normalize": [list(model.mean), list(model.std)],
            "pixel_size": pixel_size,
            "precision": precision,
            "device": place.type,
            "versions": package_versions(),
        },
    )
    if world.size > 1 and keeper.cache is None:
        raise ValueError(
            "Processes share features through a directory on a disk: pass out or "
            "cache, and images in a folder, behind a name, or with a `fingerprint`."
        )
    keys = {
        task: keeper.row_key(
            task,
            {
                "settings": to_json(settings.get(task.protocol)),
                "layers": list(layers),
                "pools": list(taken),
                "seed": seed,
            },
        )
        for task in tasks
    }
    # One process reads the rows, so that all have the same ones.
    found: dict[Task, dict[str, Any]] = world.from_first(
        lambda: {task: row for task in tasks if (row := keeper.read(keys[task]))}
    )
    runner = _Runner(
        models,
        settings,
        images.labelled(),
        train,
        keeper,
        world,
        layers=layers,
        pools=taken,
        pixel_size=pixel_size,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        device=place,
        precision=precision,
        progress=show,
    )
    pending = [task for task in tasks if task not in found]
    if pending:
        runner.encode(pending)
    for task in pending:
        found[task] = runner.run(task, keys[task])
        if world.rank == 0:
            keeper.write(keys[task], found[task])

    rows = [Result(**row) for task in tasks for row in found[task]["rows"]]
    measures = [row for task in tasks for row in found[task]["measures"]]
    classes = found[tasks[0]]["classes"]
    if len(classes) == 1:
        notes.append("All images are of one class, so every accuracy is 1.")
    if unseen := found[tasks[0]]["unseen"]:
        notes.append(
            f"There are test images, but no training images, of "
            f"{some([printable(name) for name in unseen])}: no probe can be right "
            "about them."
        )
    if untested := found[tasks[0]]["untested"]:
        notes.append(
            f"There are no test images of {some([printable(n) for n in untested])}."
        )
    if any(len(row.draws or ()) > 1 for row in rows):
        notes.append("± is the standard deviation over draws of the training images.")
    record = {
        "command": shlex.join(sys.orig_argv),
        "arguments": arguments,
        "encoder": describe_encoder(model),
        "data": {"classes": classes, "num_train": _len(train), "num_test": _len(test)},
        "versions": package_versions(),
    }
    results = Results(rows, [*notes, *keeper.notes], record, measures)
    world.wait()  # all have seen that there were no results
    if file is not None and world.rank == 0:
        with atomic_write(file) as temporary:
            temporary.write_text(to_text(results.to_dict()))
        keeper.clear(list(keys.values()))
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
            Arguments of `evaluate` by their names. Of those that are missing, the
            defaults are taken. `encoder` and `data` are not looked at.

    Raises:
        ValueError: If protocols, layers, poolings, image size or settings are out of
            range or do not fit the encoder.
    """
    parameters = inspect.signature(evaluate).parameters.values()
    given = {p.name: p.default for p in parameters} | dict(arguments)
    settled = {k: v for k, v in given.items() if k not in ("encoder", "data")}
    check_arguments(evaluate, settled)
    for name in given["protocols"]:
        given[name].check(_MANY)
    if encoder is None:
        return
    _pools(encoder, given["layers"], given["pools"], [])
    _check_protocols(given["protocols"], given, encoder, World())
    if given["img_size"] is not None:
        resize_encoder(encoder, given["img_size"], given["tables"])


@dataclass
class _Runner:
    """Makes the features that tasks need, and runs them."""

    models: Mapping[str, FeatureEncoder | None]
    settings: Mapping[str, Any]
    images: LabelledImages
    train: Dataset[Any]
    keeper: Keeper
    world: World
    layers: Sequence[int]
    pools: Sequence[Pool]
    pixel_size: int
    seed: int
    batch_size: int
    num_workers: int | None
    device: torch.device
    precision: Precision
    progress: bool
    features: list[dict[str, Features]] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def encode(self, tasks: Sequence[Task]) -> None:
        """Passes over training and test images, or reads what was found before."""
        functions: dict[str, Any] = {}
        for name, encoder in self.models.items():
            needed = {
                self.settings[task.protocol].tokens
                if task.protocol in self.settings
                else False
                for task in tasks
                if task.model == name and task.protocol not in IMAGE_PROTOCOLS
            }
            if needed:
                functions[name] = self._function(encoder, needed)
        used = [
            each for name, each in self.models.items() if name in functions and each
        ]
        with ExitStack() as stack:
            for each in used:
                choose_attention(each, self.device, self.precision == "bf16")
                stack.enter_context(evaluating(each, self.device))
            for part, images in enumerate((self.train, self.images.test)):
                found = self._collect(functions, images, part) if functions else {}
                self.features.append(found)
                self.labels.append(
                    next(iter(found.values())).labels
                    if found
                    else read_labels(images, self.num_workers)
                )
        self.classes = class_names(self.train, self.labels)
        if any(task.protocol == "low_label" for task in tasks):
            # Before a protocol has run: only folders tell their labels at once.
            self.settings["low_label"].check_labels(self.labels[0], self.classes)

    def _function(self, encoder: FeatureEncoder | None, tokens: set[bool]) -> Any:
        if encoder is None:
            return PixelFeatures(self.pixel_size)
        if isinstance(encoder, FunctionEncoder):
            return FunctionFeatures(encoder, self.device)
        pools: list[AnyPool] = [*self.pools] if False in tokens else []
        if True in tokens:
            pools.append("tokens")
        return EncoderFeatures(encoder, self.layers, pools)

    def _collect(
        self, functions: Mapping[str, Any], images: Dataset[Any], part: int
    ) -> dict[str, Features]:
        mean, std = next(
            (each.mean, each.std) for each in self.models.values() if each is not None
        )
        description = f"Encoding {('training', 'test')[part]} images"
        stores = {
            name: self.keeper.store(name, part, _len(images)) for name in functions
        }
        kept = {name: store for name, store in stores.items() if store is not None}
        if kept:
            return cached_features(
                functions,
                kept,
                images,
                mean,
                std,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                device=self.device,
                precision=self.precision,
                description=description,
                progress=self.progress,
                world=self.world,
            )
        loader = KeyedLoader(
            images, self.batch_size, training=False, num_workers=self.num_workers
        )
        return collect_features(
            functions,
            track(loader, description, disable=not self.progress),
            mean,
            std,
            device=self.device,
            precision=self.precision,
        )

    def run(self, task: Task, key: str | None) -> dict[str, Any]:
        """Runs a protocol for a model, and returns its rows."""
        made: dict[str, Any] = {
            "classes": self.classes,
            "unseen": _alone(self.classes, self.labels[1], self.labels[0]),
            "untested": _alone(self.classes, self.labels[0], self.labels[1]),
            "rows": [],
            "measures": [],
        }
        start = time.perf_counter()
        if task.protocol == LABEL_FREE:
            measured = measure_features(self._features(task, tokens=False)[0])
            made["measures"] = [{"model": task.model, **row} for row in measured]
            return made
        seed = seed_from(self.seed, "evaluation", task.protocol)
        protocol = self.settings[task.protocol]
        outcomes: list[Outcome]
        feature_seconds = 0.0
        if task.protocol in IMAGE_PROTOCOLS:
            with self.keeper.checkpoints(key) as folder:
                outcomes = protocol(
                    self.models[task.model],
                    self.images,
                    len(self.classes),
                    out=folder,
                    seed=seed,
                    device=self.device,
                    precision=self.precision,
                    num_workers=self.num_workers,
                    progress=self.progress,
                )
        else:
            train, test = self._features(task, protocol.tokens)
            feature_seconds = train.seconds + test.seconds
            # Probes compute in float64 in places, which Apple's accelerator does not.
            place = self.device if self.device.type == "cuda" else torch.device("cpu")
            outcomes = protocol(train, test, len(self.classes), seed=seed, device=place)
        seconds = (time.perf_counter() - start) / len(outcomes)
        made["rows"] = [
            asdict(self._result(task, outcome, feature_seconds, seconds))
            for outcome in outcomes
        ]
        return made

    def _features(self, task: Task, tokens: bool) -> list[Features]:
        found = [part[task.model].select(tokens) for part in self.features]
        if not found[0].values:
            what = "'tokens'" if tokens else "pooled features"
            raise ValueError(
                f"{task.protocol} reads {what}, which feature_function does not "
                "return. Add them, or leave the protocol out."
            )
        return found

    def _result(
        self, task: Task, outcome: Outcome, feature_seconds: float, seconds: float
    ) -> Result:
        labels = self.labels[1]
        found = score(
            outcome.ranked, labels, len(self.classes), seed_from(self.seed, "bootstrap")
        )
        layer, pooling = outcome.key
        top5 = found.top5
        return Result(
            model=task.model,
            protocol=task.protocol,
            variant=outcome.variant,
            layer=layer,
            pooling=pooling,
            hyperparameters=outcome.hyperparameters,
            top1=found.top1.value,
            top1_low=found.top1.low,
            top1_high=found.top1.high,
            top5=None if top5 is None else top5.value,
            top5_low=None if top5 is None else top5.low,
            top5_high=None if top5 is None else top5.high,
            mean_class=found.mean_class.value,
            mean_class_low=found.mean_class.low,
            mean_class_high=found.mean_class.high,
            per_class=found.per_class,
            confusion=found.confusion,
            draws=found.draws,
            feature_seconds=feature_seconds,
            seconds=seconds,
            num_train=_len(self.train),
            num_test=len(labels),
            selection=outcome.selection,
        )


def _len(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]


def _alone(classes: Sequence[str], labels: Tensor, others: Tensor) -> list[str]:
    """Returns the classes that are among the labels and not among the others."""
    here, there = (part.bincount(minlength=len(classes)) for part in (labels, others))
    missing = ((here > 0) & (there == 0)).nonzero().flatten()
    return [classes[number] for number in missing.tolist()]


def _takes_pixels(protocol: str, settings: Mapping[str, Any]) -> bool:
    if protocol == LABEL_FREE:
        return True
    return protocol not in IMAGE_PROTOCOLS and not settings[protocol].tokens


def _unused(given: Mapping[str, Any]) -> Iterator[str]:
    """Yields what to say of arguments of `evaluate` that nothing would read.

    A warning, since settings in Python are often shared by several evaluations; the
    command line refuses such words.
    """
    protocols, baselines = list(given["protocols"]), list(given["baselines"])
    unused = {
        name: f"protocols={protocols} does not name it"
        for name in get_args(ProtocolName)
        if name not in protocols
    }
    if set(protocols) <= set(IMAGE_PROTOCOLS) and not given["label_free"]:
        why = f"protocols={protocols} has none on features"
        unused |= {"layers": why, "pools": why}
    if "pixels" not in baselines:
        unused["pixel_size"] = f"baselines={baselines} does not name 'pixels'"
    parameters = inspect.signature(evaluate).parameters
    for name, why in unused.items():
        if to_json(given[name]) != to_json(parameters[name].default):
            yield f"{name} does nothing here: {why}."


def _check_protocols(
    protocols: Sequence[str],
    settings: Mapping[str, Any],
    model: FeatureEncoder,
    world: World,
) -> None:
    """Refuses what cannot train through the encoder."""
    training = [name for name in protocols if name in IMAGE_PROTOCOLS]
    if training and not isinstance(model, MaskedEncoder):
        raise ValueError(
            f"{' and '.join(training)} (training through the encoder) needs one of our "
            "encoders, a run of ours, or a timm ViT, BEiT, EVA or Swin, got "
            f"{type(model.model).__name__}. Leave it out."
        )
    if training and world.size > 1:
        raise ValueError(
            f"{' and '.join(training)} run in one process, got {world.size}. Leave "
            "them out, or evaluate them by themselves."
        )
    for name in training:
        settings[name].check_encoder(model)


def _pools(
    model: FeatureEncoder,
    layers: Sequence[int],
    pools: Sequence[Pool] | None,
    notes: list[str],
) -> Sequence[Pool]:
    """Returns the poolings to choose from, and refuses layers and poolings early."""
    if isinstance(model, FunctionEncoder):
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
