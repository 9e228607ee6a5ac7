"""Adapt autoregressive language models into masked-diffusion language models (after arXiv 2410.17891).

Importing the package costs nothing: each public name imports its module, and with it torch, when it is first used.
"""

import importlib
import os
from typing import TYPE_CHECKING

# OpenMP threads spin while they wait for each other, which costs most of a step when other processes want the same
# cores. On two cores, training runs at 7,600 tokens/s alone and at 298 beside two busy processes; with a short spin at
# 7,370 and 3,815. libgomp reads the variable when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from .annealing import anneal_ratio, annealed_mask
    from .backbone import as_diffusion, check_attention, load_base, load_diffusion, save_diffusion
    from .config import RunConfig, load_config
    from .corpus import load_corpus
    from .evaluation import Estimate, ar_nll, continuation_nelbo, nelbo, paired_difference
    from .history import History
    from .hubs import BASES
    from .objective import DiffusionLoss, corrupt, diffusion_loss, sample_times
    from .quality import infilling, text_quality
    from .run import build
    from .sampling import Samples, generate
    from .training import train, train_arms

_MODULES = {  # the same again, for __getattr__
    "annealing": ("anneal_ratio", "annealed_mask"),
    "backbone": ("as_diffusion", "check_attention", "load_base", "load_diffusion", "save_diffusion"),
    "config": ("RunConfig", "load_config"),
    "corpus": ("load_corpus",),
    "evaluation": ("Estimate", "ar_nll", "continuation_nelbo", "nelbo", "paired_difference"),
    "history": ("History",),
    "hubs": ("BASES",),
    "objective": ("DiffusionLoss", "corrupt", "diffusion_loss", "sample_times"),
    "quality": ("infilling", "text_quality"),
    "run": ("build",),
    "sampling": ("Samples", "generate"),
    "training": ("train", "train_arms"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BASES",
    "DiffusionLoss",
    "Estimate",
    "History",
    "RunConfig",
    "Samples",
    "anneal_ratio",
    "annealed_mask",
    "ar_nll",
    "as_diffusion",
    "build",
    "check_attention",
    "continuation_nelbo",
    "corrupt",
    "diffusion_loss",
    "generate",
    "infilling",
    "load_base",
    "load_config",
    "load_corpus",
    "load_diffusion",
    "nelbo",
    "paired_difference",
    "sample_times",
    "save_diffusion",
    "text_quality",
    "train",
    "train_arms",
]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value  # found without this function from now on
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
