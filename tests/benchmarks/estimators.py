"""How much a likelihood estimate costs to be this sure: variance within a document, times seconds.

All five are unbiased estimates of the same NELBO per token, with the same number of masks (or pairs of masks) for
each document. `evaluation.nelbo` is `stratified counts`.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from dalm_utils import corrupt, load_corpus, load_diffusion, sample_times
from dalm_utils.evaluation import _random_sets, _token_means
from tests.benchmarks import finish, machine, options


def by_times(method: str, count: int, masks: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coin flips at random times, as training does: masks `[N * S, L]` and the weight of each mask's mean."""
    if method == "uniform":
        times = sample_times(count * masks, method="uniform", generator=draws)
    else:
        times = torch.cat([sample_times(masks, method=method, generator=draws) for _ in range(count)])
    masked = corrupt(torch.zeros(count * masks, n + 1, dtype=torch.long), times, 1, generator=draws)[1]
    return masked, masked.sum(1) / (times * n)


def by_counts(stratified: bool, count: int, masks: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random set of a random size: the mean over the set, all sizes alike; a text's sizes one from each stratum,
    as `evaluation.nelbo` does, or independent, as LLaDA's evaluation."""
    texts, each = (count, masks) if stratified else (count * masks, 1)
    return F.pad(_random_sets(torch.ones(texts, n, dtype=torch.bool), each, draws), (1, 0)), torch.ones(count * masks)


def in_pairs(count: int, masks: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each set of stratified size together with its complement; a full set has none."""
    masked, _ = by_counts(True, count, masks, n, draws)
    other = ~masked
    other[:, 0] = False
    alone = ~other.any(1)
    other[alone] = masked[alone]  # weighs nothing below
    weights = torch.stack([torch.where(alone, 1.0, 0.5), torch.where(alone, 0.0, 0.5)], 1)
    return torch.stack([masked, other], 1).flatten(0, 1), weights.flatten() * 2


WAYS = {
    "uniform times (the paper's code)": lambda *given: by_times("uniform", *given),
    "stratified times": lambda *given: by_times("stratified", *given),
    "uniform counts (LLaDA's evaluation)": lambda *given: by_counts(False, *given),
    "stratified counts (ours)": lambda *given: by_counts(True, *given),
    "complementary pairs of those": in_pairs,
}


def main() -> None:
    asked = options(__doc__.splitlines()[0], documents=24, length=128, masks=8, repeats=24)
    model, tokenizer = load_diffusion("tiny-diffugpt")
    blocks = load_corpus("docstrings", tokenizer).blocks("test", asked.length, asked.documents)
    tokens = blocks[list(range(len(blocks)))]
    count, n = len(tokens), asked.length - 1
    seconds, estimates = dict.fromkeys(WAYS, 0.0), {name: [] for name in WAYS}
    for repeat in range(asked.repeats + 1):  # in turns; the first only warms up
        for name, way in WAYS.items():
            begun = time.perf_counter()
            masked, weights = way(count, asked.masks, n, torch.Generator().manual_seed(repeat))
            each = len(masked) // count
            clean = tokens.repeat_interleave(each, 0)
            noised = torch.where(masked, model.config.mask_token_id, clean)
            with torch.no_grad():
                means = _token_means(model, clean, noised, masked, None, model.config.shift, 32, "auto").nan_to_num()
            if repeat:
                estimates[name].append((means * weights).view(count, each).mean(1))
                seconds[name] += time.perf_counter() - begun

    print(f"{machine()}\ntiny-diffugpt, {count} documents of {asked.length} tokens, {asked.masks} masks each, ", end="")
    print(f"{asked.repeats} repeats\n")
    print("| estimator | mean | sd within a document | seconds | variance x seconds, relative |\n|---|---|---|---|---|")
    values = {name: torch.stack(rows) for name, rows in estimates.items()}  # [R, N]
    price = {name: float(v.var(0).mean()) * seconds[name] for name, v in values.items()}
    first = next(iter(WAYS))
    for name, v in values.items():
        spread = float(v.var(0).mean()) ** 0.5
        print(
            f"| {name} | {v.mean():.3f} | {spread:.3f} | {seconds[name]:.1f} | 1 / {price[first] / price[name]:.2f} |"
        )
    finish({"gain_vs_uniform": price[first] / price["stratified counts (ours)"]}, asked.json)


if __name__ == "__main__":
    main()
