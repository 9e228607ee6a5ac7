"""Real training processes for the tests that kill them, starve them or run several of them together.

They are forked from a server that has imported everything once, so that each starts in a moment. No verdict depends on
how fast they are: a test holds a run at a step with a `Gate`, or gives it a `Strike` that hits after a number of calls.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed import TCPStore

from dalm_utils import run, save_diffusion, train, training
from dalm_utils.history import History
from tests.helpers import PATIENCE, tiny_config, tiny_diffusion

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes"])
LOOPBACK = "127.0.0.1"


class Gate:
    """Holds a run at a step: `start(..., on_log=gate.hold)`, then `gate.wait(...)`, and `gate.open()`.

    Between the two the run has logged the step and neither stopped nor saved; its peers wait for it in a collective.
    """

    def __init__(self, step: int):
        self._pipe, theirs = CONTEXT.Pipe()
        self.hold = _Hold(step, theirs)

    def wait(self, *processes) -> None:
        """Until the run has arrived; an error if one of its processes ends before."""
        ready = connection.wait([self._pipe, *(process.sentinel for process in processes)], PATIENCE)
        assert ready == [self._pipe], f"step {self.hold.step} was not reached"
        self._pipe.recv()

    def open(self) -> None:
        """Let it continue."""
        self._pipe.send("open")


class _Hold:
    """The gate's side in the process that trains."""

    def __init__(self, step: int, pipe: connection.Connection):
        self.step, self.pipe = step, pipe

    def __call__(self, history: History, config) -> None:
        if history.records[-1]["step"] == self.step:
            self.pipe.send("here")
            self.pipe.recv()


class Strike:
    """An `on_log` that sends its own process a signal, `calls` calls and returns after the first record of `step` or
    later; with step 0, after training was called. So it hits between any two calls of the program, those of
    libraries and of C functions included, on a fast machine as on a slow one; at the latest where the run would end.
    """

    def __init__(self, step: int, calls: int, kind: signal.Signals = signal.SIGKILL):
        self.step, self.left, self.kind, self.armed = step, calls, kind, False

    def prepare(self) -> None:
        """Before training is called. What the first checkpoint of a process prepares would outweigh all else."""
        with tempfile.TemporaryDirectory() as folder:
            save_diffusion(*tiny_diffusion(), Path(folder) / "model")
        if self.step == 0:
            self._arm()

    def __call__(self, history: History, config) -> None:
        step = history.records[-1]["step"]
        if step == config.steps:
            self._hit()
        if step >= self.step and not self.armed:
            self._arm()

    def _arm(self) -> None:
        self.armed = True
        sys.setprofile(self._count)

    def _count(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            self._hit()

    def _hit(self) -> None:
        sys.setprofile(None)
        os.kill(os.getpid(), self.kind)


def train_tiny(folder: Path, changes: dict, environment: dict | None, on_log: Callable | None) -> None:
    """What a process does: the tiny run of the tests, with its messages in `<folder>/messages-<rank>`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    messages = (folder / f"messages-{os.environ.get('RANK', '0')}").open("a", buffering=1)
    sys.stdout = sys.stderr = messages
    faulthandler.enable(messages)  # where it hangs, if it is aborted for that
    if "WRITE_IN_BACKGROUND" in os.environ:  # as on a GPU
        run.saves_in_background = lambda accelerator: True
    if "ACCELERATE_USE_FSDP" in os.environ and os.environ["ACCELERATE_USE_CPU"] == "true":
        allow_fsdp_on_cpus()
    model, tokenizer = tiny_diffusion()
    config = tiny_config(folder, **changes)
    if isinstance(on_log, Strike):
        on_log.prepare()
    try:
        train(model, tokenizer, config, on_log=on_log)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def allow_fsdp_on_cpus() -> None:
    """accelerate keeps FSDP for GPUs; here its own FSDP code is made to run on gloo."""
    made = training.make_accelerator

    def accelerator(config):
        one = made(config)
        one.state.distributed_type = DistributedType.FSDP
        one.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if one.mixed_precision != "no":
            one.state.fsdp_plugin.set_mixed_precision(one.mixed_precision)
        return one

    training.make_accelerator = accelerator


def kill_at(step: int, folder: Path, changes: dict) -> None:
    """Train in a process that is killed at a step."""
    gate = Gate(step)
    process = start(folder, changes, on_log=gate.hold)
    gate.wait(process)
    process.kill()
    assert exit_codes(process) == [-9]


def start(folder: Path, changes: dict, environment: dict | None = None, on_log: Callable | None = None):
    """A process that trains; `.kill()` sends SIGKILL, `.terminate()` SIGTERM. It does not outlive the tests."""
    process = CONTEXT.Process(target=train_tiny, args=(folder, changes, environment, on_log), daemon=True)
    process.start()
    return process


def exit_codes(*processes) -> list[int | None]:
    """How processes end. One that hangs is aborted, and its messages say where it was."""
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join()
    return [process.exitcode for process in processes]


def last_step(folder: Path) -> int:
    """How far the history of a run's folder goes."""
    history = folder / "history.jsonl"
    return History.load(history).last("step") or 0 if history.exists() else 0


class Meeting:
    """A store on a port of its own, through which the processes of one run meet, as under torchrun's agent."""

    def __init__(self, count: int):
        self.count = count
        self.store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)  # any free port, kept open

    def environment(self, rank: int) -> dict[str, str]:
        """What a launcher would tell this process, by gloo unless it is told otherwise."""
        return {
            "WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip


def start_many(
    count: int, folder: Path, changes: dict, environment: dict | None = None, on_log: Callable | None = None
) -> list:
    """`count` processes of one run; `on_log` is the main one's, as always."""
    meeting, processes = Meeting(count), []
    for rank in range(count):
        told = meeting.environment(rank) | (environment or {})
        processes.append(start(folder, changes, told, on_log if rank == 0 else None))
        processes[-1].meeting = meeting  # open as long as one of them is known
    return processes
