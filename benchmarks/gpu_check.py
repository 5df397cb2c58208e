"""Checks on a GPU, once, what no test can check without one, and prints one table.

Every method trains for a few steps in every precision. The exit code is 1 if

- loss and gradient of a batch are not those of the CPU in float32, within the rounding
  of the precision;
- the loss of a step is not finite;
- a step waits for the device;
- the method does not compile as one graph, or has another loss then;
- a run that was cut between two batches does not end as one that was not.

Speed, utilisation and memory are reported beside it. `--device cpu` tries the script
itself: what only a GPU can tell says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from studies.script import script  # isort: skip  # before PyTorch
import pytorch_lightning as pl
import torch
from measuring.gpu import WARM_UP, Watch
from sklearn.datasets import load_sample_images
from studies.options import ENCODER_OPTION, KEY_VALUES, METHODS, whole_number
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightly_mim import MaskedImageModel, Pretraining, pretrain
from lightly_mim.data import keyed_random_state
from lightly_mim.evaluation.features import normalize_images
from lightly_mim.masking import Mask
from lightly_mim.reporting.study import print_table
from lightly_mim.training.cuda import float32_products


class Precision(NamedTuple):
    """How a step computes, and how far its rounding may lead from float32.

    Attributes:
        lightning:
            Lightning's name.
        dtype:
            Of autocast.
        loss:
            Largest difference of the loss, over the loss.
        gradient:
            Largest norm of the gradient's difference, over the gradient's norm.
        scale:
            What the loss is multiplied by before its gradient is taken.
    """

    lightning: str
    dtype: torch.dtype
    loss: float
    gradient: float
    scale: float = 1.0


# Three times what was measured on a CPU, or more, with ViTs of 2 to 12 blocks: in bf16
# a loss off by 6e-6 to 2e-4 and a gradient by 4e-3 to 3e-2, in fp16 4e-7 to 1e-5 and
# 7e-4 to 3e-3. TF32 rounds to as many bits as fp16. An H100 was within it, and in
# float32 within 5e-6 and 7e-4: SimMIM's, whose gradients are signs that rounding turns.
PRECISIONS = {
    "32": Precision("32-true", torch.float32, 1e-4, 1e-3),
    "tf32": Precision("32-true", torch.float32, 1e-3, 2e-2),
    "bf16": Precision("bf16-mixed", torch.bfloat16, 2e-3, 1e-1),
    "fp16": Precision("16-mixed", torch.float16, 1e-3, 2e-2, scale=2.0**10),
}
CUDA_ONLY = "CUDA only"

# Largest distance of two runs' weights, over how far training took them. A CPU gives
# the same bits. CUDA may add up gradients in an order of its own; an H100 did not.
RESUMED = {"cpu": 0.0, "cuda": 0.05}
RESUMED_EPOCHS, RESUMED_STEPS, CUT = 2, 4, 6  # steps of an epoch; cut in the second

COMPARED = 4  # images of the batch that the CPU computes, too

COLUMNS = (
    *("method", "precision", "training loss", "loss off by", "gradient off by"),
    *("images/s", "GPU %", "peak GB", "waits", "one graph", "resumed"),
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this script."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="where to compute (default: cuda)",
    )
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"some of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        metavar="NAME",
        help=f"some of {', '.join(PRECISIONS)} (default: all)",
    )
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="timm name of a ViT (default: vit_base_patch16_224, on a CPU "
        "vit_tiny_patch16_224)",
    )
    parser.add_argument("--encoder-option", **KEY_VALUES, help=ENCODER_OPTION)
    parser.add_argument(
        "--img-size", type=whole_number(1), default=224, metavar="PIXELS",
        help="side of the images (default: 224)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=whole_number(1), metavar="N",
        help="images per step (default: 64, on a CPU 8)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=whole_number(WARM_UP + 2), metavar="N",
        help=f"steps, {WARM_UP} of them to warm up (default: 50, on a CPU 8)",
    )  # fmt: skip
    return parser


@script(parser)
def main(arguments: argparse.Namespace, command: str) -> None:
    """Runs the checks. Exits with 1 if one fails."""
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "PyTorch sees no GPU here. --device cpu tries the script, and nothing else."
        )
    arguments.encoder = arguments.encoder or (
        "vit_base_patch16_224" if cuda else "vit_tiny_patch16_224"
    )
    arguments.batch_size = arguments.batch_size or (64 if cuda else 8)
    arguments.steps = arguments.steps or (50 if cuda else 8)
    lines, failures = [], []
    for name, precision in itertools.product(arguments.method, arguments.precision):
        print(f"{name}, {precision}", flush=True)
        row = Check(name, precision, arguments)
        lines.append(row.line())
        failures += [f"{name}, {precision}: {failed}" for failed in row.failures]
    print_table(_title(arguments), COLUMNS, lines, width=160)
    print(
        f"{command}\n"
        "Loss and gradient are compared with the CPU's in float32. images/s, GPU % and "
        f"memory are those of steps on a batch in memory, after {WARM_UP} of warm-up. "
        "fp16 may wait where its scaler looks for infinite gradients. A run that goes "
        f"on may end {100 * RESUMED['cuda']:.0f} % of the way that training took from "
        "one that was not cut; on a CPU it must be the same."
    )
    if failures:
        print("\n".join(["", f"{len(failures)} failed:", *failures]))
        sys.exit(1)
    print("\nAll checks passed.")


def _title(arguments: argparse.Namespace) -> str:
    device = platform.processor() or platform.machine()
    if arguments.device == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return (
        f"{device}, PyTorch {torch.__version__}: {arguments.encoder}, "
        f"{arguments.img_size} x {arguments.img_size} pixels, batches of "
        f"{arguments.batch_size}"
    )


class Check:
    """The checks of one method in one precision.

    Attributes:
        failures:
            What failed, one sentence each.
    """

    def __init__(
        self, name: str, precision: str, arguments: argparse.Namespace
    ) -> None:
        self.failures: list[str] = []
        self._names = (name, precision)
        self._precision = PRECISIONS[precision]
        self._tf32 = precision == "tf32"
        self._build: Callable[[], MaskedImageModel] = partial(
            METHODS[name],
            arguments.encoder,
            img_size=arguments.img_size,
            **dict(arguments.encoder_option),
        )
        self._device = torch.device(arguments.device)
        self._cuda = arguments.device == "cuda"
        self._steps, self._batch_size = arguments.steps, arguments.batch_size
        self._side = arguments.img_size

    def line(self) -> list[str]:
        """Runs the checks and returns the line of the table."""
        if not self._cuda and self._names[1] in ("tf32", "fp16"):
            return [*self._names, *[CUDA_ONLY] * (len(COLUMNS) - 2)]
        checks: tuple[tuple[int, Callable[[], list[str]]], ...] = (
            (5, self._train),
            (2, self._compare),
            (1, self._compile),
            (1, self._resume),
        )
        found = []
        # What mixed precision computes in TF32, "32-true" computes exactly.
        with float32_products(self._device, "16-mixed" if self._tf32 else "32-true"):
            for width, check in checks:
                try:
                    found.append(check())
                except Exception as error:
                    self._fail(f"{type(error).__name__}: {_last(error)}")
                    found.append(["FAILED", *[""] * (width - 1)])
        (loss, *measured), compared, compiled, resumed = found
        return [*self._names, loss, *compared, *measured, *compiled, *resumed]

    def _fail(self, sentence: str) -> None:
        self.failures.append(sentence)

    def _judged(self, what: str, value: float, largest: float) -> str:
        """Returns the text of a value, which must be small."""
        if not value <= largest:  # NaN is not
            self._fail(f"{what} by {value:.1e}, more than {largest:.0e}.")
            return f"{value:.1e} FAILED"
        return f"{value:.1e}" if value else "0"

    def _method(self) -> MaskedImageModel:
        with keyed_random_state(0, "weights"):
            return self._build()

    def _train(self) -> list[str]:
        """Trains, and returns loss, speed, utilisation, memory and what waited."""
        waits = ""
        try:
            watch = self._fit(refuses=True)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            waits = _last(error)
            self._fail(f"A step waits for the device. {waits}")
            watch = self._fit(refuses=False)
        finally:
            if self._cuda:
                torch.cuda.set_sync_debug_mode("default")
        losses = torch.stack(watch.losses).tolist()
        if not all(map(math.isfinite, losses)):
            self._fail(f"A loss is not finite: {losses}.")
        speed = self._batch_size * (self._steps - WARM_UP) / watch.seconds
        return [
            f"{losses[0]:.3f} to {losses[-1]:.3f}",
            f"{speed:.0f}",
            watch.utilisation if self._cuda else CUDA_ONLY,
            f"{watch.peak / 1e9:.2f}" if self._cuda else CUDA_ONLY,
            ("FAILED" if waits else "no") if self._cuda else CUDA_ONLY,
        ]

    def _fit(self, refuses: bool) -> Watch:
        """Trains for some steps on one batch, with a Trainer of its own."""
        images = photographs(self._batch_size, self._side)
        batch = images.pin_memory() if self._cuda else images
        scaled = self._precision.dtype is torch.float16
        watch = Watch(self._steps, self._device, scaled, refuses)
        method = self._method()
        bf16 = self._precision.dtype is torch.bfloat16
        method.choose_attention(self._device, bf16=bf16)
        with _quiet():
            trainer = pl.Trainer(
                accelerator=self._device.type,
                devices=1,
                precision=self._precision.lightning,  # type: ignore[arg-type]
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[watch],
            )
            module = Pretraining(method, batch_size=self._batch_size)
            batches: Any = [(batch,)] * self._steps
            trainer.fit(module, DataLoader(batches, batch_size=None))
        return watch

    def _compare(self) -> list[str]:
        """Returns how far loss and gradient are from the CPU's in float32."""
        method = self._method().eval()  # without noise
        images = photographs(COMPARED, self._side)
        generator = torch.Generator().manual_seed(0)
        mask = Mask.of(method.draw_mask(images, generator))
        exact = copy.deepcopy(method)
        exact.choose_attention(torch.device("cpu"), bf16=False)
        with torch.autocast("cpu", enabled=False):
            expected = exact(_normalized(exact, images), mask).loss
        torch.autograd.backward(expected)
        loss = self._loss(method, images, mask)
        torch.autograd.backward(self._precision.scale * loss)
        gradient, exact_gradient = _gradient(method), _gradient(exact)
        off = gradient.cpu() / self._precision.scale - exact_gradient
        relative = abs(loss.item() - expected.item()) / abs(expected.item())
        norm = (off.norm() / exact_gradient.norm()).item()
        return [
            self._judged("The loss is off", relative, self._precision.loss),
            self._judged("The gradient is off", norm, self._precision.gradient),
        ]

    def _loss(self, method: MaskedImageModel, images: Tensor, mask: Mask) -> Tensor:
        """Returns the loss of a batch on the device, in the precision."""
        dtype = self._precision.dtype
        method.to(self._device)
        method.choose_attention(self._device, bf16=dtype is torch.bfloat16)
        pixels = _normalized(method, images.to(self._device))
        mask = Mask(mask.cells.to(self._device), mask.count)
        mixed = dtype is not torch.float32
        with torch.autocast(self._device.type, dtype, enabled=mixed):
            loss: Tensor = method(pixels, mask).loss
        return loss

    def _compile(self) -> list[str]:
        """Compiles a step as one graph; on a CPU without generating code."""
        method = self._method().eval()
        images = photographs(COMPARED, self._side)
        mask = Mask.of(method.draw_mask(images, torch.Generator().manual_seed(0)))
        loss = self._loss(method, images, mask)
        torch.compiler.reset()
        method.compile(
            fullgraph=True, backend="inductor" if self._cuda else "aot_eager"
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TF32, and of small GPUs
                compiled = self._loss(method, images, mask)
                torch.autograd.backward(compiled)
        except Exception as error:
            self._fail(f"The step does not compile as one graph. {_last(error)}")
            return ["FAILED"]
        off = abs(compiled.item() - loss.item()) / abs(loss.item())
        said = self._judged("Compiled, the loss is off", off, self._precision.loss)
        return ["yes" if "FAILED" not in said else said]

    def _resume(self) -> list[str]:
        """Returns how far a run that was cut ends from one that was not."""
        if self._tf32:  # a choice of the user's own Trainer
            return [""]
        batch_size = min(self._batch_size, 8)
        images = photographs(RESUMED_STEPS * batch_size, self._side)

        def run(out: str, cut: bool = False, resume: bool = False) -> Tensor:
            method = pretrain(
                out,
                TensorDataset(images),
                self._build,
                epochs=RESUMED_EPOCHS,
                batch_size=batch_size,
                precision=self._precision.lightning,  # type: ignore[arg-type]
                accelerator=self._device.type,
                devices=1,
                num_workers=0,
                rank_every=0,
                tensorboard=False,
                report=False,
                progress=False,
                callbacks=[Cut()] if cut else None,
                resume=resume,
                allow_changes=["callbacks"] if resume else [],
            )
            return _weights(method)

        with tempfile.TemporaryDirectory() as folder, _quiet():
            uncut = run(f"{folder}/uncut")
            with contextlib.suppress(SystemExit):
                run(f"{folder}/cut", cut=True)
                raise RuntimeError("The run was told to stop and came to its end.")
            resumed = run(f"{folder}/cut", resume=True)
        way = (uncut - _weights(self._method())).norm()
        off = ((resumed - uncut).norm() / way).item()
        return [self._judged("The resumed run is off", off, RESUMED[self._device.type])]


class Cut(pl.Callback):
    """Tells the run to stop in its second epoch, as SLURM does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Sends the signal."""
        if trainer.global_step == CUT:
            os.kill(os.getpid(), signal.SIGUSR2)


def photographs(number: int, side: int) -> Tensor:
    """Returns pieces of scikit-learn's two photographs.

    Args:
        number:
            How many.
        side:
            Their side in pixels.

    Returns:
        uint8 tensor with shape (number, 3, side, side).
    """
    generator = torch.Generator().manual_seed(0)
    photos = torch.stack([torch.tensor(i) for i in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2)
    if side > photos.shape[2]:
        larger = nn.functional.interpolate(photos.float(), scale_factor=side / 400)
        photos = larger.byte()
    height, width = photos.shape[2] - side, photos.shape[3] - side
    corners = torch.rand(number, 2, generator=generator) * torch.tensor([height, width])
    return torch.stack(
        [
            photos[which % 2, :, y : y + side, x : x + side]
            for which, (y, x) in enumerate(corners.int().tolist())
        ]
    )


def _normalized(method: MaskedImageModel, images: Tensor) -> Tensor:
    return normalize_images(images, method.encoder.mean, method.encoder.std)


def _gradient(method: MaskedImageModel) -> Tensor:
    """Returns the gradients of all parameters as one vector."""
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads])


def _weights(method: MaskedImageModel) -> Tensor:
    """Returns all parameters as one vector on the CPU."""
    return torch.cat([p.detach().cpu().flatten().double() for p in method.parameters()])


def _last(error: BaseException) -> str:
    """Returns the first line of an error, and the line of code that it comes from."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "lightly_mim" in frame.filename
    ]
    where = f" ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
    return f"{message}{where}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what training says from the screen."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
