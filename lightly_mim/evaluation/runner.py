"""Makes the features that an evaluation needs, and runs its protocols on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.data import seed_from
from lightly_mim.data.notes import printable, some
from lightly_mim.encoders import Pool
from lightly_mim.encoders.base import AnyPool
from lightly_mim.evaluation.base import ChecksLabels, Outcome, TrainingRun
from lightly_mim.evaluation.cache import cached_features
from lightly_mim.evaluation.features import EncoderFeatures, Encoding, Features
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.images import EvaluationImages, class_names, read_labels
from lightly_mim.evaluation.label_free_measures import label_free as measure_features
from lightly_mim.evaluation.processes import World
from lightly_mim.evaluation.protocols import LABEL_FREE
from lightly_mim.evaluation.provenance import probe_device
from lightly_mim.evaluation.results import Result
from lightly_mim.evaluation.resume import Kept, Task
from lightly_mim.evaluation.scores import score
from lightly_mim.training.machine import Layout


@dataclass
class Runner:
    """Makes the features that tasks need, and runs them."""

    models: Mapping[str, AnyEncoder]
    protocols: Mapping[str, Any]
    reads: Mapping[str, str]  # of each protocol, and of label-free measures
    images: EvaluationImages
    kept: Kept
    world: World
    how: Encoding
    layers: Sequence[int]
    pools: Sequence[Pool]
    seed: int
    layout: Layout
    compile: bool
    features: list[dict[str, Features]] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def encode(self, tasks: Sequence[Task]) -> None:
        """Passes over training and test images, or reads what was found before."""
        functions: dict[str, EncoderFeatures] = {}
        for name, encoder in self.models.items():
            read = {self.reads[task.protocol] for task in tasks if task.model == name}
            if needed := read - {"images"}:
                pools: list[AnyPool] = [*self.pools] if "pooled" in needed else []
                pools += ["tokens"] if "tokens" in needed else []
                if getattr(encoder, "names_features", False):
                    functions[name] = EncoderFeatures(encoder)
                else:
                    functions[name] = EncoderFeatures(encoder, self.layers, pools)
        with self.how.ready(functions.values()):
            for part, images in enumerate((self.images.train, self.images.test)):
                found = self._collect(functions, images, part) if functions else {}
                self.features.append(found)
                self.labels.append(
                    next(iter(found.values())).labels
                    if found
                    else read_labels(images, self.how.num_workers)
                )
        self.classes = class_names(self.images.train, self.labels)
        # Before a protocol has run: only folders tell their labels at once.
        wanted = {task.protocol for task in tasks} & self.protocols.keys()
        check_labels_of(
            [self.protocols[name] for name in wanted], self.labels[0], self.classes
        )

    def _collect(
        self, functions: Mapping[str, EncoderFeatures], images: Dataset[Any], part: int
    ) -> dict[str, Features]:
        description = f"Encoding {('training', 'test')[part]} images"
        if self.kept.cache is not None:
            return cached_features(
                functions,
                {
                    name: self.kept.store(name, part, num_images(images))
                    for name in functions
                },
                images,
                description=description,
                world=self.world,
                **vars(self.how),
            )
        return self.how.collect(functions, images, description)

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
                run = TrainingRun(
                    folder,
                    seed,
                    device=self.how.device,
                    precision=self.how.precision,
                    num_workers=self.how.num_workers,
                    progress=self.how.progress,
                    layout=self.layout,
                    compile=self.compile,
                )
                encoder, images = self.models[task.model], self.images.labelled()
                outcomes = protocol(encoder, images, len(self.classes), run)
        else:
            train, test = self._features(task, protocol.reads)
            feature_seconds = train.seconds + test.seconds
            place = probe_device(self.how.device)
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
        return Result(
            model=task.model,
            protocol=task.protocol,
            variant=outcome.variant,
            layer=layer,
            pooling=pooling,
            hyperparameters=outcome.hyperparameters,
            **found.columns(),
            feature_seconds=feature_seconds,
            seconds=seconds,
            num_train=num_images(self.images.train),
            num_test=len(labels),
            selection=outcome.selection,
        )


def num_images(data: Dataset[Any]) -> int:
    """Returns how many images a data set holds."""
    return len(data)  # type: ignore[arg-type]


def _alone(classes: Sequence[str], labels: Tensor, others: Tensor) -> list[str]:
    """Returns the classes that are among the labels and not among the others."""
    here, there = (part.bincount(minlength=len(classes)) for part in (labels, others))
    missing = ((here > 0) & (there == 0)).nonzero().flatten()
    return [classes[number] for number in missing.tolist()]


def class_notes(made: Mapping[str, Any]) -> list[str]:
    """Returns what a reader should know of classes that one of the parts lacks.

    `made` is what `Runner.run` returned.
    """
    notes = []
    if len(made["classes"]) == 1:
        notes.append("All images are of one class, so every accuracy is 1.")
    if unseen := made["unseen"]:
        notes.append(
            f"There are test images, but no training images, of "
            f"{some([printable(name) for name in unseen])}: no probe can be right "
            "about them."
        )
    if untested := made["untested"]:
        notes.append(
            f"There are no test images of {some([printable(n) for n in untested])}."
        )
    return notes


def check_labels_of(
    protocols: Iterable[Any], labels: Tensor, classes: Sequence[str]
) -> None:
    """Lets protocols refuse the labels of the training images before any has run."""
    for each in protocols:
        if isinstance(each, ChecksLabels):
            each.check_labels(labels, classes)
