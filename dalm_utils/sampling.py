"""Writing text: start from [MASK] everywhere and reveal tokens, a few at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .backbone import autocast, begin_id
from .corpus import encode
from .objective import hidden_states, logits_of, seeded

ORDERS = ("random", "confidence")


@dataclass(frozen=True)
class Reveal:
    """One step of denoising: which tokens appeared where. Three lists of equal length."""

    step: int
    rows: list[int]
    positions: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Samples:
    """Generated text; `tokens` is `[N, L]` with the begin token, prompt and suffix included."""

    text: list[str]
    tokens: Tensor
    history: list[Reveal]  # empty unless return_history
    forward_passes: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | None = None,
    suffix: str | None = None,
    length: int,
    steps: int,
    order: str = "random",
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    return_history: bool = False,
    precision: str = "auto",
) -> Samples:
    """Fill `length` masked positions after `prompt` and before `suffix`.

    Orders:
        random: each position is revealed at a step drawn uniformly from `steps`: ancestral sampling of the
            linear schedule (arXiv 2410.17891, algorithm 2).  With one position per step it samples the model's
            any-order distribution exactly; tokens revealed together are drawn independently.
        confidence: every step proposes a token everywhere and keeps those with the highest probability, the
            same number each step (arXiv 2202.04200).  Often better text, but biased: it does not sample the
            model's distribution.

    In random order only positions about to be revealed meet the head; a step that reveals nothing costs nothing.
    Tokens are drawn in float64, because float32 noise lowers the effective temperature (arXiv 2409.02908).

    Args:
        length: tokens to write.
        steps: denoising steps; in random order some positions share a step even when there are as many steps.
        temperature: divides the logits; 0 takes the most probable token.
        top_p, top_k: keep the smallest set of tokens with this probability; this many tokens.

    Raises:
        ValueError: a value out of range, or more positions than the model has.
    """
    if length < 1 or steps < 1 or num_samples < 1 or temperature < 0:
        raise ValueError(
            "need length, steps, num_samples >= 1 and temperature >= 0, "
            f"got {length}, {steps}, {num_samples}, {temperature}"
        )
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if (top_p is not None and not 0 < top_p <= 1) or (top_k is not None and top_k < 1):
        raise ValueError(f"need 0 < top_p <= 1 and top_k >= 1, got top_p={top_p}, top_k={top_k}")
    mask_id = model.config.mask_token_id
    canvas = _canvas(model, tokenizer, prompt, suffix, length).repeat(num_samples, 1)  # [N, L]
    draws = seeded(seed, 0, "generate")
    plan = torch.randint(steps, canvas.shape, generator=draws)  # the step at which `random` reveals each position
    was_training = model.training
    model.eval()
    history, forward_passes = [], 0

    for step in range(steps):
        hidden_now = (canvas == mask_id).cpu()
        wanted = hidden_now & (plan == step) if order == "random" else hidden_now
        active = wanted.any(1).nonzero()[:, 0]  # sequences with nothing to reveal are left alone
        if len(active) == 0:
            continue
        with autocast(model.device, precision):
            hidden = hidden_states(model, canvas[active.to(canvas.device)])
            rows, columns = wanted[active].nonzero(as_tuple=True)
            logits = logits_of(model, hidden[rows, columns - 1 if model.config.shift else columns])  # [M, V]
        forward_passes += 1
        logits[:, len(tokenizer) :] = -torch.inf  # rows that pad the embedding are not tokens
        tokens, probability = draw(logits, temperature, top_p, top_k, draws)
        rows = active[rows]
        if order == "confidence":
            keep = _most_confident(probability, rows, hidden_now.sum(1), steps - step)
            rows, columns, tokens = rows[keep], columns[keep], tokens[keep]
        canvas[rows.to(canvas.device), columns.to(canvas.device)] = tokens.to(canvas.device)
        if return_history:
            history.append(Reveal(step, rows.tolist(), columns.tolist(), tokens.tolist()))

    model.train(was_training)
    text = tokenizer.batch_decode(canvas[:, 1:], skip_special_tokens=True)
    return Samples(text, canvas.cpu(), history, forward_passes)


def _canvas(model, tokenizer, prompt: str | None, suffix: str | None, length: int) -> Tensor:
    before, after = encode(tokenizer, [prompt or "", suffix or ""])
    canvas = [begin_id(tokenizer)] + before + [model.config.mask_token_id] * length + after
    room = getattr(model.config, "max_position_embeddings", len(canvas))
    if len(canvas) > room:
        raise ValueError(
            f"prompt ({len(before)} tokens), length ({length}), suffix ({len(after)}) and the begin token make "
            f"{len(canvas)} positions; the model has {room}"
        )
    return torch.tensor([canvas], device=model.device)


def draw(
    logits: Tensor, temperature: float, top_p: float | None, top_k: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits `[M, V]`, and its probability before filtering: two `[M]` on the CPU."""
    probability = logits.double().softmax(-1)
    if temperature == 0:
        chosen = probability.argmax(-1)
    else:
        weights = probability if temperature == 1 else (logits.double() / temperature).softmax(-1)
        weights = _keep_top(weights, top_p, top_k) if top_p or top_k else weights
        cumulative = weights.cumsum(-1)
        threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
        chosen = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)[:, 0]
    return chosen.cpu(), probability.gather(-1, chosen[:, None])[:, 0].cpu()


def _keep_top(weights: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    ordered, index = weights.sort(-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p:
        drop |= ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
    return weights.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), 0.0)


def _most_confident(probability: Tensor, rows: Tensor, remaining: Tensor, steps_left: int) -> Tensor:
    """Indices of the proposals to keep: in each row the best ceil(remaining / steps_left)."""
    quota = -(-remaining // steps_left)  # [N]
    by_confidence = probability.argsort(descending=True)
    by_row = by_confidence[rows[by_confidence].argsort(stable=True)]  # rows in order, best first in each
    place = torch.arange(len(rows)) - torch.searchsorted(rows[by_row].contiguous(), rows[by_row].contiguous())
    return by_row[place < quota[rows[by_row]]]
