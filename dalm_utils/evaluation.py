"""Likelihoods, each with a definition and an error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import annealed_mask
from .backbone import check_fits, eval_mode, require_mask_id
from .machine import autocast
from .objective import default_maskable, diffusion_loss, seeded
from .tokens import begin_id, encode


@dataclass(frozen=True)
class Estimate:
    """A mean over blocks, in nats per token, with its standard error."""

    per_block: np.ndarray  # [N] nats per token of each block: subtract two of these for a paired difference
    tokens: int  # predicted tokens in all
    bytes: int  # of the text they spell

    @property
    def mean(self) -> float:
        return float(self.per_block.mean())

    @property
    def stderr(self) -> float:
        return (
            float(self.per_block.std(ddof=1) / math.sqrt(len(self.per_block))) if len(self.per_block) > 1 else math.nan
        )

    @property
    def bits_per_byte(self) -> float:
        return self.mean * self.tokens / (self.bytes * math.log(2)) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.stderr:.3f} nats per token ({self.bits_per_byte:.3f} bits per byte)"


@torch.no_grad()
def nelbo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Tensor] | Tensor,
    *,
    num_samples: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
    progress: bool = False,
) -> Estimate:
    """The negative evidence lower bound per token of a masked-diffusion model: lower is better.

    The integral over t of the training loss equals the mean, over a uniform number k in 1..n of masked
    tokens and a uniform set of that size, of the mean -log p over the set (arXiv 2406.03736, theorem 2).
    Each block draws `num_samples` values of k, one from each stratum of 1..n, and one set for each:
    unbiased, with much less variance than drawing times and coins.  The same seed gives every model the same masks.

    Args:
        blocks: `[N, L]` long, or a sequence of `[L]` such as `Blocks`; position 0 is the begin token.
        num_samples: masks drawn per block.
        batch_size: sequences in one forward pass.
        precision: of the trunk's matrix products (the head runs in its weights' dtype); see `RunConfig.precision`.
        progress: a bar on stderr, in batches.

    Raises:
        ValueError: a model without [MASK], blocks longer than the model can see, or no sample.
    """
    blocks = stack(blocks)
    check_fits(model, tokenizer, blocks.shape[1])
    sets = _random_sets(len(blocks), blocks.shape[1] - 1, num_samples, seeded(seed, 0, "nelbo"))
    masked = F.pad(sets, (1, 0))  # position 0 begins the block and never counts
    tokens = blocks.repeat_interleave(num_samples, 0)
    noised = torch.where(masked, require_mask_id(model), tokens)
    means = _token_means(model, tokens, noised, masked, None, batch_size, precision, progress)
    return _estimate(means.view(-1, num_samples).mean(1), tokenizer, blocks)


def _random_sets(rows: int, n: int, num_samples: int, draws: torch.Generator) -> Tensor:
    """Sets of n positions, `[rows * S, n]` bool: for each row S sizes, one from each stratum of 1..n."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    strata = (torch.arange(num_samples) + torch.rand(rows, num_samples, generator=draws)) / num_samples
    sizes = (1 + (strata * n).long()).clamp(max=n).view(-1, 1)  # [rows * S, 1], each in 1..n
    order = torch.rand(rows * num_samples, n, generator=draws).argsort(-1).argsort(-1)
    return order < sizes


@torch.no_grad()
def continuation_nelbo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int],
    continuation: str | list[int],
    *,
    num_samples: int = 32,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
) -> tuple[float, float]:
    """A bound on -log p(continuation | prompt), in nats for the whole continuation, and its standard error.

    As `nelbo`, with only the continuation ever masked: what multiple choice compares. Every draw masks at least
    one token, so none scores zero, which would favour short choices. Continuations of one length get the same masks,
    whatever comes before them.

    Args:
        prompt, continuation: texts, each tokenised by itself, or token ids.

    Raises:
        ValueError: an empty continuation, or more tokens than the model can see.
    """
    before = encode(tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt
    after = encode(tokenizer, [continuation], inside=bool(before))[0] if isinstance(continuation, str) else continuation
    if not after:
        raise ValueError(f"the continuation {continuation!r} has no token to score")
    check_fits(model, tokenizer, 1 + len(before) + len(after))
    sets = _random_sets(1, len(after), num_samples, seeded(seed, len(after), "continuation"))
    sets, which = sets.unique(dim=0, return_inverse=True)  # a short continuation has few sets: score each once
    masked = F.pad(sets, (1 + len(before), 0))
    tokens = torch.tensor([[begin_id(tokenizer), *before, *after]]).repeat(len(masked), 1)
    noised = torch.where(masked, require_mask_id(model), tokens)
    means = _token_means(model, tokens, noised, masked, None, batch_size, precision)[which]
    totals = means * len(after)
    error = float(totals.std()) / math.sqrt(num_samples) if num_samples > 1 else math.nan
    return float(totals.mean()), error


@torch.no_grad()
def ar_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Tensor] | Tensor,
    *,
    batch_size: int = 32,
    precision: str = "auto",
    progress: bool = False,
) -> Estimate:
    """The negative log-likelihood per token of an autoregressive model, on the same tokens as `nelbo`."""
    blocks = stack(blocks)
    check_fits(model, tokenizer, blocks.shape[1])
    causal = annealed_mask(blocks.shape[1], 0.0, dtype=model.dtype, device=model.device)
    means = _token_means(model, blocks, blocks, default_maskable(blocks), causal, batch_size, precision, progress)
    return _estimate(means, tokenizer, blocks)


def _token_means(model, tokens, noised, masked, attention_mask, batch_size, precision, progress=False) -> Tensor:
    """The mean -log p over each sequence's masked tokens: `[N]` float64 on the CPU."""
    means = []
    pieces = list(zip(tokens.split(batch_size), noised.split(batch_size), masked.split(batch_size), strict=True))
    for piece in tqdm(pieces, "scoring", leave=False, disable=not progress):
        x0, xt, hidden = (part.to(model.device) for part in piece)
        with eval_mode(model), autocast(model.device, precision):
            ones = torch.ones(len(x0), device=model.device)
            loss = diffusion_loss(model, x0, xt, hidden, ones, attention_mask=attention_mask)
        rows = hidden.nonzero()[:, 0]
        sums = torch.zeros(len(x0), dtype=torch.float64, device=model.device).index_add_(
            0, rows, loss.token_nll.double()
        )
        means.append((sums / hidden.sum(1)).cpu())
    return torch.cat(means)


def _estimate(means: Tensor, tokenizer: PreTrainedTokenizerBase, blocks: Tensor) -> Estimate:
    text = tokenizer.batch_decode(blocks[:, 1:], skip_special_tokens=True)
    num_bytes = sum(len(piece.encode("utf-8", "replace")) for piece in text)
    return Estimate(means.numpy(), blocks[:, 1:].numel(), num_bytes)


def stack(blocks: Sequence[Tensor] | Tensor) -> Tensor:
    blocks = blocks if isinstance(blocks, Tensor) else torch.stack([blocks[i] for i in range(len(blocks))])
    return blocks.cpu()


def paired_difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """first - second on the same blocks, in nats per token, and its standard error."""
    difference = first.per_block - second.per_block
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))
