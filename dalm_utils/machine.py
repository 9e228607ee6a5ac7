"""The machine: which device, which precision, and how memory and tensors are handled there."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the matrix products


def pick_device(device: str | torch.device | None = "auto") -> torch.device:
    """`auto` takes CUDA where there is one. Raises RuntimeError if CUDA is asked for and missing."""
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "this run wants CUDA (device='cuda'), but torch sees no CUDA device here. "
            "Use the laptop profile (DALM_PROFILE=laptop), or device='cpu' with precision='auto'."
        )
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 where it is fast in hardware, else fp16 on CUDA, else fp32."""
    if precision == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if precision == "auto":
        return "bf16" if _cpu_is_faster_in_bf16() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "precision fp16 needs CUDA: a CPU computes in it hundreds of times slower; use auto, bf16 or fp32"
        )
    return precision


def _cpu_is_faster_in_bf16() -> bool:
    """AMX multiplies in it many times faster, AMD's AVX-512 twice; Intel's AVX-512 half as fast as in fp32."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in features["cpu_name"]))


def keep_memory() -> None:
    """Tell glibc, for the whole process, to keep what is freed, so that the next large tensor finds memory in place.

    Otherwise it goes back to the kernel and comes again page by page, zeroed, at every step of a large model on a CPU.
    Where there is no glibc nothing happens.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # their numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 2**26)


def describe() -> str:
    """What a figure was measured on."""
    features = torch.cpu.get_capabilities()
    bf16 = ", ".join(name for name in ("avx512_bf16", "amx_bf16") if features.get(name)) or "no bf16 instructions"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"
    return f"{cores}, {features['cpu_name']} ({bf16}){gpu}, torch {torch.__version__}"


def autocast(device: torch.device, precision: str = "auto"):
    """A context in which matrix products run in `precision`; nothing for fp32."""
    precision = pick_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, without waiting for it: a GPU copies from pinned memory while it computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
