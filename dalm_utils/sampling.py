"""Generating text: start from [MASK] in the gaps and reveal tokens, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import check_fits, eval_mode, require_mask_id
from .block_cache import BlockPass, FullPass, check_cache
from .head import chunk_rows, logits_of
from .machine import DTYPES, autocast, pick_precision, send
from .objective import hide_padding, seeded
from .orders import ORDERS, Settings, steps_per_block
from .tokens import begin_id, decode, encode, unused_ids

Parts = list[str | Tensor | int]  # given texts, given token ids `[n]`, and gaps of so many tokens


@dataclass(frozen=True)
class Reveal:
    """One forward pass of denoising: which tokens appeared where. Three lists of equal length."""

    rows: list[int]
    positions: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Samples:
    """Generated text; `tokens` is `[N, L]`: the begin token, what was given, what was written, and padding."""

    text: list[str]
    tokens: Tensor
    shown: Tensor  # [N, L] bool: what stands in `text`, and the begin token; not padding, nor what follows the end
    history: list[Reveal]  # empty unless return_history; a position that was masked again is revealed more than once
    forward_passes: int  # each computes all sequences with something to reveal: wholly, or with a cache one block


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
    remask: float = 0.05,
    block_length: int | None = None,
    cache: bool = False,
    refresh: int | None = None,
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

    One hides tokens again:
        remasking: as random, but each revealed token is masked again with probability `remask` at each step, and
            more are revealed in its place (ReMDM, arXiv 2503.00307; `orders.Remasking` states the chain).

    Four are greedy: each token is a draw from the model, but which comes next depends on what it is sure of. So
    they are biased: not the any-order distribution. `tests/benchmarks/RESULTS.md` compares the texts.
        confidence, entropy, margin: first where the best token has the highest probability, the entropy is
            lowest, or the two best are farthest apart; the same number of positions each step (arXiv 2202.04200).
        threshold: every position whose best token has at least probability `threshold`, and one at least;
            `steps` plays no part.

    Filters (and in planned orders the head) run only on the positions that are being revealed; a step that reveals
    nothing costs nothing.  Tokens are drawn in float64: Gumbel noise in fewer bits lowers the temperature
    (2409.02908).

    With `cache=True` a pass computes all positions of a sequence only when it begins a block, and after that only the
    block.  This is an approximation: the rest of the text is represented as it was computed when the block was still
    masked.  `refresh` makes it a better one, and `refresh=1` exact.

    Args:
        prompt: text before the gap; a list is a batch, whose shorter sequences are padded. Nothing attends to padding.
        length: tokens to write.
        parts: in place of prompt, length and suffix, texts and gaps: ["x : ", 8, "Returns", 5]; or a list of such.
            A tensor `[n]` of token ids stands for a text that is tokenized already.
        steps: denoising steps for all blocks together, divided equally, rounded down; by default one for each masked
            position of the longest sequence.
        block_length: fill so many positions before any further to the right (semi-autoregressive); None: no blocks.
        cache: whether to compute blocks against cached keys and values; needs `block_length`.
        refresh: with `cache`, compute all positions at every `refresh`-th pass within a block, too.
        temperature: divides the logits; 0 takes the most probable token.
        top_p, top_k: keep the smallest set of tokens with this probability; this many tokens.
        repetition_penalty: above 1 makes tokens less likely that the sequence shows already (arXiv 1909.05858); the end
            token is exempt with `stop_at_end`.
        stop_at_end: what lies right of a block in which the document ends is not computed, and the text ends there.
            As in a `Corpus`, documents end with the begin token. Not with text given after a gap.
        num_samples: texts for each prompt; they stand together in the result.
        progress: a bar on stderr, in tokens.
        expected: token ids of each whole sequence, the begin token included; sampling of a sequence stops at its first
            token that differs, with [MASK] in its other gaps.

    Raises:
        ValueError: a value out of range, a model without [MASK], more positions than the model can see, or
            `cache=True` for a model that fails `check_cache`.
    """
    _check_numbers(
        {"steps": steps, "block_length": block_length, "refresh": refresh, "top_k": top_k, "num_samples": num_samples},
        {"top_p": top_p, "threshold": threshold, "remask": remask},
        temperature,
        repetition_penalty,
    )
    _check_together(order, cache, refresh, block_length, stop_at_end or expected is not None)
    rows = [_encoded(tokenizer, row) for row in _rows(prompt, suffix, length, parts)]
    canvas = _Canvas(model, tokenizer, [row for row in rows for _ in range(num_samples)], block_length, stop_at_end)
    draws = seeded(seed, 0, "generate")
    per_block = steps_per_block(order, steps, block_length, canvas.blocks)
    chooser = ORDERS[order](Settings(canvas.blocks, per_block, threshold, remask, draws))
    network = _network(model, canvas, _hide_padding(canvas.real, model, precision), cache, refresh)
    head = Head(model, tokenizer, temperature, top_p, top_k, repetition_penalty, draws)
    history = []

    bar = tqdm(total=int(canvas.holes.sum()), desc="sampling", unit="token", leave=False, disable=not progress)
    with bar, eval_mode(model), autocast(model.device, precision):  # around the loop: the weights are cast once
        while (turn := chooser.turn(canvas.holes)) is not None:
            canvas.hide(turn.holes)
            rows, columns = turn.candidates.nonzero(as_tuple=True)
            states = network.states(rows, columns)  # [M, D]
            kept = chooser.choose(rows, head.distributions(states))
            rows, columns = rows[kept], columns[kept]
            tokens = head.draw(states, send(kept, states.device), canvas.seen(send(rows, states.device)))  # [K]
            canvas.reveal(rows, columns, tokens)
            history.append(Reveal(rows.tolist(), columns.tolist(), tokens.tolist()))
            canvas.close_ended()
            canvas.close_unexpected(expected)
            bar.update(bar.total - int(canvas.holes.sum()) - bar.n)
    return canvas.samples(history if return_history else [], len(history))


# ----------------------------------------------------------------------------------------------- one token
class NotFinite(ValueError):
    """The model's logits are infinite or NaN."""


def draw(
    logits: Tensor, temperature: float, top_p: float | None, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """One token for each row of logits `[M, V]`, drawn in float64: `[M]` on the CPU."""
    largest = logits.amax(-1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise NotFinite("the model's logits are not finite: its weights are damaged, or it needs precision='fp32'")
    if temperature == 0:
        return logits.argmax(-1).cpu()
    weights = ((logits.double() - largest) / temperature).softmax(-1)  # no temperature is too low
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


class Head:
    """The model's head and what is asked of each token, a chunk of rows at a time."""

    def __init__(self, model, tokenizer, temperature, top_p, top_k, repetition_penalty, draws: torch.Generator):
        weight = model.get_output_embeddings().weight
        self.model, self.chunk = model, chunk_rows(weight)
        self.unused = unused_ids(tokenizer, len(weight)).to(weight.device)
        self.how, self.penalty = (temperature, top_p, top_k, draws), repetition_penalty
        self.logits: Tensor | None = None  # [M, V] of the states whose distributions were asked for last

    def distributions(self, states: Tensor) -> Iterator[Tensor]:
        """What states `[M, D]` predict: `[m, V]` at a time."""
        for part in states.split(self.chunk):
            logits = self._logits(part)
            self.logits = logits if len(states) <= self.chunk else None  # never more than a chunk
            yield logits.softmax(-1)

    def draw(self, states: Tensor, kept: Tensor, shown: Tensor) -> Tensor:
        """A token from each of K `kept` states of `[M, D]`, in sequences that show `[K, L]`: `[K]` on the CPU."""
        known, self.logits = self.logits, None
        logits = (self._logits(states[k]) if known is None else known[k] for k in kept.split(self.chunk))
        logits = (_penalize(x, seen, self.penalty) for x, seen in zip(logits, shown.split(self.chunk), strict=True))
        return torch.cat([draw(some, *self.how) for some in logits])

    def _logits(self, states: Tensor) -> Tensor:
        return logits_of(self.model, states).index_fill_(-1, self.unused, -torch.inf)


def _penalize(logits: Tensor, shown: Tensor, penalty: float) -> Tensor:
    """Lower the logits `[M, V]` of the tokens `[M, L]` that a sequence shows ([MASK], among them, is at -inf)."""
    if penalty == 1.0:
        return logits
    score = logits.gather(-1, shown)
    return logits.scatter(-1, shown, torch.where(score > 0, score / penalty, score * penalty))


# --------------------------------------------------------------------------------------------- the sequences
def _rows(prompt, suffix, length, parts) -> list[Parts]:
    if parts is None:
        if not isinstance(length, Integral) or length < 1:
            raise ValueError(f"need length >= 1, the number of tokens to write, or parts; got length={length}")
        texts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not texts:
            raise ValueError("prompt is empty; give at least one text")
        for text in (*texts, suffix):
            if not isinstance(text, (str, type(None))):
                raise ValueError(f"prompt and suffix are texts (token ids go into parts), got {text!r}")
        return [[text or "", int(length), suffix or ""] for text in texts]
    if (prompt, suffix, length) != (None, None, None):
        raise ValueError("give either parts, or prompt, length and suffix")
    rows = parts if parts and isinstance(parts[0], (list, tuple)) else [parts]
    for row in rows:
        is_row = isinstance(row, (list, tuple))
        gaps = [part for part in row if not isinstance(part, (str, Tensor))] if is_row else []
        if not gaps or not all(isinstance(gap, int) and gap > 0 for gap in gaps):
            raise ValueError(
                "parts are texts, tensors of token ids and gap sizes, with at least one gap of at least one token; "
                f"got {row!r}"
            )
        for ids in (part for part in row if isinstance(part, Tensor)):
            if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or (ids < 0).any():
                raise ValueError(f"token ids are a row of integers from 0 on, got {ids.tolist()}")
    return rows


def _encoded(tokenizer, row: Parts) -> list[list[int] | int]:
    """A row with token ids in place of texts; a text that stands behind something continues it."""
    parts = [part.tolist() if isinstance(part, Tensor) else part for part in row]
    return [
        encode(tokenizer, [part], inside=any(parts[:i]))[0] if isinstance(part, str) else part
        for i, part in enumerate(parts)
    ]


class _Canvas:
    """The sequences to fill, N of L positions: the begin token, given texts and gaps, and padding on the right."""

    def __init__(self, model, tokenizer, rows: list[list[list[int] | int]], block_length: int | None, stops: bool):
        self.tokenizer, self.begin, self.mask_id = tokenizer, begin_id(tokenizer), require_mask_id(model)
        gap = -1  # no token
        spelled = [[t for part in row for t in ([gap] * part if isinstance(part, int) else part)] for row in rows]
        lengths = torch.tensor([1 + len(row) for row in spelled])
        longest = int(lengths.max())
        check_fits(model, tokenizer, longest)
        known = model.get_input_embeddings().num_embeddings
        if (largest := max(map(max, spelled))) >= known:
            raise ValueError(f"there is no token {largest}: the model has {known}")
        tokens = torch.tensor([[self.begin, *row, *[self.begin] * (longest - 1 - len(row))] for row in spelled])
        self.real = torch.arange(longest) < lengths[:, None]  # not padding; all of these are [N, L] bool, on the CPU
        self.written = tokens == gap
        self.holes = self.written.clone()
        self.blocks = ((self.written.cumsum(1) - 1) // (block_length or longest)).where(self.written, -1)
        self.tokens = tokens.masked_fill(self.written, self.mask_id).to(model.device)
        self.stops = stops
        if stops and (self.written.cumsum(1).bool() & self.real & ~self.written).any():
            raise ValueError(
                "stop_at_end ends a text in its gap, but here given text follows one; leave one of them out"
            )

    def seen(self, rows: Tensor) -> Tensor:
        """The tokens that sequences `[K]` show, `[K, L]`. Where text may end, the end token does not count as shown."""
        tokens = self.tokens[rows]
        return tokens.masked_fill(tokens == self.begin, self.mask_id) if self.stops else tokens

    def hide(self, holes: Tensor) -> None:
        """Mask these `[N, L]`; an order may hide again what was revealed."""
        self.holes = holes
        self.tokens.masked_fill_(send(holes, self.tokens.device), self.mask_id)

    def reveal(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> None:
        place = send(torch.stack([rows, columns, tokens]), self.tokens.device)
        self.tokens[place[0], place[1]] = place[2]
        self.holes[rows, columns] = False

    def close_ended(self) -> None:
        """With `stops`: where a finished block holds the end token, what lies to its right is not to be written."""
        if not self.stops:
            return
        ends = (self.tokens.cpu() == self.begin) & self.written & ~self.holes
        first = self.blocks.where(ends, self.blocks.max() + 1).min(1, keepdim=True).values  # [N, 1]: where it ends
        unfinished = (self.holes & (self.blocks <= first)).any(1, keepdim=True)
        closed = self.holes & (self.blocks > first) & ~unfinished
        self.tokens[closed.to(self.tokens.device)] = self.begin
        self.holes &= ~closed

    def close_unexpected(self, expected: list[list[int]] | None) -> None:
        """Leave a sequence as it is where it holds another token than expected."""
        if expected is None:
            return
        wanted = torch.zeros(self.holes.shape, dtype=torch.long)
        for row, ids in zip(wanted, expected, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        differs = ((self.tokens.cpu() != wanted) & self.written & ~self.holes).any(1, keepdim=True)
        self.holes &= ~differs

    def samples(self, history: list[Reveal], forward_passes: int) -> Samples:
        tokens, shown = self.tokens.cpu(), self.real
        if self.stops:  # the text ends before the end token
            shown = shown & ~(self.written & ((tokens == self.begin) & self.written).cumsum(1).bool())
        text = [decode(self.tokenizer, row[kept][1:].tolist()) for row, kept in zip(tokens, shown, strict=True)]
        return Samples(text, tokens, shown, history, forward_passes)


def _hide_padding(real: Tensor, model, precision: str) -> Tensor | None:
    """An additive mask `[N, 1, 1, L]` that keeps everyone from attending to padding; None if there is none."""
    if real.all():
        return None
    dtypes = {**DTYPES, "fp32": model.dtype}  # without autocast the model computes in its own
    return hide_padding(real.to(model.device), None, dtypes[pick_precision(precision, model.device)])


def _network(model, canvas: _Canvas, padding: Tensor | None, cache: bool, refresh: int | None) -> FullPass:
    if not cache:
        return FullPass(model, canvas.tokens, padding)
    check_cache(model)
    return BlockPass(model, canvas.tokens, padding, canvas.blocks, refresh)


# -------------------------------------------------------------------------------------------------- refusals
def _check_numbers(counts: dict, fractions: dict, temperature: float, repetition_penalty: float) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in fractions.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    if not 0 <= temperature < math.inf or not 0 < repetition_penalty < math.inf:
        raise ValueError(
            f"need a finite temperature >= 0 and repetition_penalty > 0, got {temperature} and {repetition_penalty}"
        )


def _check_together(order: str, cache: bool, refresh: int | None, block_length: int | None, ends_early: bool) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if cache and block_length is None:
        raise ValueError("cache=True computes one block at a time; give block_length, 32 say, or leave the cache out")
    if refresh is not None and not cache:
        raise ValueError(f"refresh={refresh} is about the cache; set cache=True, or leave refresh out")
    if order == "remasking" and ends_early:
        raise ValueError(
            "order='remasking' may change each token until its last step, so a text cannot end early; "
            "leave stop_at_end and expected out, or choose another order"
        )
