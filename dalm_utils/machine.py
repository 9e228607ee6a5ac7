"""The machine: device, precision, and how memory and tensors are handled there."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the matrix products


def pick_device(device: str | torch.device | None = "auto") -> torch.device:
    """A device that works here; `auto` and None take CUDA where there is one.

    Raises:
        ValueError: neither a CPU nor a CUDA device: sampling draws in float64, and no other kind has been tested.
        RuntimeError: a CUDA device that is not there.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = str(device).partition(":")
    if kind not in DEVICES or (number and not number.isdecimal()):
        raise ValueError(f"no support for the device {str(device)!r}; choose one of auto, {', '.join(DEVICES)}")
    seen = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= seen:
        raise RuntimeError(
            f"device={str(device)!r}, but torch sees {seen or 'no'} CUDA device{'s' * (seen != 1)} here. Use the "
            "laptop profile (--profile laptop, or DALM_PROFILE=laptop), or a CPU: device=cpu precision=auto in a "
            "terminal, device='cpu', precision='auto' in Python"
        )
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where it is fast in hardware, else fp16 on CUDA, else fp32.

    Raises:
        ValueError: an unknown precision, or fp16 on a CPU.
    """
    if precision != "auto" and precision not in DTYPES:
        raise ValueError(f"no precision {precision!r}; choose one of auto, {', '.join(DTYPES)}")
    if precision == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if precision == "auto":
        return "bf16" if _cpu_is_faster_in_bf16() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision fp16 needs CUDA: a CPU computes in it hundreds of times slower; choose auto, bf16 or fp32"
        )
    return precision


def _cpu_is_faster_in_bf16() -> bool:
    """Many times with AMX, twice with AMD's AVX-512; with Intel's AVX-512 bf16 takes twice as long as fp32."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in features["cpu_name"]))


def keep_memory() -> None:
    """Have glibc, for the whole process, keep freed memory for the next large tensor.

    Otherwise it is returned to the kernel, which hands it out again page by page, zeroed, at every step of a large
    model on a CPU. Does nothing without glibc.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # as in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 2**26)


def describe() -> str:
    """The processor, its threads and bf16 instructions, the GPU and the version of torch: goes with a measurement."""
    features = torch.cpu.get_capabilities()
    bf16 = ", ".join(name for name in ("avx512_bf16", "amx_bf16") if features.get(name)) or "no bf16 instructions"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"
    return f"{cores}, {features['cpu_name']} ({bf16}){gpu}, torch {torch.__version__}"


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """A context in which matrix products run in `precision`; for fp32 it changes nothing."""
    precision = pick_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def seed_dropout(generator: torch.Generator, device: torch.device) -> None:
    """Seed the random numbers of a device as `generator` was.

    `torch.manual_seed` seeds the other kinds of devices, too, and for each that is not there formats a stack trace.
    """
    torch.default_generator.manual_seed(generator.initial_seed())
    if device.type == "cuda":
        torch.cuda.manual_seed(generator.initial_seed())


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor where the device can read it by itself: a GPU copies from pinned memory while it computes."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to a device without waiting."""
    return pinned(tensor, device).to(device, non_blocking=True)
