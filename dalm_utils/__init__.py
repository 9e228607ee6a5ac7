"""Adapt autoregressive language models into masked-diffusion language models (after arXiv 2410.17891)."""

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
