from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from lightly_mim.methods import SimMIM
from lightly_mim.pretraining import pretrain
from lightly_mim.runs import RunDirectory, TakenOverError
from lightly_mim.training.signals import (
    Preempted,
    Request,
    check,
    deferred,
    listening,
    requested,
    take,
)

from ..conftest import SHORT_RUN, TINY_VIT


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


# The signals.


def test_listening__raises_at_once_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)
    with pytest.raises(Preempted) as caught, listening() as handlers:
        assert handlers == {signal.SIGTERM: before[0], signal.SIGUSR2: before[1]}
        send(signal.SIGTERM)
    assert (caught.value.signum, caught.value.code) == (signal.SIGTERM, 143)
    assert before == (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGUSR2),
    )
    assert requested() == Request.NOTHING


def test_listening__second_signal_does_not_interrupt_the_way_out() -> None:
    with listening():
        with pytest.raises(Preempted):
            send(signal.SIGUSR2)
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        assert requested() == Request.STOP


def test_deferred__raises_at_the_outermost_end_only() -> None:
    reached = []
    with listening(), pytest.raises(Preempted), deferred():
        with pytest.raises(Preempted), deferred():
            send(signal.SIGUSR2)
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]


def test_deferred__leaves_other_errors_alone() -> None:
    with listening(), pytest.raises(KeyError), deferred():
        send(signal.SIGUSR2)
        raise KeyError


def test_take__a_request_to_save_is_met_once_and_one_to_stop_stays() -> None:
    with listening(stop=[signal.SIGUSR2], save=[signal.SIGTERM]):
        send(signal.SIGTERM)
        assert [take(), take()] == [Request.SAVE, Request.NOTHING]
        with pytest.raises(Preempted), deferred():
            send(signal.SIGUSR2)
            send(signal.SIGTERM)
            assert [take(), take()] == [Request.STOP, Request.STOP]
        with pytest.raises(Preempted):
            check()


def test_listening__slurms_sigterm_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with listening():
        send(signal.SIGTERM)
        assert take() == Request.SAVE
        with pytest.raises(Preempted) as caught:
            send(signal.SIGUSR2)
    assert caught.value.code == 128 + signal.SIGUSR2


def test_listening__the_outermost_block_owns_the_signals() -> None:
    with listening(stop=[signal.SIGUSR2], save=[signal.SIGTERM]):
        with listening() as inner:
            assert inner == {}
            send(signal.SIGTERM)
            assert requested() == Request.SAVE
        assert requested() == Request.SAVE


def test_listening__does_nothing_in_a_thread_and_in_a_forked_child() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def body() -> None:
        with listening() as handlers:
            seen.append((handlers, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [({}, before)]

    # A fresh process: this one has threads, which a fork would not like.
    code = (
        "import os, signal\n"
        "from lightly_mim.training.signals import listening, requested\n"
        "with listening():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.kill(os.getpid(), signal.SIGUSR2)\n"
        "        os._exit(7 + requested())\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "assert os.waitstatus_to_exitcode(status) == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


# Pretraining.


def build() -> SimMIM:
    return SimMIM(**TINY_VIT, drop_path_rate=0.3)


class Send(Callback):
    """Sends signals to its own process: {(epoch, batch): signal}, before the batch."""

    def __init__(self, plan: dict[tuple[int, int], int]) -> None:
        self.plan = plan
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        place = (trainer.current_epoch, batch_idx)
        self.seen.append(place)
        if place in self.plan:
            send(self.plan.pop(place))


def run(out: Path, data: Path, callback: Send, **options: Any) -> Any:
    defaults = SHORT_RUN | {"save_every_minutes": 0}
    return pretrain(out, data, build, callbacks=[callback], **(defaults | options))


def weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(path / "checkpoints" / "last.ckpt")
    return {n: t for n, t in state["state_dict"].items() if n.startswith("method.")}


def assert_same(out: Path, finished: Path) -> None:
    ours, theirs = weights(out), weights(finished)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    columns = ("epoch", "step", "train_loss", "train_loss_step", "val_loss", "lr")
    tables = []
    for path in (out, finished):
        with (path / "metrics.csv").open() as file:
            tables.append([[row[c] for c in columns] for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(out, photos, Send({}))
    return out


@pytest.mark.parametrize(
    ("place", "next_place"),
    # Within an epoch, at its last batch, at its first.
    [((1, 1), (1, 2)), ((1, 3), (2, 0)), ((2, 0), (2, 1))],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pretrain__stops_between_batches_and_goes_on_the_same(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: tuple[int, int],
    next_place: tuple[int, int],
    num_workers: int,
) -> None:
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        run(out, photos, Send({place: signal.SIGTERM}), num_workers=num_workers)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not RunDirectory(out).finished
    said = capsys.readouterr().out
    assert "told to stop in epoch" in said
    again = Send({})
    run(out, photos, again, num_workers=num_workers, resume=True)
    assert again.seen[0] == next_place
    step = next_place[0] * 4 + next_place[1]
    epoch = next_place[0] + 1
    said = capsys.readouterr().out
    assert f"going on in epoch {epoch}/3 after optimiser step {step}" in said
    assert_same(out, finished)


def test_pretrain__stopped_twice_and_once_saved(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with listening(stop=[signal.SIGUSR2], save=[signal.SIGTERM]):
        # The launcher listens; the request to save does not end the run.
        plan: dict[tuple[int, int], int] = {
            (0, 1): signal.SIGTERM,
            (1, 0): signal.SIGUSR2,
        }
        callback = Send(plan)
        with pytest.raises(Preempted):
            run(out, photos, callback)
        assert callback.seen[-1] == (1, 0)
    with pytest.raises(Preempted) as caught:
        run(out, photos, Send({(1, 1): signal.SIGUSR2}), resume=True)
    assert caught.value.code == 128 + signal.SIGUSR2
    run(out, photos, Send({}), resume=True)
    assert_same(out, finished)


def test_pretrain__stop_in_the_last_epochs_end_finishes_first(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Preempted):
        run(out, photos, Send({(2, 3): signal.SIGTERM}))
    assert RunDirectory(out).finished
    assert_same(out, finished)
    again = Send({})
    run(out, photos, again, resume=True)
    assert again.seen == []


def test_pretrain__accumulated_gradients_are_not_cut(
    photos: Path, tmp_path: Path
) -> None:
    run(tmp_path / "whole", photos, Send({}), accumulate=4)
    out = tmp_path / "cut"
    # The sixth micro-batch of the epoch: the window ends with the eighth.
    callback = Send({(1, 5): signal.SIGTERM})
    with pytest.raises(Preempted):
        run(out, photos, callback, accumulate=4)
    assert callback.seen[-1] == (1, 7)
    run(out, photos, Send({}), accumulate=4, resume=True)
    assert_same(out, tmp_path / "whole")


class Fail(Send):
    """Ends the run with an error, as a power cut would."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((trainer.current_epoch, batch_idx))
        if self.seen[-1] in self.plan:
            raise InterruptedError


def test_pretrain__saves_now_and_then(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    often = 1e-9  # minutes: after every step
    with pytest.raises(InterruptedError):
        run(out, photos, Fail({(1, 2): 0}), save_every_minutes=often)
    assert "saved in epoch 2/3 after optimiser step 6" in capsys.readouterr().out
    # Named like the class that was recorded.
    again = Fail({})
    run(out, photos, again, resume=True)
    assert again.seen[0] == (1, 2)
    assert_same(out, finished)


def test_pretrain__refuses_a_negative_time(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="save_every_minutes of pretrain is a number of at least 0"
    ):
        run(tmp_path / "run", photos, Send({}), save_every_minutes=-1)
    assert not (tmp_path / "run").exists()


class TakeOver(Send):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            # What another process does first.
            other = RunDirectory(str(trainer.default_root_dir))
            other.begin({"out": "x"}, overwrite=False)


def test_pretrain__leaves_the_run_to_the_process_that_took_over(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TakenOverError, match="Another process goes on"):
        run(out, photos, TakeOver({}))
    assert torch.load(out / "checkpoints" / "last.ckpt")["global_step"] == 4


SCRIPT = """
import sys, time
from pathlib import Path
from pytorch_lightning.callbacks import Callback
from lightly_mim.methods import SimMIM
from lightly_mim.pretraining import pretrain

class Send(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(0.1)
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (0, 3, 0):
            Path(sys.argv[1], "started").touch()

def build():
    return SimMIM(**{vit!r}, drop_path_rate=0.3)

if __name__ == "__main__":
    pretrain(
        sys.argv[1] + "/run", {data!r}, build, epochs=3, batch_size=8, lr=0.002,
        precision="32-true", accelerator="cpu", devices={devices},
        strategy="auto" if {devices} == 1 else "ddp", num_workers=1,
        tensorboard=False, log_every=2, callbacks=[Send()], save_every_minutes=0,
        resume=True,
    )
"""


@pytest.mark.parametrize(
    "devices", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["one", "ddp"]
)
def test_pretrain__killed_program_goes_on(
    finished: Path, photos: Path, tmp_path: Path, devices: int
) -> None:
    """SIGTERM to the first process, from outside, at no special moment."""
    script = tmp_path / "script.py"
    text = SCRIPT.replace("{vit!r}", repr(TINY_VIT)).replace(
        "{data!r}", repr(str(photos))
    )
    script.write_text(text.replace("{devices}", str(devices)))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script), str(tmp_path)]
    program = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        assert program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    errors = program.communicate(timeout=240)[1]
    assert program.returncode == 143, errors
    assert "Traceback" not in errors
    run_directory = RunDirectory(tmp_path / "run")
    assert not run_directory.finished
    steps = torch.load(run_directory.checkpoint)["global_step"]
    assert 4 <= steps < 12
    subprocess.run(command, env=environment, check=True, timeout=240)
    whole = finished
    if devices > 1:
        # Adam makes steps of rounding where a gradient is next to nothing: compare with
        # as many processes.
        (tmp_path / "whole").mkdir()
        command[-1] = str(tmp_path / "whole")
        subprocess.run(command, env=environment, check=True, timeout=240)
        whole = tmp_path / "whole" / "run"
    assert_same(run_directory.path, whole)
