"""`pretrain(...)`: a run from its arguments to its finished marker."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from lightly_mim.arguments import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    Workers,
    checked,
)
from lightly_mim.checkpoints import save_encoder
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.notes import by_reason
from lightly_mim.data.sources import Data
from lightly_mim.evaluation.images import own_value_range
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring import OnlineProbe, Probe
from lightly_mim.monitoring.pictures import MaskDistance
from lightly_mim.optim import Recipe
from lightly_mim.pretraining.arguments import (
    check_init,
    config_of,
    refuse,
    run_arguments,
    withdrawal,
)
from lightly_mim.pretraining.choosing import (
    build_method,
    choose_as_before,
    choose_for_images,
)
from lightly_mim.pretraining.images import PretrainingImages
from lightly_mim.pretraining.length import epochs_in
from lightly_mim.pretraining.module import Pretraining
from lightly_mim.pretraining.summary import say_what_next, summary
from lightly_mim.pretraining.watchers import drawing, watching
from lightly_mim.report import report_run
from lightly_mim.runs import Changes, RunDirectory
from lightly_mim.sessions import SessionNotes
from lightly_mim.settings import (
    set_statistics,
    settings_of,
    warn_of_few_steps,
)
from lightly_mim.training.machine import Precision, choose_layout, default_precision
from lightly_mim.training.saving import AtomicCheckpointIO
from lightly_mim.training.signals import deferred, listening
from lightly_mim.training.trainer import fit, resumable_trainer

# What the line of an epoch shows, where it was logged.
LINES = (
    *("train_loss", "val_loss", "probe_top1", "knn_top1", "alignment", "rankme"),
    *("avg_dist", "images_per_second"),
)


@checked
def pretrain(
    out: str | Path,
    data: Data | None = None,
    method: Callable[[], MaskedImageModel] | MaskedImageModel | None = None,
    *,
    init: str | Path | None = None,
    val: Data | None = None,
    validate: bool = True,
    recipe: str | Recipe | None = None,
    epochs: PositiveInt | None = None,
    minutes: PositiveFloat | None = None,
    batch_size: PositiveInt | None = None,
    lr: PositiveFloat | None = None,
    warmup_epochs: NonNegativeFloat | None = None,
    weight_decay: NonNegativeFloat | None = None,
    min_scale: Share | None = None,
    normalize: dict[str, list[float]] | None = None,
    seed: Seed = 0,
    precision: Precision | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: PositiveInt | None = None,
    strategy: str = "auto",
    accumulate: PositiveInt = 1,
    grad_checkpointing: bool = False,
    compile: bool = False,
    num_workers: Workers | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    value_range: ValueRange | None = None,
    reconstruct_every: NonNegativeInt = 10,
    probe: Probe | None = None,
    probe_every: NonNegativeInt = 10,
    rank_every: NonNegativeInt = 10,
    avg_dist: bool = False,
    log_every: PositiveInt = 10,
    save_every_minutes: NonNegativeFloat = 30.0,
    tensorboard: bool = True,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
    progress: bool | None = None,
    report: bool = True,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    overwrite: bool = False,
) -> MaskedImageModel:
    """Pretrains an encoder on images and writes everything into a run directory.

    The directory is described in `lightly_mim.runs`. A run that was cut goes on with
    `resume=True` at the last checkpoint and ends with the weights of one that never was
    cut, bit for bit on a CPU with the same versions, threads, precision and compile
    setting. SIGTERM and SIGUSR2 make it save between two batches and end by
    `Preempted` with exit code 143 or 140; in a SLURM job, SIGTERM makes it save and go
    on until SLURM ends it (see `lightly_mim.training.signals`).

    Args:
        out:
            The run directory.
        data:
            A folder of images with `train/` and `val/`, with class folders, or flat;
            the name of a data set (see `lightly_mim.data.open_data`); or a Dataset
            that yields (sample, ...): samples that are still PIL images or uint8
            tensors get the method's augmentation, float tensors and lists of views are
            taken as they are. Labels are of use to `probe` and `rank_every` alone.
        method:
            The method, or a function that makes it. `seed` covers the initial weights
            only of what is made by a function: on the command line, always. None
            chooses method, encoder and size for the images and the machine, see
            `lightly_mim.defaults.method`, and says so; with `init` the method that the
            weights are of.
        init:
            Weights to begin with, on these images and with a schedule of this run's
            own: an earlier run's directory, a file or a folder of published weights,
            the name of a timm model with its weights, or OWNER/MODEL on the Hugging
            Face hub. Encoder, mask token, head and decoder are taken where they fit,
            and interpolated for another image size, patch size, window size or number
            of channels, see `MaskedImageModel.from_pretrained`. They go into `method`
            if it is passed, else into the method that they are of. Not `resume`, which
            goes on with the run in `out` where it stopped.
        val:
            Images for the validation loss: a folder or a Dataset. By default the
            `val/` part of `data` if it has one; without either, nothing is validated.
        validate:
            False leaves validation images alone: pretraining then sees training images
            only, where those of `val/` are for testing.
        recipe:
            Name of one of the method's published recipes, or a `Recipe`. It also sets
            the drop path rate of the encoder and, of a method that is made by
            `functools.partial(SimMIM, ...)` as on the command line, the initial weights
            and the parts that are left open; a method that is made otherwise has them
            from `SimMIM.from_recipe(name)`. By default `lightly_mim.defaults` chooses
            for the images at hand.
        epochs:
            Passes over the training images. By default the recipe's, or chosen. Warm-up
            and schedule keep their share of the run.
        minutes:
            How long the training steps are to take, instead of epochs: their speed is
            measured in a few that are thrown away, and the number of epochs follows
            from it. Validation, probes and pictures come on top. In one process only.
        batch_size:
            Images per optimiser step, over all devices and accumulated micro-batches.
            By default the recipe's, or chosen. An incomplete last batch is dropped.
        lr:
            Highest learning rate, instead of the chosen one; with `recipe` the rate per
            `recipe.lr_batch_size` images (512 for SimMIM), instead of the recipe's.
        warmup_epochs:
            Epochs of linear warm-up, instead of the recipe's.
        weight_decay:
            Weight decay, instead of the recipe's.
        min_scale:
            Smallest share of an image that a training crop covers, instead of the
            recipe's.
        normalize:
            `mean` and `std` of each channel, of images in [0, 1]. By default ImageNet's
            with `recipe`, those that the weights were trained with for a pretrained
            encoder, and else those of 512 of the training images.
        seed:
            Seed of everything that is random.
        precision:
            Lightning's precision. By default 'bf16-mixed' where the hardware computes
            in bfloat16, '32-true' elsewhere.
        accelerator:
            Lightning's accelerator: 'auto', 'cpu', 'gpu', 'mps'.
        devices:
            Lightning's devices: how many, or which. In a SLURM step, by default one
            for each task of a node.
        num_nodes:
            Number of machines. By default those of the SLURM step, or 1.
        strategy:
            Lightning's strategy: 'auto', 'ddp', ...
        accumulate:
            Number of micro-batches that an optimiser step accumulates.
        grad_checkpointing:
            Trade time for memory: recompute the encoder's activations.
        compile:
            Compile the method with `torch.compile`.
        num_workers:
            Processes that read images, per device. By default chosen by the loader.
        on_error:
            'raise' ends the run at an image that cannot be read and names it. 'skip'
            puts another image in its place, and says how many there were.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits, instead of (0, 65535). For folders. By default those that
            the weights were pretrained with. `evaluate` takes it over from the run.
        reconstruct_every:
            Epochs between two pictures of reconstructions. 0 for the last epoch only.
        probe:
            'linear' or 'attentive' shows the accuracy of a probe while the encoder is
            pretrained, as `probe_top1`: in the logs, the progress bar and the lines of
            the epochs. It is fitted on at most 5,000 labelled training images (1,000 if
            attentive) and scored on as many validation images; with `validate=False` or
            without validation images on a fifth of the training images, which the probe
            is then not fitted on. It changes nothing of the run. See
            `lightly_mim.monitoring.OnlineProbe`.
        probe_every:
            Epochs between two probes, besides one before the first step and one at the
            end. 0 for those two only.
        rank_every:
            Epochs between two looks at the features of up to 512 training images,
            besides one before the first step and one at the end: `rankme` and, with
            labels, `knn_top1` in the logs, a warning if the encoder collapses, and at
            the end a sentence, or a warning if the features are worse than before. It
            changes nothing of the run. See `lightly_mim.monitoring.FeatureWatch`. 0 for
            none.
        avg_dist:
            Log the masks' AvgDist in pixels, see
            `lightly_mim.masking.average_distance`.
        log_every:
            Optimiser steps between two logs. Several processes look as often whether
            one of them was told to stop; one looks after every step.
        save_every_minutes:
            Longest time between two checkpoints: what a run that is killed without
            warning may lose. Every epoch's end saves too. 0 for that alone.
        tensorboard:
            Write logs for TensorBoard beside `metrics.csv`.
        loggers:
            Further Lightning loggers.
        callbacks:
            Further Lightning callbacks.
        progress:
            Show a progress bar. By default on a terminal; elsewhere a line is printed
            for every epoch.
        report:
            Write `report.html` at the end, see `lightly_mim.report`: what was run, its
            curves and pictures, and features of up to 300 images.
        resume:
            Go on with the run in `out`, or begin it if there is none. `out` is enough:
            without data or without method, all that is left at its default is the run's
            own, as its config.yaml says. Other arguments than the run's own are
            refused, but for those that no weight depends on, such as `val`, `probe`,
            `num_workers` or `tensorboard`. Images are known by their names and sizes,
            by the bytes of a few and by the times of all or none: their folder may
            have moved or been copied.
        allow_changes:
            Arguments that a run that goes on may change although its result depends on
            them: some of 'accelerator', 'callbacks', 'compile', 'data' (other images),
            'devices', 'grad_checkpointing', 'num_nodes', 'on_error', 'precision' and
            'strategy'. The run then does not end bit for bit as one that never was cut;
            what was changed is in `history.json` and `finished.json`.
        overwrite:
            Replace the run in `out`.

    Returns:
        The trained method.

    Raises:
        ValueError: If an argument is out of range, if data and method do not fit, or
            if `out` may not be written. Nothing has been written then.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        Preempted: If a signal told the process to stop, when the run is saved.
    """
    arguments = dict(locals())
    run = RunDirectory(out)
    stored = run.stored_config() if resume else None
    if resume and (data is None or (method is None and stored is not None)):
        parameters = inspect.signature(pretrain).parameters
        defaults = {name: each.default for name, each in parameters.items()}
        return pretrain(**run_arguments(run, arguments, defaults))
    refuse(arguments)
    check_init(run, init, stored)
    assert data is not None
    for name in ("data", "val"):
        if isinstance(arguments[name], str) and Path(arguments[name]).is_dir():
            arguments[name] = str(Path(arguments[name]))  # photos/ is photos
    built = isinstance(method, MaskedImageModel)
    goes_on = resume and run.checkpoint.exists()
    method = build_method(method, data, init, recipe, accelerator, seed, goes_on)
    precision = precision or default_precision(accelerator)
    layout = choose_layout(devices, num_nodes)
    if stored is not None and value_range is None and stored.get("value_range"):
        low, high = stored["value_range"]
        value_range = (low, high)
    elif stored is None and value_range is None:  # that of the weights, if they say it
        value_range = own_value_range(method.encoder, data, val)
    open_images = partial(
        PretrainingImages,
        method,
        data,
        val,
        validate,
        num_workers,
        on_error,
        value_range,
        seed,
    )
    images: PretrainingImages | None = None
    if stored is not None:
        settings, normalize = choose_as_before(method, run, stored, arguments)
    else:
        if _rank() == 0:  # before anything is looked at or chosen
            run.check({}, resume, overwrite, allow_changes)
        images = open_images()
        settings, normalize = choose_for_images(method, images, arguments)
    if normalize is not None:
        set_statistics(method.encoder, normalize)
    if value_range is not None:
        method.encoder.value_range = (value_range[0], value_range[1])
    if settings.drop_path is not None:
        method.encoder.set_drop_path(settings.drop_path)
    if grad_checkpointing:
        method.set_grad_checkpointing()
    if minutes is not None and images is not None:
        images.follow(settings)
        options = arguments | {"devices": layout.devices, "num_nodes": layout.num_nodes}
        epochs = epochs_in(minutes, method, settings, images, options, precision)
        settings = settings_of(
            method, arguments | {"epochs": epochs}, num_images=images.num_images
        )
    resolved = {
        "method": method,
        "recipe": settings,
        "normalize": normalize,
        "value_range": value_range,
        "precision": precision,
        "devices": layout.devices,
        "num_nodes": layout.num_nodes,
    }
    config = config_of(arguments | resolved)
    for folder in (data, val):
        if isinstance(folder, str | Path) and Path(folder).is_dir():
            run.check_outside(Path(folder))
    changes: Changes = {}
    if _rank() == 0:
        changes = run.check(config, resume, overwrite, allow_changes)
    if run.finished and resume:
        state = AtomicCheckpointIO(run.check_owner).load_checkpoint(run.checkpoint)
        done = Pretraining(method)
        done.on_load_checkpoint(state)
        done.load_state_dict(state["state_dict"])
        print(f"The run in {run.path} has finished: nothing is left to do.", flush=True)
        return method
    method.check_masking()

    images = images or open_images()
    images.follow(settings)
    folder = Path(out).absolute()
    show_bar = sys.stdout.isatty() if progress is None else progress
    watchers = watching(images, probe, probe_every, rank_every)
    trainer = resumable_trainer(
        layout,
        run.checkpoint,
        ask_every=log_every,
        save_every_minutes=save_every_minutes,
        show_bar=show_bar,
        lines=LINES,
        previous={run.checkpoint: run.previous},
        may_write=run.check_owner,
        loggers=[
            *([TensorBoardLogger(folder, "tensorboard", "")] if tensorboard else []),
            *(loggers or []),
        ],
        watching=[
            SessionNotes(run),
            *drawing(images, run.reconstructions, reconstruct_every),
            *([MaskDistance()] if avg_dist else []),
            *watchers,
        ],
        callbacks=callbacks,
        max_epochs=settings.epochs,
        accelerator=accelerator,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=min(log_every, images.steps_per_epoch),
        limit_val_batches=0.0 if images.val is None else 1.0,
        default_root_dir=folder,
    )
    images.check(trainer)
    for callback in watchers:
        if isinstance(callback, OnlineProbe) and trainer.is_global_zero:
            callback.read()
    device = trainer.strategy.root_device
    method.choose_attention(device, bf16=trainer.precision == "bf16-mixed")
    checkpoint = run.checkpoint if resume and run.checkpoint.exists() else None
    if checkpoint is None:  # before anything is written
        method.fit_target(images.sample)
    if trainer.is_global_zero:
        facts = images.facts(trainer)
        if checkpoint is not None:
            changes |= run.check_facts(facts, allow_changes)
        fresh = not (resume or overwrite)
        run.begin(
            config, overwrite, fresh=fresh, facts=facts, built=built, changes=changes
        )
        print(summary(trainer, settings, images, checkpoint), flush=True)
        steps = settings.epochs * images.steps_per_epoch
        warn_of_few_steps(method, recipe, settings, steps)
        if checkpoint is not None and changes:
            print(withdrawal(changes), flush=True)
    module = Pretraining(method, settings, settings.batch_size, seed, compile)
    module.takes_other_images = "data" in allow_changes
    with listening(), deferred():
        fit(trainer, module, checkpoint, datamodule=images)
        unreadable = images.unreadable()
        if trainer.is_global_zero:
            run.check_owner()
            save_encoder(method.encoder, run.encoder)
            run.finish(
                {
                    "epochs": trainer.current_epoch,
                    "steps": trainer.global_step,
                    "unreadable": unreadable,
                }
            )
            if unreadable:
                print(
                    f"{len(unreadable)} files could not be read, and others took their "
                    f"place (all of them in {run.marker}):\n  "
                    + "\n  ".join(by_reason(unreadable))
                )
            print(f"Finished. The encoder is in {run.encoder}.", flush=True)
            if report:
                report_run(run.path, method, *images.shown(), device)
            if method.encoder.name:
                say_what_next(run.path, data, val, images)
    return method


def _rank() -> int:
    """Returns this process' number, also before a Trainer is there."""
    return getattr(rank_zero_only, "rank", None) or 0
