"""Writing text: start from [MASK] in the gaps and reveal tokens, a few at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import check_fits, eval_mode, hidden_states, predicting_states, require_mask_id
from .head import chunk_rows, logits_of
from .machine import DTYPES, autocast, pick_precision
from .objective import seeded
from .tokens import begin_id, decode, encode, unused_ids

Parts = list[str | Tensor | int]  # given texts, given token ids `[n]`, and gaps of so many tokens


@dataclass(frozen=True)
class Reveal:
    """One forward pass of denoising: which tokens appeared where. Three lists of equal length."""

    step: int
    rows: list[int]
    positions: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Samples:
    """Generated text; `tokens` is `[N, L]`: the begin token, what was given, what was written, and padding."""

    text: list[str]
    tokens: Tensor
    shown: Tensor  # [N, L] bool: what stands in `text`, and the begin token; not padding, nor what follows the end
    history: list[Reveal]  # empty unless return_history
    forward_passes: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | list[str] | None = None,
    suffix: str | None = None,
    length: int | None = None,
    parts: Parts | list[Parts] | None = None,
    steps: int | None = None,
    order: str = "random",
    threshold: float = 0.9,
    block_length: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    stop_at_end: bool = False,
    num_samples: int = 1,
    seed: int = 0,
    return_history: bool = False,
    precision: str = "auto",
    progress: bool = False,
    expected: list[list[int]] | None = None,
) -> Samples:
    """Fill `length` masked positions after `prompt` and before `suffix`, or the gaps of `parts`.

    Two orders are planned before anything is seen, and sample the model's any-order distribution:
        random: each position is revealed at a step drawn uniformly from `steps`: ancestral sampling of the
            linear schedule (arXiv 2410.17891, algorithm 2).  Positions that share a step are drawn independently of
            each other; the more steps, the fewer do.
        first_hitting: one position at a time, in random order (arXiv 2409.02908): exact, with one forward pass
            per token, however many `steps` are asked for.

    Four are greedy: each token is a draw from the model, but which comes next depends on what it is sure of.  Often
    better text, but biased: not the any-order distribution.
        confidence, entropy, margin: first where the best token has the highest probability, the entropy is
            lowest, or the two best are farthest apart; the same number of positions each step (arXiv 2202.04200).
        threshold: every position whose best token has at least probability `threshold`, and one at least;
            `steps` plays no part.

    Only positions about to be revealed meet the vocabulary filters, and in planned orders the head too; a step that
    reveals nothing costs nothing.  Tokens are drawn in float64: Gumbel noise in fewer bits lowers the temperature
    (2409.02908).

    Args:
        prompt: text before the gap; a list is a batch, whose shorter sequences are padded, unseen by anyone.
        length: tokens to write.
        parts: in place of prompt, length and suffix, texts and gaps: ["x : ", 8, "Returns", 5]; or a list of such.
            A tensor `[n]` of token ids stands for a text that is tokenised already.
        steps: denoising steps for all blocks together; by default as many as the longest sequence has gaps to fill.
        block_length: fill so many positions before any further to the right (semi-autoregressive); None: no blocks.
        temperature: divides the logits; 0 takes the most probable token.
        top_p, top_k: keep the smallest set of tokens with this probability; this many tokens.
        repetition_penalty: above 1 makes tokens less likely that the sequence shows already (arXiv 1909.05858).
        stop_at_end: what lies right of a block in which the document ends is not computed, and the text ends there.
            As in a `Corpus`, documents end with the begin token. Not with text given after a gap.
        num_samples: texts for each prompt; they stand together in the result.
        progress: a bar on stderr, in tokens.
        expected: token ids of each whole sequence, the begin token included; one that is filled with another token is
            left as it is then, with [MASK] in its other gaps.

    Raises:
        ValueError: a value out of range, a model without [MASK], or more positions than the model can see.
    """
    rows = [_encoded(tokenizer, row) for row in _rows(prompt, suffix, length, parts)]
    _check(order, steps, threshold, block_length, temperature, top_p, top_k, repetition_penalty, num_samples)
    end = begin_id(tokenizer) if stop_at_end else None  # what follows each document in a text
    canvas, blocks, real = _canvas(model, tokenizer, [row for row in rows for _ in range(num_samples)], block_length)
    written = blocks >= 0  # [N, L]: what is ours to fill
    if stop_at_end and (written.cumsum(1).bool() & real & ~written).any():
        raise ValueError("stop_at_end ends a text in its gap, but here given text follows one; leave one of them out")
    holes = written.clone()
    most_holes, most_blocks = int(holes.sum(1).max()), int(blocks.max()) + 1
    per_block = steps // most_blocks if steps else min(most_holes, block_length or most_holes)
    if per_block == 0 and order not in UNHURRIED:
        raise ValueError(f"{steps} steps are too few for {most_blocks} blocks; raise steps or block_length")
    draws = seeded(seed, 0, "generate")
    choose = ORDERS[order](blocks, per_block, threshold, draws)
    attention_mask = _hide_padding(real, model, precision)
    chunk = chunk_rows(model.get_output_embeddings().weight)  # never more logits than these at once
    history = []

    bar = tqdm(total=int(holes.sum()), desc="writing", unit="token", leave=False, disable=not progress)
    with bar, eval_mode(model), autocast(model.device, precision):  # around the loop: the weights are cast once
        while holes.any():
            step, wanted = choose.candidates(holes)
            active = wanted.any(1).nonzero()[:, 0]  # sequences with nothing to reveal are left alone
            where = active.to(model.device)
            hidden = hidden_states(model, canvas[where], None if attention_mask is None else attention_mask[where])
            places, columns = wanted[active].nonzero(as_tuple=True)
            sources = predicting_states(model, hidden, (places * canvas.shape[1] + columns).to(model.device))  # [M, D]
            if choose.measure is not None:
                kept = choose.keep(_measured(model, tokenizer, sources, choose.measure), active[places])
                places, columns, sources = places[kept], columns[kept], sources[kept.to(model.device)]
            revealed = active[places]
            shown = canvas[revealed.to(model.device)]  # [M, L]
            chunks = zip(sources.split(chunk), shown.split(chunk), strict=True)
            logits = (_penalise(_logits(model, tokenizer, some), seen, repetition_penalty) for some, seen in chunks)
            tokens = torch.cat([draw(some, temperature, top_p, top_k, draws) for some in logits])  # [M]
            canvas[revealed.to(model.device), columns.to(model.device)] = tokens.to(model.device)
            holes[revealed, columns] = False
            bar.update(len(tokens))
            history.append(Reveal(step, revealed.tolist(), columns.tolist(), tokens.tolist()))
            if end is not None:
                _close_ended(canvas, holes, blocks, end)
            if expected is not None:
                holes &= ~_differs(canvas, expected, written & ~holes)[:, None]

    canvas = canvas.cpu()
    if end is not None:  # the text ends before the end token
        real &= ~(written & ((canvas == end) & written).cumsum(1).bool())
    text = [decode(tokenizer, row[kept][1:].tolist()) for row, kept in zip(canvas, real, strict=True)]
    return Samples(text, canvas, real, history if return_history else [], len(history))


# ----------------------------------------------------------------------------------------------- the orders
class _Planned:
    """Reveals each position at a step that was drawn beforehand."""

    measure = None

    def __init__(self, plan: Tensor):
        self.plan = plan  # [N, L]

    def candidates(self, holes: Tensor) -> tuple[int, Tensor]:
        step = int(self.plan[holes].min())  # steps at which nothing is planned are passed over
        return step, holes & (self.plan == step)


class _Greedy:
    """Reveals, in the leftmost block with a hole, what the model is surest of."""

    def __init__(self, blocks: Tensor, per_block: int, measure: Callable, sure: float = math.inf):
        self.blocks, self.per_block, self.measure, self.sure = blocks, per_block, measure, sure
        self.step, self.block = -1, torch.full((len(blocks),), -1)
        self.steps_left = torch.zeros(len(blocks), dtype=torch.long)

    def candidates(self, holes: Tensor) -> tuple[int, Tensor]:
        self.step += 1
        block = self.blocks.where(holes, self.blocks.max() + 1).min(1).values
        self.steps_left = torch.where(block == self.block, self.steps_left - 1, self.per_block)
        self.block = block
        wanted = holes & (self.blocks == block[:, None])
        self.quota = -(-wanted.sum(1) // self.steps_left.clamp(min=1))  # [N]
        return self.step, wanted

    def keep(self, score: Tensor, rows: Tensor) -> Tensor:
        """Indices of the best `quota` candidates in each row, and of all that are sure."""
        by_score = score.argsort(descending=True)
        by_row = by_score[rows[by_score].argsort(stable=True)]  # rows in order, best first in each
        ordered = rows[by_row]
        place = torch.arange(len(rows)) - torch.searchsorted(ordered, ordered)
        return by_row[(place < self.quota[ordered]) | (score[by_row] >= self.sure)]


def _random(blocks: Tensor, per_block: int, threshold: float, draws: torch.Generator) -> _Planned:
    return _Planned(blocks * per_block + torch.randint(per_block, blocks.shape, generator=draws))


def _first_hitting(blocks: Tensor, per_block: int, threshold: float, draws: torch.Generator) -> _Planned:
    times = torch.rand(blocks.shape, generator=draws, dtype=torch.float64)
    return _Planned((blocks + times).where(blocks >= 0, math.inf).argsort(1).argsort(1))


def _confidence(p: Tensor) -> Tensor:
    return p.max(-1).values


def _negative_entropy(p: Tensor) -> Tensor:
    return -torch.special.entr(p).sum(-1)


def _margin(p: Tensor) -> Tensor:
    best, second = p.topk(2, -1).values.unbind(-1)
    return best - second


ORDERS: dict[str, Callable] = {
    "random": _random,
    "first_hitting": _first_hitting,
    "confidence": lambda blocks, per_block, *_: _Greedy(blocks, per_block, _confidence),
    "entropy": lambda blocks, per_block, *_: _Greedy(blocks, per_block, _negative_entropy),
    "margin": lambda blocks, per_block, *_: _Greedy(blocks, per_block, _margin),
    "threshold": lambda blocks, _, threshold, __: _Greedy(blocks, sys.maxsize, _confidence, sure=threshold),
}
UNHURRIED = ("first_hitting", "threshold")  # however many steps are asked for


def _measured(model, tokenizer, sources: Tensor, measure: Callable) -> Tensor:
    """`measure` of the predicted distributions, a chunk at a time: `[M]` on the CPU."""
    chunk = chunk_rows(model.get_output_embeddings().weight)
    return torch.cat([measure(_logits(model, tokenizer, part).softmax(-1)).cpu() for part in sources.split(chunk)])


# ----------------------------------------------------------------------------------------------- one token
def draw(
    logits: Tensor, temperature: float, top_p: float | None, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """One token for each row of logits `[M, V]`, drawn in float64: `[M]` on the CPU."""
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or it needs precision='fp32'")
    if temperature == 0:
        return logits.argmax(-1).cpu()
    weights = (logits.double() / temperature).softmax(-1)
    weights = _keep_top(weights, top_p, top_k) if top_p or top_k else weights
    cumulative = weights.cumsum(-1)
    chance = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    return torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)[:, 0].cpu()


def _keep_top(weights: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    ordered, index = weights.sort(-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p:
        drop |= ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
    return weights.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), 0.0)


def _penalise(logits: Tensor, shown: Tensor, penalty: float) -> Tensor:
    """Lower the logits `[M, V]` of the tokens `[M, L]` that a sequence shows ([MASK], among them, is at -inf)."""
    if penalty == 1.0:
        return logits
    score = logits.gather(-1, shown)
    return logits.scatter(-1, shown, torch.where(score > 0, score / penalty, score * penalty))


def _logits(model, tokenizer, hidden: Tensor) -> Tensor:
    logits = logits_of(model, hidden)
    return logits.index_fill_(-1, unused_ids(tokenizer, logits.shape[-1]).to(logits.device), -torch.inf)


# --------------------------------------------------------------------------------------------- the sequences
def _rows(prompt, suffix, length, parts) -> list[Parts]:
    if parts is None:
        if length is None or length < 1:
            raise ValueError(f"need length >= 1, the number of tokens to write, or parts; got length={length}")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        return [[text or "", length, suffix or ""] for text in prompts]
    if (prompt, suffix, length) != (None, None, None):
        raise ValueError("give either parts, or prompt, length and suffix")
    rows = parts if parts and isinstance(parts[0], list) else [parts]
    for row in rows:
        gaps = [part for part in row if not isinstance(part, (str, Tensor))]
        if not gaps or not all(isinstance(gap, int) and gap > 0 for gap in gaps):
            raise ValueError(f"parts are texts and gap sizes, with at least one gap of at least one token; got {row!r}")
    return rows


def _encoded(tokenizer, row: Parts) -> list[list[int] | int]:
    """A row with token ids in place of texts; a text that stands behind something continues it."""
    parts = [part.tolist() if isinstance(part, Tensor) else part for part in row]
    return [
        encode(tokenizer, [part], inside=any(parts[:i]))[0] if isinstance(part, str) else part
        for i, part in enumerate(parts)
    ]


def _canvas(
    model, tokenizer, rows: list[list[list[int] | int]], block_length: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Three `[N, L]`: the tokens, [MASK] in the gaps; each gap position's block, else -1; what is not padding."""
    begin, mask = begin_id(tokenizer), require_mask_id(model)
    tokens = [[begin] + [t for part in row for t in ([mask] * part if isinstance(part, int) else part)] for row in rows]
    gaps = [
        [False] + [g for part in row for g in ([True] * part if isinstance(part, int) else [False] * len(part))]
        for row in rows
    ]
    longest = max(map(len, tokens))
    check_fits(model, tokenizer, longest)
    real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in tokens])
    holes = torch.tensor([row + [False] * (longest - len(row)) for row in gaps])
    blocks = ((holes.cumsum(1) - 1) // (block_length or longest)).where(holes, -1)
    padded = [row + [begin] * (longest - len(row)) for row in tokens]
    return torch.tensor(padded, device=model.device), blocks, real


def _hide_padding(real: Tensor, model, precision: str) -> Tensor | None:
    """An additive mask `[N, 1, 1, L]` that keeps everyone from attending to padding; None if there is none."""
    if real.all():
        return None
    dtypes = {**DTYPES, "fp32": model.dtype}  # without autocast the model computes in its own
    mask = torch.zeros(real.shape, dtype=dtypes[pick_precision(precision, model.device)])
    return mask.masked_fill(~real, -torch.inf)[:, None, None].to(model.device)


def _close_ended(canvas: Tensor, holes: Tensor, blocks: Tensor, end: int) -> None:
    """Where a finished block holds the end token, what lies to its right is not to be written."""
    ends = (canvas.cpu() == end) & (blocks >= 0) & ~holes
    first = blocks.where(ends, blocks.max() + 1).min(1, keepdim=True).values  # [N, 1]: the block with an end token
    unfinished = (holes & (blocks <= first)).any(1, keepdim=True)
    closed = holes & (blocks > first) & ~unfinished
    canvas[closed.to(canvas.device)] = end
    holes &= ~closed


def _differs(canvas: Tensor, expected: list[list[int]], known: Tensor) -> Tensor:
    """Whether a sequence holds another token than expected at a place that is known: `[N]` bool."""
    wanted = torch.zeros(canvas.shape, dtype=torch.long)
    for row, ids in zip(wanted, expected, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return ((canvas.cpu() != wanted) & known).any(1)


def _check(order, steps, threshold, block_length, temperature, top_p, top_k, repetition_penalty, num_samples) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    for name, value in {
        "steps": steps,
        "block_length": block_length,
        "top_k": top_k,
        "num_samples": num_samples,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in {"top_p": top_p, "threshold": threshold}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    if temperature < 0 or repetition_penalty <= 0:
        raise ValueError(
            f"need temperature >= 0 and repetition_penalty > 0, got {temperature} and {repetition_penalty}"
        )
