"""Likelihoods, each with a definition and an error bar."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .annealing import annealed_mask
from .backbone import check_fits, eval_mode, hidden_states, predicting_states, require_mask_id
from .head import chunk_rows, logits_of, mask_id_of
from .machine import autocast
from .objective import default_maskable, diffusion_loss, seeded
from .pairs import Pairs
from .tokens import begin_id, encode


def standard_error(values: np.ndarray, documents: np.ndarray | None = None) -> float:
    """The standard error of the mean of `values` `[N]` over blocks of text.

    Blocks of one document resemble each other, so documents are counted, not blocks. With u_g the sum of
    (value - mean) over the blocks of document g, and G documents, it is the cluster-robust

        sqrt(G / (G - 1) * sum over g of u_g^2) / N,

    which is s / sqrt(N) if each block has a document of its own (Liang and Zeger, Biometrika 1986). NaN for G = 1.

    Args:
        documents: `[N]`, equal for blocks of the same document; None means that no two blocks share one.
    """
    labels = np.arange(len(values)) if documents is None else np.unique(documents, return_inverse=True)[1]
    sums = np.bincount(labels, values - values.mean())  # [G]
    count = len(sums)
    return math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values) if count > 1 else math.nan


def mean_and_error(values: np.ndarray, documents: np.ndarray | None = None) -> tuple[float, float]:
    """The mean of those `values` `[N]` that are not NaN, and its `standard_error`; NaN where there are too few."""
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, math.nan
    return float(values[known].mean()), standard_error(values[known], None if documents is None else documents[known])


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, in nats per token, with its standard error over documents (see `standard_error`)."""

    per_block: np.ndarray  # [N] nats per token of each block
    tokens: int  # predicted tokens in all
    bytes: int  # of the text they spell
    documents: np.ndarray | None = None  # [N] equal for blocks of the same document; None where it is not known
    sizes: np.ndarray | None = None  # [N] predicted tokens of each block; None where all have equally many

    @property
    def mean(self) -> float:
        return float(np.average(self.per_block, weights=self.sizes))

    @property
    def stderr(self) -> float:
        """Of the mean. Where blocks differ in their number of tokens, that is a ratio of two sums, linearized here."""
        if self.sizes is None:
            return standard_error(self.per_block, self.documents)
        return standard_error(self.sizes / self.sizes.mean() * (self.per_block - self.mean), self.documents)

    @property
    def bits_per_byte(self) -> float:
        """NaN for tokens that spell no text, such as special ones alone."""
        return self.mean * self.tokens / (self.bytes * math.log(2)) if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf  # beyond what a float holds

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.stderr:.3f} nats per token ({self.bits_per_byte:.3f} bits per byte)"


@torch.no_grad()
def nelbo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Tensor] | Tensor | Pairs,
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

    Of `Pairs` it is the conditional NELBO, of answers given their prompts, per answer token: only answers, and the end
    token after them, are ever masked. Their number of tokens is given, as the number of [MASK] tokens; an AR model has
    to predict it, by the end token.

    Args:
        blocks: `[N, L]` long, or a sequence of `[L]`; position 0 is the begin token. From `Blocks` the standard error
            knows which of them lie in the same document, from `Pairs` which have the same prompt.
        num_samples: masks drawn per block.
        batch_size: sequences in one forward pass.
        precision: of the trunk's matrix products (the head runs in its weights' dtype); see `RunConfig.precision`.
        progress: a bar on stderr, in batches.

    Raises:
        ValueError: a model without [MASK], blocks longer than the model can see, or no sample.
    """
    scored = _Scored.of(blocks)
    check_fits(model, tokenizer, scored.tokens.shape[1])
    sets = _random_sets(scored.maskable[:, 1:], num_samples, seeded(seed, 0, "nelbo"))
    masked = F.pad(sets, (1, 0))  # position 0 begins the block and never counts
    tokens = scored.tokens.repeat_interleave(num_samples, 0)
    real = None if scored.real is None else scored.real.repeat_interleave(num_samples, 0)
    noised = torch.where(masked, require_mask_id(model), tokens)
    means = _token_means(model, tokens, noised, masked, None, batch_size, precision, progress, real)
    return scored.estimate(means.view(-1, num_samples).mean(1), tokenizer)


def _random_sets(maskable: Tensor, num_samples: int, draws: torch.Generator) -> Tensor:
    """Sets of maskable positions, `[N * S, L]` bool: for each row `[L]` S sizes, one from each stratum of 1..n."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    rows, counts = len(maskable), maskable.sum(1, keepdim=True)  # [N, 1]
    strata = (torch.arange(num_samples) + torch.rand(rows, num_samples, generator=draws)) / num_samples
    sizes = (1 + (strata * counts).long()).minimum(counts).view(-1, 1)  # [N * S, 1], each in 1..n
    order = torch.rand(rows * num_samples, maskable.shape[1], generator=draws)
    order = order.masked_fill(~maskable.repeat_interleave(num_samples, 0), 2.0)  # the others come last
    return order.argsort(-1).argsort(-1) < sizes


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
    one token, so none scores zero, which would favor short choices. Continuations of one length get the same masks,
    whatever comes before them.

    Args:
        prompt, continuation: texts, each tokenized by itself, or token ids.

    Raises:
        ValueError: an empty continuation, or more tokens than the model can see.
    """
    before = encode(tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt
    after = encode(tokenizer, [continuation], inside=bool(before))[0] if isinstance(continuation, str) else continuation
    if not after:
        raise ValueError(f"the continuation {continuation!r} has no token to score")
    check_fits(model, tokenizer, 1 + len(before) + len(after))
    every = torch.ones(1, len(after), dtype=torch.bool)
    sets = _random_sets(every, num_samples, seeded(seed, len(after), "continuation"))
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
    blocks: Sequence[Tensor] | Tensor | Pairs,
    *,
    batch_size: int = 32,
    precision: str = "auto",
    progress: bool = False,
) -> Estimate:
    """The negative log-likelihood per token of an autoregressive model, on the same tokens as `nelbo`."""
    scored = _Scored.of(blocks)
    tokens = scored.tokens
    check_fits(model, tokenizer, tokens.shape[1])
    causal = annealed_mask(tokens.shape[1], 0.0, dtype=model.dtype, device=model.device)
    options = (causal, batch_size, precision, progress, scored.real)
    return scored.estimate(_token_means(model, tokens, tokens, scored.maskable, *options), tokenizer)


class _Scored(NamedTuple):
    """The sequences of blocks or pairs, `[N, L]`, and which of their tokens are scored."""

    tokens: Tensor
    maskable: Tensor  # bool
    real: Tensor | None  # bool: not padding; None: there is no padding
    documents: np.ndarray | None  # [N] equal for blocks of the same document, and pairs with the same prompt

    @classmethod
    def of(cls, blocks: Sequence[Tensor] | Tensor | Pairs) -> _Scored:
        if isinstance(blocks, Pairs):
            return cls(*blocks[:].trimmed(), blocks.documents)
        tokens = stack(blocks)
        return cls(tokens, default_maskable(tokens), None, documents_of(blocks))

    def estimate(self, means: Tensor, tokenizer: PreTrainedTokenizerBase) -> Estimate:
        """From the mean -log p over the scored tokens of each sequence, `[N]`."""
        scored = [row[kept] for row, kept in zip(self.tokens, self.maskable, strict=True)]
        text = tokenizer.batch_decode(scored, skip_special_tokens=True)
        num_bytes = sum(len(piece.encode("utf-8", "replace")) for piece in text)
        sizes = None if self.real is None else self.maskable.sum(1).numpy()
        return Estimate(means.numpy(), int(self.maskable.sum()), num_bytes, self.documents, sizes)


def _token_means(
    model, tokens, noised, masked, attention_mask, batch_size, precision, progress=False, real=None
) -> Tensor:
    """The mean -log p over each sequence's masked tokens: `[N]` float64 on the CPU."""
    means = []
    columns = [x.split(batch_size) for x in (tokens, noised, masked, *([] if real is None else [real]))]
    for piece in tqdm(list(zip(*columns, strict=True)), "scoring", leave=False, disable=not progress):
        x0, xt, hidden, *rest = (part.to(model.device) for part in piece)
        with eval_mode(model), autocast(model.device, precision):
            ones = torch.ones(len(x0), device=model.device)
            how = dict(attention_mask=attention_mask, real=rest[0] if rest else None)
            loss = diffusion_loss(model, x0, xt, hidden, ones, **how)
        rows = hidden.nonzero()[:, 0]
        sums = torch.zeros(len(x0), dtype=torch.float64, device=model.device).index_add_(
            0, rows, loss.token_nll.double()
        )
        means.append((sums / hidden.sum(1)).cpu())
    return torch.cat(means)


def stack(blocks: Sequence[Tensor] | Tensor) -> Tensor:
    """`[N, L]` on the CPU, of a sequence of `[L]`."""
    if not isinstance(blocks, Tensor):
        rows = [blocks[i] for i in range(len(blocks))]
        if not all(isinstance(row, Tensor) for row in rows):
            raise ValueError(f"this takes blocks of a text, [N, L] token ids, not {type(blocks).__name__}")
        blocks = torch.stack(rows)
    return blocks.cpu()


def documents_of(blocks: Sequence[Tensor] | Tensor) -> np.ndarray | None:
    """`[N]` the document that each of `Blocks` lies in; None for a tensor, which does not know."""
    return getattr(blocks, "documents", None)


def paired_difference(first: Estimate, second: Estimate) -> tuple[float, float]:
    """first - second on the same blocks, in nats per token, and its standard error (see `standard_error`).

    Raises:
        ValueError: the two were not measured on the same blocks.
    """
    known = [x.documents for x in (first, second) if x.documents is not None]
    if len(first.per_block) != len(second.per_block) or not all(np.array_equal(known[0], x) for x in known):
        raise ValueError(
            f"a paired difference needs two estimates on the same blocks, got {len(first.per_block)} and "
            f"{len(second.per_block)} blocks" + " of other documents" * (len(first.per_block) == len(second.per_block))
        )
    difference = dataclasses.replace(
        first, per_block=first.per_block - second.per_block, documents=known[0] if known else None
    )
    return difference.mean, difference.stderr


# ------------------------------------------------------------------------------------- by the fraction hidden
@dataclass(frozen=True)
class Restored:
    """How well hidden tokens were predicted when a fraction t of the text was hidden, for several t.

    Rows are times, columns blocks; NaN where no token of a block was hidden.
    """

    times: tuple[float, ...]
    nll: np.ndarray  # [T, N] nats per hidden token
    accuracy: np.ndarray  # [T, N] fraction of the hidden tokens that were the most probable ones
    documents: np.ndarray | None = None  # [N] equal for blocks of the same document; None where it is not known

    def mean(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean over blocks of "nll" or "accuracy" at each time, and its standard error: `[T]` each."""
        return _means_and_errors(getattr(self, what), self.documents)

    def difference(self, other: Restored, what: str) -> tuple[np.ndarray, np.ndarray]:
        """self - other on the same blocks: the mean at each time, and the standard error of the paired difference."""
        return _means_and_errors(getattr(self, what) - getattr(other, what), self.documents)


def _means_and_errors(values: np.ndarray, documents: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    means, errors = zip(*(mean_and_error(row, documents) for row in values), strict=True)
    return np.array(means), np.array(errors)


TIMES = (0.05, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def by_time(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Tensor] | Tensor,
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "auto",
) -> Restored:
    """How well a model restores the tokens of held-out text when each is hidden with probability t, for several t.

    A diffusion model reads what is not hidden, on both sides. An AR model reads the clean text to the left of each
    hidden token, as if nothing else had been hidden there: the best it could do. The same seed hides the same tokens
    from every model, so differences are paired.

    Args:
        blocks: `[N, L]` long, or a sequence of `[L]`; position 0 is the begin token, which is never hidden.
        times: probabilities in (0, 1].

    Raises:
        ValueError: a time outside (0, 1].
    """
    if not times or not all(0 < t <= 1 for t in times):
        raise ValueError(f"times are probabilities above 0 and at most 1, got {list(times)}")
    documents, blocks, mask_id = documents_of(blocks), stack(blocks), mask_id_of(model)
    check_fits(model, tokenizer, blocks.shape[1])
    coins = torch.rand(blocks.shape, generator=seeded(seed, 0, "by time"))
    maskable = default_maskable(blocks)
    if mask_id is None:  # what an AR model reads does not depend on what is hidden
        scores = _restored(model, blocks, blocks, maskable, batch_size, precision)
    means = []
    for t in times:
        hidden = (coins < t) & maskable
        if mask_id is not None:
            scores = _restored(model, blocks, torch.where(hidden, mask_id, blocks), hidden, batch_size, precision)
        means.append(scores.masked_fill(~hidden, 0.0).sum(-1) / hidden.sum(-1))  # 0 / 0 is NaN
    nll, accuracy = torch.stack(means, 1).numpy()
    return Restored(tuple(times), nll, accuracy, documents)


def _restored(model, tokens: Tensor, read: Tensor, hidden: Tensor, batch_size: int, precision: str) -> Tensor:
    """-log p of each hidden token, and whether it is the model's first choice: `[2, N, L]` float64 on the CPU.

    Zero where nothing is hidden.
    """
    pieces = zip(tokens.split(batch_size), read.split(batch_size), hidden.split(batch_size), strict=True)
    with eval_mode(model), autocast(model.device, precision):
        return torch.cat([_restored_in_one_pass(model, *piece) for piece in pieces], 1)


def _restored_in_one_pass(model, tokens: Tensor, read: Tensor, hidden: Tensor) -> Tensor:
    causal = None
    if mask_id_of(model) is None:
        causal = annealed_mask(tokens.shape[1], 0.0, dtype=model.dtype, device=model.device)
    places = hidden.flatten().nonzero()[:, 0].to(model.device)
    targets = tokens.flatten().to(model.device)[places]
    states = predicting_states(model, hidden_states(model, read.to(model.device), causal), places)
    chunk = chunk_rows(model.get_output_embeddings().weight)
    scores = []
    for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
        logits = logits_of(model, part)
        nll = F.cross_entropy(logits, target, reduction="none")
        scores.append(torch.stack([nll.double(), (logits.argmax(-1) == target).double()]))
    return torch.zeros(2, *hidden.shape, dtype=torch.float64).masked_scatter(hidden, torch.cat(scores, 1).cpu())
