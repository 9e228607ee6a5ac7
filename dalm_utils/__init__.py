"""DALM, diffusion from autoregressive language models: adapt one into a masked-diffusion model (arXiv 2410.17891).

Importing the package costs nothing; the first use of a public name imports the modules behind all of them, and torch.
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
    from .evaluation import Estimate, Restored, ar_nll, by_time, continuation_nelbo, nelbo, paired_difference
    from .history import History
    from .hubs import BASES
    from .objective import DiffusionLoss, corrupt, diffusion_loss, sample_times
    from .pairs import chat_prompt, load_pairs
    from .quality import answer_quality, infilling, text_quality
    from .run import build
    from .sampling import Samples, generate
    from .training import train, train_arms

__all__ = [
    "BASES",
    "DiffusionLoss",
    "Estimate",
    "History",
    "Restored",
    "RunConfig",
    "Samples",
    "anneal_ratio",
    "annealed_mask",
    "answer_quality",
    "ar_nll",
    "as_diffusion",
    "build",
    "by_time",
    "chat_prompt",
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
    "load_pairs",
    "nelbo",
    "paired_difference",
    "sample_times",
    "save_diffusion",
    "text_quality",
    "train",
    "train_arms",
]


_MODULES = (
    "annealing", "backbone", "config", "corpus", "evaluation", "history", "hubs", "objective", "pairs", "quality",
    "run", "sampling", "training",
)  # fmt: skip


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:  # all at once: a session never mixes modules from before and after an edit of the code
        found = vars(importlib.import_module(f".{module}", __name__))
        globals().update({public: found[public] for public in __all__ if public in found})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
