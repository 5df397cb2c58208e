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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.arguments import (
    InnerShare,
    NonEmpty,
    PositiveInt,
    Rule,
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
from lightly_mim.evaluation.cache import cached_features
from lightly_mim.evaluation.classifier import CLASSIFIERS, save_classifier
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    Precision,
    collect_features,
    evaluating,
)
from lightly_mim.evaluation.finetune import FineTune
from lightly_mim.evaluation.foreign_encoders import AnyEncoder, RawPixels
from lightly_mim.evaluation.images import (
    EvaluationImages,
    class_names,
    image_notes,
    own_value_range,
    read_labels,
    shared_notes,
)
from lightly_mim.evaluation.linear_mae import LinearMAE
from lightly_mim.evaluation.loading import (
    at_random,
    describe_encoder,
    load_encoder,
    origin_notes,
)
from lightly_mim.evaluation.probes.attentive import Attentive
from lightly_mim.evaluation.probes.knn import KNN
from lightly_mim.evaluation.probes.linear import Linear
from lightly_mim.evaluation.probes.logistic import Logistic
from lightly_mim.evaluation.probes.low_label import LowLabel
from lightly_mim.evaluation.processes import World
from lightly_mim.evaluation.protocol import (
    ChecksLabels,
    FeatureProtocol,
    ImageProtocol,
    LabelledImages,
    Outcome,
)
from lightly_mim.evaluation.provenance import (
    choose_device,
    model_name,
    package_versions,
    to_json,
)
from lightly_mim.evaluation.rank import label_free as measure_features
from lightly_mim.evaluation.results import (
    PIXELS,
    RANDOM,
    RESULTS_FILE,
    Result,
    Results,
    results_file,
    to_text,
)
from lightly_mim.evaluation.resume import Kept, Task
from lightly_mim.evaluation.scores import score
from lightly_mim.files import atomic_write
from lightly_mim.training.machine import (
    ONE,
    Layout,
    check_precision,
    choose_layout,
    start,
)
from lightly_mim.transforms import EvalTransform

# A protocol of this package is one file, and one name here.
PROTOCOLS: dict[str, type[Any]] = {
    each.name: each
    for each in (KNN, Linear, Logistic, Attentive, LowLabel, LinearMAE, FineTune)
}
ProtocolName = Annotated[
    str,
    Rule(
        f"one of {', '.join(map(repr, PROTOCOLS))}",
        lambda name: isinstance(name, str) and name in PROTOCOLS,
        alone=True,
    ),
]
Baseline = Literal["random", "pixels"]

LABEL_FREE = "label_free"


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
    grad_checkpointing: bool = False,
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
            `lightly_mim.evaluation.rank`.
        out:
            Directory that `results.json` is written to, and the classifiers of
            "linear", "logistic" and "finetune", see `predict`.
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
        grad_checkpointing:
            Trade time for memory in "finetune": recompute the encoder's activations.
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
    chosen = resolve_protocols(protocols)
    started = devices is not None or num_nodes is not None
    if distributed and started:
        raise ValueError(
            "distributed is for processes that have found each other, and devices and "
            "num_nodes let them: pass one or the other."
        )
    for unused in _unused(given, chosen):
        warnings.warn(unused, stacklevel=3)
    file = None if out is None else results_file(Path(out), overwrite, RESULTS_FILE)
    loading = _check_loading(loading)
    with keyed_random_state(seed, "evaluation", "encoder"):
        model = load_encoder(encoder, **loading)
    transform = EvalTransform(model.img_size, crop_ratio, normalize=None)
    show = sys.stdout.isatty() if progress is None else progress
    place = choose_device(device)
    check_precision(precision, place)
    layout = ONE
    if started:
        layout = choose_layout("auto" if devices is None else devices, num_nodes)
        place = start(layout, place.type)
    together = distributed or layout.world_size > 1
    world = World.distributed() if together else World()
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
    resized = loading.get("img_size") is not None
    notes = [*origin_notes(model, resized=resized), *images.notes]
    notes += [note for each in chosen.values() for note in each.check(_len(train))]
    if isinstance(train, ImageDataset):
        _check_labels(chosen.values(), torch.tensor(train.targets), train.classes)
    if holdout is not None:
        notes.append(
            f"Scored are {_len(test)} held-out training images, not the test images."
        )
    notes += image_notes(test, transform, model)
    notes += shared_notes(train, test)
    taken = _pools(model, layers, pools, notes)
    _check_encoder(chosen, model, distributed)

    models: dict[str, AnyEncoder] = {model_name(encoder, model): model}
    if "random" in baselines:
        models[RANDOM] = at_random(model, seed)
    if "pixels" in baselines:
        pixels = RawPixels(model.img_size, model.in_chans, pixel_size)
        pixels.mean, pixels.std = model.mean, model.std
        models[PIXELS] = pixels
        skipped = [name for name, each in chosen.items() if each.reads != "pooled"]
        if skipped:
            notes.append(f"No raw pixels for {', '.join(skipped)}, made for encoders.")
    tasks = [
        Task(name, protocol)
        for name, each in models.items()
        for protocol in [*chosen, *([LABEL_FREE] if label_free else [])]
        if not isinstance(each, RawPixels)
        or protocol == LABEL_FREE
        or chosen[protocol].reads == "pooled"
    ]
    kept = Kept(
        models,
        (train, test),
        None if out is None else Path(out),
        None if cache is None else Path(cache),
        {
            "transform": vars(transform),
            "normalize": [list(model.mean), list(model.std)],
            "precision": precision,
            "device": place.type,
            "versions": package_versions(),
        },
    )
    on_features = any(
        task.protocol == LABEL_FREE or chosen[task.protocol].reads != "images"
        for task in tasks
    )
    if world.size > 1 and on_features and kept.cache is None:
        raise ValueError(
            "Processes share features through a directory on a disk: pass out or "
            "cache, and images in a folder, behind a name, or with a `fingerprint`."
        )
    keys = {
        task: kept.row_key(
            task,
            chosen.get(task.protocol),
            {"layers": list(layers), "pools": list(taken), "seed": seed},
        )
        for task in tasks
    }
    # One process reads the rows, so that all have the same ones.
    found: dict[Task, dict[str, Any]] = world.from_first(
        lambda: {task: row for task in tasks if (row := kept.read(keys[task]))}
    )
    runner = _Runner(
        models,
        chosen,
        images.labelled(),
        train,
        kept,
        world,
        layers=layers,
        pools=taken,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        device=place,
        precision=precision,
        progress=show,
        layout=layout,
        compile=compile,
        grad_checkpointing=grad_checkpointing,
    )
    pending = [task for task in tasks if task not in found]
    if pending:
        runner.encode(pending)
    saved = None if out is None or world.rank else Path(out) / CLASSIFIERS
    for task in pending:
        found[task], outcomes = runner.run(task, keys[task])
        if saved is not None and task.model == next(iter(models)):
            for outcome in outcomes:
                save_classifier(
                    saved / f"{task.protocol}.safetensors",
                    outcome,
                    model,
                    None if isinstance(encoder, torch.nn.Module) else str(encoder),
                    found[task]["classes"],
                    crop_ratio=crop_ratio,
                    value_range=images.value_range,
                )
        if world.rank == 0:
            kept.write(keys[task], found[task])

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
        "arguments": _record(given, chosen),
        "encoder": describe_encoder(model),
        "data": {"classes": classes, "num_train": _len(train), "num_test": _len(test)},
        "versions": package_versions(),
    }
    results = Results(rows, [*notes, *kept.notes], record, measures)
    world.wait()  # all have seen that there were no results
    if file is not None and world.rank == 0:
        with atomic_write(file) as temporary:
            temporary.write_text(to_text(results.to_dict()))
        for other in (Path(file.parent) / CLASSIFIERS).glob("*.safetensors"):
            if other.stem not in chosen:  # of an evaluation that was overwritten
                other.unlink()
        kept.clear(list(keys.values()))
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
    loading = _check_loading(loading)
    chosen = resolve_protocols(given["protocols"])
    for each in chosen.values():
        each.check(_MANY)
    if encoder is None:
        return
    _pools(encoder, given["layers"], given["pools"], [])
    _check_encoder(chosen, encoder, given["distributed"])
    if (img_size := loading.get("img_size")) is not None:
        resize_encoder(encoder, img_size, loading.get("tables"))


def resolve_protocols(
    protocols: Sequence[str | FeatureProtocol | ImageProtocol],
) -> dict[str, Any]:
    """Returns protocols by their names.

    Args:
        protocols:
            Names of `PROTOCOLS`, and protocols.

    Raises:
        ValueError: If one is a class, if a name cannot be one, or if two protocols
            with different settings have the same name.
    """
    found: dict[str, Any] = {}
    for each in protocols:
        protocol = PROTOCOLS[each]() if isinstance(each, str) else each
        if isinstance(protocol, type):
            raise ValueError(
                f"protocols has the class {protocol.__name__}. Make an object of it: "
                f"{protocol.__name__}(...)."
            )
        name = protocol.name
        if not (isinstance(name, str) and name.isprintable() and name.strip()):
            raise ValueError(f"The name of a protocol is text, got {name!r}.")
        if name == LABEL_FREE or found.setdefault(name, protocol) != protocol:
            raise ValueError(
                f"Two protocols are called {name!r}, with different settings. Evaluate "
                "one after the other, or give one another name."
            )
    return found


@dataclass
class _Runner:
    """Makes the features that tasks need, and runs them."""

    models: Mapping[str, AnyEncoder]
    protocols: Mapping[str, Any]
    images: LabelledImages
    train: Dataset[Any]
    kept: Kept
    world: World
    layers: Sequence[int]
    pools: Sequence[Pool]
    seed: int
    batch_size: int
    num_workers: int | None
    device: torch.device
    precision: Precision
    progress: bool
    layout: Layout
    compile: bool
    grad_checkpointing: bool
    features: list[dict[str, Features]] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def encode(self, tasks: Sequence[Task]) -> None:
        """Passes over training and test images, or reads what was found before."""
        functions: dict[str, EncoderFeatures] = {}
        for name, encoder in self.models.items():
            read = {self._reads(task.protocol) for task in tasks if task.model == name}
            if needed := read - {"images"}:
                pools: list[AnyPool] = [*self.pools] if "pooled" in needed else []
                pools += ["tokens"] if "tokens" in needed else []
                if getattr(encoder, "names_features", False):
                    functions[name] = EncoderFeatures(encoder)
                else:
                    functions[name] = EncoderFeatures(encoder, self.layers, pools)
        with ExitStack() as stack:
            for function in functions.values():
                encoder = function.encoder
                choose_attention(encoder, self.device, self.precision == "bf16")
                stack.enter_context(evaluating(encoder, self.device))
            for part, images in enumerate((self.train, self.images.test)):
                found = self._collect(functions, images, part) if functions else {}
                self.features.append(found)
                self.labels.append(
                    next(iter(found.values())).labels
                    if found
                    else read_labels(images, self.num_workers)
                )
        self.classes = class_names(self.train, self.labels)
        # Before a protocol has run: only folders tell their labels at once.
        wanted = {task.protocol for task in tasks} & self.protocols.keys()
        _check_labels(
            [self.protocols[name] for name in wanted], self.labels[0], self.classes
        )

    def _reads(self, protocol: str) -> str:
        return "pooled" if protocol == LABEL_FREE else self.protocols[protocol].reads

    def _collect(
        self, functions: Mapping[str, EncoderFeatures], images: Dataset[Any], part: int
    ) -> dict[str, Features]:
        description = f"Encoding {('training', 'test')[part]} images"
        if self.kept.cache is not None:
            return cached_features(
                functions,
                {name: self.kept.store(name, part, _len(images)) for name in functions},
                images,
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
            device=self.device,
            precision=self.precision,
        )

    def run(self, task: Task, key: str | None) -> tuple[dict[str, Any], list[Outcome]]:
        """Runs a protocol for a model, and returns its rows and outcomes."""
        made: dict[str, Any] = {
            "classes": self.classes,
            "unseen": _alone(self.classes, self.labels[1], self.labels[0]),
            "untested": _alone(self.classes, self.labels[0], self.labels[1]),
            "rows": [],
            "measures": [],
        }
        start = time.perf_counter()
        if task.protocol == LABEL_FREE:
            measured = measure_features(self._features(task, "pooled")[0])
            made["measures"] = [{"model": task.model, **row} for row in measured]
            return made, []
        seed = seed_from(self.seed, "evaluation", task.protocol)
        protocol = self.protocols[task.protocol]
        outcomes: list[Outcome]
        feature_seconds = 0.0
        if protocol.reads == "images":
            with self.kept.checkpoints(key) as folder:
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
                    layout=self.layout,
                    compile=self.compile,
                    grad_checkpointing=self.grad_checkpointing,
                )
        else:
            train, test = self._features(task, protocol.reads)
            feature_seconds = train.seconds + test.seconds
            # Probes compute in float64 in places, which Apple's accelerator does not.
            place = self.device if self.device.type == "cuda" else torch.device("cpu")
            outcomes = protocol(train, test, len(self.classes), seed=seed, device=place)
        seconds = (time.perf_counter() - start) / len(outcomes)
        made["rows"] = [
            asdict(self._result(task, outcome, feature_seconds, seconds))
            for outcome in outcomes
        ]
        return made, outcomes

    def _features(self, task: Task, reads: str) -> list[Features]:
        tokens = reads == "tokens"
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


def _check_loading(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the arguments that are handed on to `load_encoder`."""
    known = inspect.signature(load_encoder).parameters.keys() - {"encoder"}
    for name in loading.keys() - known:
        hint = ""
        if name in PROTOCOLS:
            kind = PROTOCOLS[name].__name__
            hint = f" Settings go with their protocol: protocols=[{kind}(...)]."
        raise TypeError(f"evaluate() has no argument {name!r}.{hint}")
    return check_arguments(load_encoder, loading, "evaluate")


def _record(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments as `results.json` has them: settings by their protocol."""
    record = {name: to_json(given[name]) for name in given if name != "loading"}
    record["protocols"] = list(chosen)
    record |= {name: to_json(each) for name, each in chosen.items()}
    return record | {name: to_json(v) for name, v in given["loading"].items()}


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
    if not any(isinstance(each, FineTune) for each in chosen.values()):
        unused["grad_checkpointing"] = f"protocols={list(chosen)} has no 'finetune'"
    if "pixels" not in baselines:
        unused["pixel_size"] = f"baselines={baselines} does not name 'pixels'"
    parameters = inspect.signature(evaluate).parameters
    for name, why in unused.items():
        if to_json(given[name]) != to_json(parameters[name].default):
            yield f"{name} does nothing here: {why}."


def _check_labels(
    protocols: Iterable[Any], labels: Tensor, classes: Sequence[str]
) -> None:
    for each in protocols:
        if isinstance(each, ChecksLabels):
            each.check_labels(labels, classes)


def _check_encoder(
    protocols: Mapping[str, Any], model: AnyEncoder, distributed: bool
) -> None:
    """Refuses what cannot train through the encoder."""
    training = [name for name, each in protocols.items() if each.reads == "images"]
    if training and not isinstance(model, MaskedEncoder):
        raise ValueError(
            f"{' and '.join(training)} (training through the encoder) needs one of our "
            "encoders, a run of ours, or a timm ViT, BEiT, EVA or Swin, got "
            f"{type(model.model).__name__}. Leave it out."
        )
    if training and distributed:
        raise ValueError(
            f"{' and '.join(training)} train in processes that Lightning knows of: in "
            "the place of distributed pass devices and num_nodes, which take those of "
            "torchrun and SLURM, or start them."
        )
    for name in training:
        protocols[name].check_encoder(model)


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
