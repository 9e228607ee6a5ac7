"""In which order masked positions are revealed.

N sequences of L positions. Before each forward pass `generate` asks the order which positions the pass may reveal, and
after it which of them to reveal. All tensors here are on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What orders are made of; each takes what it needs."""

    blocks: Tensor  # [N, L] long: the block of each position to fill, elsewhere -1
    steps: int  # in each block
    threshold: float
    remask: float
    draws: torch.Generator


class Turn(NamedTuple):
    """What the next forward pass is for."""

    holes: Tensor  # [N, L] bool: the positions that are masked in this pass
    candidates: Tensor  # [N, L] bool: those among them that it may reveal


class Order:
    """Decides which positions are revealed together, and when."""

    ignores_steps = False

    def __init__(self, settings: Settings):
        self.blocks, self.steps = settings.blocks, settings.steps

    def turn(self, holes: Tensor) -> Turn | None:
        """The next pass over sequences with these `holes` `[N, L]` bool, or None after the last."""
        raise NotImplementedError

    def choose(self, rows: Tensor, distributions: Iterator[Tensor]) -> Tensor:
        """Which of M candidates are revealed: indices `[K]` long; at least one for each sequence.

        Args:
            rows: `[M]` long, sorted: the sequence of each candidate.
            distributions: of the candidates' tokens, `[m, V]` at a time. Computed only if asked for.
        """
        return torch.arange(len(rows))


# --------------------------------------------------------------------------------------- planned beforehand
class Planned(Order):
    """Reveals each position at the step of a plan `[N, L]`. Steps for which nothing is planned are passed over."""

    plan: Tensor

    def turn(self, holes: Tensor) -> Turn | None:
        if not holes.any():
            return None
        step = int(self.plan[holes].min())
        return Turn(holes, holes & (self.plan == step))


class Random(Planned):
    """Each position at a step drawn uniformly."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.plan = self.blocks * self.steps + torch.randint(self.steps, self.blocks.shape, generator=settings.draws)


class FirstHitting(Planned):
    """One position at a time, in random order."""

    ignores_steps = True

    def __init__(self, settings: Settings):
        super().__init__(settings)
        times = torch.rand(self.blocks.shape, generator=settings.draws, dtype=torch.float64)
        self.plan = (self.blocks + times).where(self.blocks >= 0, math.inf).argsort(1).argsort(1)


class Remasking(Order):
    """Reveals at random, and masks revealed tokens again: the chain of ReMDM, arXiv 2503.00307, capped.

    Let a(k) = k / steps, the probability that a token is revealed after k steps of its block. In step k each revealed
    token is masked with probability s = min(remask, (1 - a(k)) / a(k - 1)), and each masked one is revealed with
    probability (a(k) - (1 - s) a(k - 1)) / (1 - a(k - 1)), drawn from the prediction before the step.

    So each position is masked with probability 1 - a(k) after step k, as in the forward process, and after the last
    step none is. With a perfect denoiser the text is exact if its tokens are independent, or in the limit of many steps
    with `remask` * steps fixed; otherwise, tokens that are revealed in one step are drawn independently of each other.
    """

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.remask, self.draws = settings.remask, settings.draws
        self.step, self.last = 0, (int(self.blocks.max()) + 1) * self.steps
        self.hidden_again = torch.zeros_like(self.blocks, dtype=torch.bool)  # by the step before

    def turn(self, holes: Tensor) -> Turn | None:
        while self.step < self.last:
            holes = holes | self.hidden_again
            block, done = divmod(self.step, self.steps)
            before, after = done / self.steps, (done + 1) / self.steps  # the probability that a token is revealed
            hide = min(self.remask, (1 - after) / before) if before else 0.0
            reveal = (after - (1 - hide) * before) / (1 - before)
            chance = torch.rand(holes.shape, generator=self.draws, dtype=torch.float64)
            in_block = self.blocks == block
            candidates = in_block & holes & (chance < reveal)
            self.hidden_again = in_block & ~holes & (chance < hide)
            self.step += 1
            if candidates.any():
                return Turn(holes, candidates)
        return None


# ------------------------------------------------------------------- greedy: what the model is surest of, first
class Greedy(Order):
    """Reveals the positions with the highest score in the leftmost block with a hole, equally many in each step."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.block = torch.full((len(self.blocks),), -1)
        self.steps_left = torch.zeros(len(self.blocks), dtype=torch.long)

    def score(self, p: Tensor) -> Tensor:
        """How sure the model is of distributions `[m, V]`: `[m]`."""
        raise NotImplementedError

    def takes(self, rows: Tensor, rank: Tensor, score: Tensor) -> Tensor:
        """Which candidates are revealed, `[M]` bool; `rank` 0 has the highest score of its sequence. All `[M]`."""
        return rank < self.quota[rows]

    def turn(self, holes: Tensor) -> Turn | None:
        if not holes.any():
            return None
        block = self.blocks.where(holes, self.blocks.max() + 1).min(1).values
        self.steps_left = torch.where(block == self.block, self.steps_left - 1, self.steps)
        self.block = block
        candidates = holes & (self.blocks == block[:, None])
        self.quota = -(-candidates.sum(1) // self.steps_left.clamp(min=1))  # [N]
        return Turn(holes, candidates)

    def choose(self, rows: Tensor, distributions: Iterator[Tensor]) -> Tensor:
        score = torch.cat([self.score(p).cpu() for p in distributions])
        by_score = score.argsort(descending=True)
        best_first = by_score[rows[by_score].argsort(stable=True)]  # rows in order, best first in each
        rows, score = rows[best_first], score[best_first]
        rank = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
        return best_first[self.takes(rows, rank, score)]


class Confidence(Greedy):
    """First where the best token has the highest probability."""

    def score(self, p: Tensor) -> Tensor:
        return p.amax(-1)


class Entropy(Greedy):
    """First where the entropy is lowest."""

    def score(self, p: Tensor) -> Tensor:
        return -torch.special.entr(p).sum(-1)


class Margin(Greedy):
    """First where the two best tokens are farthest apart."""

    def score(self, p: Tensor) -> Tensor:
        best, second = p.topk(2, -1).values.unbind(-1)
        return best - second


class Threshold(Confidence):
    """All positions whose best token is probable enough, and the best of them at least."""

    ignores_steps = True

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.threshold = settings.threshold

    def takes(self, rows: Tensor, rank: Tensor, score: Tensor) -> Tensor:
        return (rank == 0) | (score >= self.threshold)


ORDERS: dict[str, type[Order]] = {
    "random": Random,
    "first_hitting": FirstHitting,
    "remasking": Remasking,
    "confidence": Confidence,
    "entropy": Entropy,
    "margin": Margin,
    "threshold": Threshold,
}


def steps_per_block(order: str, steps: int | None, block_length: int | None, blocks: Tensor) -> int:
    """How many steps each block gets of `steps` for all of them; by default one for each position to fill.

    Raises:
        ValueError: fewer steps than blocks.
    """
    most_holes, most_blocks = int((blocks >= 0).sum(1).max()), int(blocks.max()) + 1
    if steps is None:
        return min(most_holes, block_length or most_holes)
    if steps < most_blocks and not ORDERS[order].ignores_steps:
        raise ValueError(f"{steps} steps are too few for {most_blocks} blocks; raise steps or block_length")
    return steps // most_blocks
