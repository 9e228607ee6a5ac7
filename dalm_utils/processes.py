"""Everything that is needed only for several processes: agreement, sharding, and shutdown."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from safetensors.torch import load_file, load_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from .config import RunConfig
from .machine import pick_device, pick_precision

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same file from one process and from many
KINDS = (  # of runs that are supported
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP,
)  # fmt: skip


def make_accelerator(config: RunConfig) -> Accelerator:
    """An accelerator for one run, configured by `config` alone.

    accelerate also reads settings from the environment (ACCELERATE_*, set by hand or by a launcher's defaults). Those
    that affect training are passed explicitly here, which overrides them.

    Raises:
        ValueError: an unsupported way to distribute, a tracker that is not installed, or a device that the
            environment chose instead of the config.
        RuntimeError: CUDA is asked for and missing.
    """
    device = pick_device(config.device)
    precision = {"fp32": "no"}.get(name := pick_precision(config.precision, device), name)
    if AcceleratorState._shared_state:  # an earlier call in this process may have used another device or precision
        state = AcceleratorState()
        if (state.mixed_precision, state.device.type) != (precision, device.type):
            AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
    trackers = [name.strip() for name in config.trackers.split(",") if name.strip()]
    available = [tracker.value for tracker in get_available_trackers()]
    for name in trackers:
        if name not in available:
            raise ValueError(f"the tracker {name!r} is not installed here (pip install {name}); available: {available}")
    accelerator = Accelerator(
        mixed_precision=precision, cpu=device.type == "cpu", log_with=trackers or None, project_dir=config.folder,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), dynamo_backend="no",
    )  # fmt: skip
    if accelerator.device.type != device.type:
        chosen = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
        raise ValueError(
            f"the config says device={device.type!r}, but accelerate chose {accelerator.device}; unset what says so in "
            f"the environment: {chosen}"
        )
    kind = accelerator.distributed_type
    if kind not in KINDS or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"training under {kind.value} is not supported; launch with --multi_gpu, or --use_fsdp --fsdp_version 2"
        )
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights are spread over the processes by FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def on_main(accelerator: Accelerator, do: Callable):
    """Do something on the main process alone; its result is returned, or its error raised, on every process."""
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            outcome[1] = _portable(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _portable(error: Exception) -> Exception:
    """The error, or its words in a RuntimeError where it cannot be sent: the others would wait for it forever."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever its class does when it is copied
        return RuntimeError(f"{type(error).__name__}: {error}")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process; must be called on all of them."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


# ------------------------------------------------------------------------------------------------ sharding
def prepare(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """The module and its optimizer, wrapped for several processes, each of which has loaded all weights."""
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # from empty weights, the head would lose its tie to the embeddings
        plugin.mixed_precision_policy = None  # autocast casts, as on one process; losses, times and sums stay in FP32
    return accelerator.prepare(module, optimizer)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Use the wrapped model outside of a training step: FSDP gathers the weights that lie in no block."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full_weights(module: nn.Module, tied: list[str], *, copy: bool = False) -> dict | None:
    """The state dict of the model inside `module`, gathered from all processes; None where it is whole everywhere.

    Args:
        tied: names of weights that are stored under another name, and left out.
        copy: return a copy in host memory, and never None, which a single process can write while it trains.
    """
    if isinstance(module, FSDPModule):
        weights = get_model_state_dict(module, options=FULL_STATE)
    elif copy:
        weights = module.state_dict()
    else:
        return None
    left_out = {f"model.{name}" for name in tied}
    weights = {name.removeprefix("model."): weights[name] for name in weights.keys() - left_out}
    return host_copy(weights) if copy else weights


def load_weights(module: nn.Module, model: nn.Module, file: Path) -> None:
    """Load a .safetensors file into the model inside `module`, in place."""
    if isinstance(module, FSDPModule):
        weights = {f"model.{name}": weight for name, weight in load_file(file).items()}
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        load_model(model, file)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> dict:
    """The optimizer's whole state in host memory; with `copy`, one that a single process can write while it trains."""
    if copy:
        return host_copy(get_optimizer_state_dict(module, optimizer))
    return get_optimizer_state_dict(module, optimizer, options=FULL_STATE)


def host_copy(state):
    """The same nested dictionaries and lists, with a copy of each tensor in host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    return [host_copy(value) for value in state] if isinstance(state, list) else state


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load what `optimizer_state` returned and torch.save wrote. Never executes what the file holds."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(module, optimizer, state, options=FULL_STATE)


# ------------------------------------------------------------------------------------------------- leaving
_ended_cleanly = True  # False while training, and after an error ended it


@contextlib.contextmanager
def leave_group_at_exit() -> Iterator[None]:
    """Destroy the process group that accelerate creates inside this block, when the interpreter exits.

    accelerate creates the group of a launched run (`torchrun`, `accelerate launch`) and destroys it nowhere. The
    threads of gloo then run on while the interpreter is torn down, and every so often one of them aborts the process
    of a finished run; NCCL prints a warning.

    It is not destroyed at the end of the block, because the script may train again or use the group itself, and a
    second group cannot be created with the launcher's store, which holds the addresses of the first. A group that
    existed before the block belongs to the script that created it.
    """
    global _ended_cleanly
    creates = not distributed.is_initialized()
    _ended_cleanly = False
    try:
        yield
        _ended_cleanly = True
    finally:
        if creates and distributed.is_initialized():
            atexit.register(_leave_group)


def _leave_group() -> None:
    """Destroy the group and join its threads.

    After an error the other processes may be in a collective that this one never enters. Destroying a gloo group
    waits for nobody: its connections close, and the collective fails. Destroying an NCCL group would wait for the
    others, so after an error it is left alone, and the end of the process aborts it.
    """
    if not distributed.is_initialized():
        return
    error = getattr(sys, "last_value", None)
    if (error is not None or not _ended_cleanly) and distributed.get_backend() != "gloo":
        return
    distributed.destroy_process_group()
    sys.last_traceback = None
    while error is not None:  # frames of a traceback hold the run
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()  # the threads end with the last reference to the group; the wrapped model has one, and is in a cycle
