"""Real training processes for the tests that kill them, starve them or run several of them together.

They are forked from a server that has imported everything once, so that each starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin

from dalm_utils import train, training
from dalm_utils.history import History
from tests.helpers import tiny_config, tiny_diffusion

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes"])


def train_tiny(folder: Path, changes: dict, environment: dict | None = None) -> None:
    """What a process does: the tiny run of the tests, with its messages in `<folder>/messages-<rank>`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    messages = (folder / f"messages-{os.environ.get('RANK', '0')}").open("a", buffering=1)
    sys.stdout = sys.stderr = messages
    if "ACCELERATE_USE_FSDP" in os.environ and os.environ["ACCELERATE_USE_CPU"] == "true":
        allow_fsdp_on_cpus()
    try:
        train(*tiny_diffusion(), tiny_config(folder, **changes))
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


def start(folder: Path, changes: dict, environment: dict | None = None):
    """A process that trains; `.kill()` sends SIGKILL, `.terminate()` SIGTERM. It does not outlive the tests."""
    process = CONTEXT.Process(target=train_tiny, args=(folder, changes, environment), daemon=True)
    process.start()
    return process


def last_step(folder: Path) -> int:
    """How far the history of a run's folder goes."""
    history = folder / "history.jsonl"
    return History.load(history).last("step") or 0 if history.exists() else 0


def wait_for_step(folder: Path, step: int, *processes, seconds: float = 60) -> None:
    """Until the history shows a step; an error if one of the processes ends before, or if it takes too long."""
    deadline = time.monotonic() + seconds
    while last_step(folder) < step:
        assert all(process.is_alive() for process in processes), f"a process ended before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached within {seconds:g} seconds"
        time.sleep(0.005)


def start_many(count: int, folder: Path, changes: dict, environment: dict | None = None) -> list:
    """`count` processes of one run, joined over the loopback as a launcher would, by gloo unless told otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    shared |= environment or {}
    return [
        start(folder, changes, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)})
        for rank in range(count)
    ]
