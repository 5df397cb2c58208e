"""Segmentation with frozen patch tokens: kNN and a linear classifier, scored by mIoU.

- [0]: CAPI, 2025, https://arxiv.org/abs/2502.08769 (`eval_segmentation.py`: kNN with
  k of 1, 3, 10 and 30 and a logistic regression on the patch tokens)
- [1]: DINOv2, 2023, https://arxiv.org/abs/2304.07193 (section 7.4: a linear layer on
  the patch tokens, its logits upsampled bilinearly)

Nothing of the encoder is trained. A patch has the class of most of its pixels. kNN
gives all pixels of a patch one class; the linear classifier's logits are upsampled to
the pixels. Both are scored on every pixel that has a class. Once layer and
hyper-parameters are chosen, they are fitted to all training images.

What differs from published numbers: images are cropped at the centre and scored at the
encoder's size, in one pass without sliding windows; the classifier is fitted on the
classes of patches, not of pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightly_mim.arguments import NonEmpty, PositiveInt, Seed, Workers, checked
from lightly_mim.data import keyed_random_state
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.overlap import overlap_notes
from lightly_mim.data.segmentation import (
    MaskedFiles,
    SegmentationDataset,
    check_masks,
    open_segmentation,
)
from lightly_mim.encoders import Encoder
from lightly_mim.evaluation.broken import Part, find_readable
from lightly_mim.evaluation.dense.protocols import (
    DENSE_PROTOCOLS,
    DenseProtocol,
    DenseProtocolName,
)
from lightly_mim.evaluation.dense.results import (
    DENSE_FILE,
    DenseResult,
    DenseResults,
)
from lightly_mim.evaluation.dense.runner import DenseRunner, Views
from lightly_mim.evaluation.features import EncoderFeatures, Encoding, Precision
from lightly_mim.evaluation.loading import (
    at_random,
    check_loading,
    describe_encoder,
    load_encoder,
    origin_notes,
)
from lightly_mim.evaluation.protocols import resolve_protocols
from lightly_mim.evaluation.provenance import (
    choose_device,
    evaluation_record,
    model_name,
)
from lightly_mim.evaluation.results import RANDOM, results_file, to_text
from lightly_mim.evaluation.resume import Kept, Task, conditions
from lightly_mim.files import atomic_write
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.training.machine import check_precision
from lightly_mim.transforms import EvalTransform


@checked
def evaluate_dense(
    encoder: Encoder | Path,
    data: str | Path,
    protocols: NonEmpty[DenseProtocolName | DenseProtocol] = ("knn", "linear"),
    *,
    val: str | Path | None = None,
    classes: Sequence[str] | None = None,
    ignore_index: Sequence[int] = (255,),
    layers: NonEmpty[int] = (-1,),
    random_baseline: bool = False,
    out: Path | str | None = None,
    cache: Path | str | None = None,
    overwrite: bool = False,
    seed: Seed = 0,
    batch_size: PositiveInt = 32,
    num_workers: Workers | None = None,
    device: str | None = None,
    precision: Precision = "32",
    on_error: OnError = "raise",
    value_range: ValueRange | None = None,
    max_patches: PositiveInt = 50_000,
    progress: bool | None = None,
    **loading: Any,
) -> DenseResults:
    """Evaluates a frozen encoder on images whose pixels have classes.

    The images go through the encoder once, resized so that the short side fits and
    cropped at the centre, as are their masks (which are read once more before, to find
    mistakes early). The layer and the hyper-parameters are chosen on a fifth of the
    training images, 100 at most; the test images are scored once with that choice, at
    the size of the encoder's images.

    With `out`, patch tokens and finished rows are kept there as they come, as by
    `evaluate`: an evaluation that was cut, called again with the same arguments, ends
    with the same numbers and makes nothing twice.

    Args:
        encoder:
            The directory of a pretraining run or its `encoder.safetensors`; the name of
            a timm model; or, in Python, a timm model or one of our encoders. See
            `load_encoder`.
        data:
            A folder that holds train/ and val/, or the training images; each of these
            holds images/ and masks/. The mask of images/a/b.jpg is masks/a/b.png, with
            one channel or a palette. Without test images, a fifth is held out by the
            seed.
        protocols:
            Any of "knn" and "linear", or objects with settings such as
            `DenseLinear(epochs=5)`.
        val:
            The test images, if they do not come with `data`.
        classes:
            Names of the classes, whose numbers in the masks are 0, 1, 2, and so on. By
            default every value that occurs is a class.
        ignore_index:
            Values in the masks that are no class; ADE20K ignores 0 and 255.
        layers:
            Layers to choose from: blocks of a ViT or stages of a Swin, from 0, or from
            the end if negative. The earlier stages of a Swin have more patches.
        random_baseline:
            Evaluate the same encoder at random initialisation, too.
        out:
            Directory that `dense.json` and `report.html` are written to. It may be that
            of `evaluate`.
        cache:
            Directory of patch tokens on disk, which several evaluations may share: 300
            MB per 1,000 images and layer for a ViT-B/16 at 224 pixels. By default
            features/ in `out`, or, without `out`, a temporary one.
        overwrite:
            Replace a `dense.json` that is there.
        seed:
            Seed of what is held out and drawn, and of the random initialisation.
        batch_size:
            Number of images that are encoded at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute, such as "cpu" or "cuda:1". By default the accelerator, if
            there is one.
        precision:
            "32", "bf16" to encode in bfloat16 autocast, or on GPUs "16".
        on_error:
            What an image or a mask does that cannot be read: "raise" an error that
            names it, or "skip", which leaves both out and says how many, by reason. All
            are read once more for that.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits. By default those that a run was pretrained with, else
            (0, 65535).
        max_patches:
            Number of training patches that a protocol learns from, drawn evenly from
            all images, at least one of each. Bounds the memory, with the patches of the
            held-out images.
        progress:
            Show progress bars. By default on a terminal.
        loading:
            Other arguments of `load_encoder`, such as `img_size=224`.

    Returns:
        One row per encoder and protocol, notes, and what it takes to run it again.

    Raises:
        ValueError: If an argument is out of range, if masks are missing or do not fit
            their images or classes, or if `out` holds results already. Nothing has been
            written then, but for the patch tokens if all classes lie outside the crop.
        OSError: If `out` or `cache` cannot be written, or if there is no room.
    """
    given = dict(locals())
    chosen = resolve_protocols(protocols, DENSE_PROTOCOLS)
    file = None if out is None else results_file(Path(out), overwrite, DENSE_FILE)
    loading = check_loading("evaluate_dense", loading, DENSE_PROTOCOLS)
    with keyed_random_state(seed, "evaluation", "encoder"):
        model = load_encoder(encoder, **loading)
    layers = EncoderFeatures(model, layers, ["tokens"]).layers
    train_files, test_files, held_out = open_segmentation(
        data, val, seed=seed, in_chans=model.in_chans
    )
    if value_range is None:
        value_range = getattr(model, "value_range", None)
    transform = EvalTransform(model.img_size, crop_ratio=1.0, normalize=None)
    notes = origin_notes(model, resized=loading.get("img_size") is not None)
    show = sys.stdout.isatty() if progress is None else progress
    if on_error == "skip":

        def whole(files: MaskedFiles, part: Part) -> MaskedFiles:
            pairs = SegmentationDataset(
                files, transform, (), model.in_chans, value_range
            )
            found = find_readable(pairs, part, num_workers, show)
            notes.extend(found.notes)
            return files.take(found.indices)

        train_files = whole(train_files, "training")
        test_files = whole(test_files, "test")
    both = train_files, test_files
    names, values = _classes(*both, classes, ignore_index, model)
    train, test = (
        SegmentationDataset(files, transform, values, model.in_chans, value_range)
        for files in both
    )
    if held_out:
        notes.append(
            f"{len(test)} of {len(train) + len(test)} images were held out for testing."
        )
    notes += overlap_notes(
        *([files.root / name for name in files.images] for files in both)
    )
    models = {model_name(encoder, model): model}
    if random_baseline:
        models[RANDOM] = at_random(model, seed)
    tasks = [Task(name, protocol) for name in models for protocol in chosen]

    place = choose_device(device)
    check_precision(precision, place)
    kept = Kept(
        models,
        [Views(part, "image") for part in (train, test)],
        out,
        cache,
        conditions(transform, model, precision, place),
    )
    settings = {
        "layers": layers,
        "seed": seed,
        "classes": names,
        "masks": [Views(part, "mask").fingerprint for part in (train, test)],
        "max_patches": max_patches,
    }
    keys = {task: kept.row_key(task, chosen[task.protocol], settings) for task in tasks}
    with ExitStack() as stack:
        runner = DenseRunner(
            models,
            chosen,
            train,
            test,
            names,
            kept,
            Encoding(batch_size, num_workers, place, precision, show),
            layers=layers,
            max_patches=max_patches,
            seed=seed,
            stack=stack,
        )
        found = kept.rows(keys, runner.encode, runner.run)
    rows = [DenseResult(**row) for task in tasks for row in found[task]["rows"]]
    record = evaluation_record(
        given,
        chosen,
        describe_encoder(model),
        {"classes": names, "num_train": len(train), "num_test": len(test)},
    )
    results = DenseResults(rows, [*notes, *kept.notes], record)
    if file is not None:
        with atomic_write(file) as temporary:
            temporary.write_text(to_text(results.to_dict()))
        kept.clear(list(keys.values()))
        write_page_or_warn(file.parent)
    return results


def _classes(
    train: MaskedFiles,
    test: MaskedFiles,
    names: Sequence[str] | None,
    ignored: Sequence[int],
    model: Any,
) -> tuple[list[str], list[int]]:
    """Returns names and values of the classes, and checks all masks."""
    known = None if names is None else {*range(len(names)), *ignored}
    both = [check_masks(files, model.in_chans, known) for files in (train, test)]
    found = set.union(*both)
    if names is not None:
        values = [value for value in range(len(names)) if value not in ignored]
        titles = [str(names[value]) for value in values]
    else:
        values = sorted(found - set(ignored))
        titles = [str(value) for value in values]
    if len(values) < 2:
        raise ValueError(
            f"A segmentation has at least two classes, and the masks of {train.root} "
            f"hold only {titles or 'pixels without a class'} (besides ignore_index="
            f"{list(ignored)})."
        )
    if not both[1] & set(values):
        raise ValueError("No pixel of the test images has a class.")
    if len(set(titles)) < len(titles):
        raise ValueError(f"The names of the classes differ, got {list(names or [])}.")
    return titles, values
