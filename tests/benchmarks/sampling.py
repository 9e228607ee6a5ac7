"""What sampling costs and what its text is worth: a plain sampler, a cache for blocks, several tokens a pass.

The plain sampler does what public ones do: at every step the logits of every position, a sort of the whole
vocabulary for top-p, a draw everywhere, and then most of it is thrown away. Quality is that of `tiny-diffugpt`
continuing test documents, judged by the AR model that it was made from; GPT-2's shape has random weights.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dalm_utils import as_diffusion, generate, load_base, load_corpus, load_diffusion
from dalm_utils.evaluation import stack
from dalm_utils.machine import autocast, pick_precision
from dalm_utils.quality import infilling, text_quality
from tests.benchmarks import finish, in_turns, machine, options

BLOCK, PROMPT = 32, 32
TEXT = dict(order="confidence", block_length=BLOCK, temperature=0.8, repetition_penalty=1.2)
WAYS = {
    "one token a pass": TEXT,
    "the same, cached": TEXT | dict(cache=True),
    "threshold 0.9, cached": TEXT | dict(cache=True, order="threshold", threshold=0.9),
}


class Trunk:
    """Times the calls of a model's trunk."""

    def __init__(self, model):
        self.seconds = 0.0
        forward = model.base_model.forward

        def timed(*inputs, **named):
            begun = time.perf_counter()
            output = forward(*inputs, **named)
            self.seconds += time.perf_counter() - begun
            return output

        model.base_model.forward = timed


@torch.no_grad()
def plain(model, length: int, steps: int, top_p: float) -> torch.Tensor:
    """Random order, everything computed everywhere."""
    mask = model.config.mask_token_id
    canvas = torch.full((1, length + 1), mask)
    canvas[0, 0] = 0
    with autocast(model.device):
        for step in range(steps):
            logits = model(canvas).logits.float()[:, :-1]  # [1, L, V]
            logits[..., mask] = -torch.inf
            ordered, index = logits.softmax(-1).sort(-1, descending=True)
            drop = ordered.cumsum(-1) - ordered >= top_p
            p = torch.zeros_like(ordered).scatter(-1, index, ordered.masked_fill(drop, 0))
            drawn = p[0].multinomial(1)[:, 0]
            holes = canvas[0, 1:] == mask
            now = holes & (torch.rand(length) < 1 / (steps - step))
            canvas[0, 1:] = torch.where(now, drawn, canvas[0, 1:])
    return canvas


def gpt2() -> tuple:
    """GPT-2 124M with random weights, adapted, and a tokenizer of as many words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50_257)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()
    return as_diffusion(model, tokenizer)


def against_plain(model, tokenizer, length: int, steps: int, rounds: int) -> dict[str, float]:
    """The random order against the plain sampler, and how much of its time is the trunk's."""
    trunk, inside = Trunk(model), []

    def ours():
        trunk.seconds = 0.0
        generate(model, tokenizer, length=length - 1, steps=steps, top_p=0.9)
        inside.append(trunk.seconds)

    ways = {"plain": lambda: plain(model, length - 1, steps, 0.9), "random": ours}
    seconds = in_turns(ways, rounds)
    share = sorted(inside[1:])[rounds // 2] / seconds["random"]
    print(f"| GPT-2, length {length}, {steps} steps, top-p 0.9 | {seconds['plain']:.1f} | {seconds['random']:.1f} | "
          f"{seconds['plain'] / seconds['random']:.1f} | {share:.0%} |")  # fmt: skip
    return {"trunk_share": share, "speedup_vs_plain": seconds["plain"] / seconds["random"]}


def cached_speedup(name: str, model, tokenizer, length: int, count: int, rounds: int, precision: str) -> float:
    """How many times faster the last `count` tokens of a text of `length` are generated with a cache."""
    given = torch.arange(10, 10 + length - 1 - count)

    def sample(cache: bool):
        generate(model, tokenizer, parts=[given, count], **TEXT, cache=cache, precision=precision)

    seconds = in_turns({"full": lambda: sample(False), "cached": lambda: sample(True)}, rounds)
    ratio = seconds["full"] / seconds["cached"]
    full, cached = (1000 * seconds[way] / count for way in ("full", "cached"))
    print(f"| {name} | {length} | {full:.1f} | {cached:.1f} | {ratio:.1f} |", flush=True)
    return ratio


def judged(judge, tokenizer, tokens: torch.Tensor) -> str:
    """Perplexity, entropy and repetition of texts `[N, L]` with their standard errors, as columns of a table."""
    rows = [text_quality(judge, tokenizer, row[None]) for row in tokens]

    def mean(values) -> tuple[float, float]:
        return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(rows))

    nll, error = mean([math.log(row.perplexity) for row in rows])
    columns = [(math.exp(nll), math.exp(nll) * error)]
    columns += [mean([getattr(row, name) for row in rows]) for name in ("entropy", "repetition")]
    digits = (1, 2, 3)
    return " | ".join(f"{m:.{d}f} +- {e:.{d}f}" for (m, e), d in zip(columns, digits, strict=True))


def quality(pair, judge, blocks: torch.Tensor, ways: dict[str, dict]) -> dict[str, float]:
    """A row for each way to continue the first tokens of blocks `[N, L]`; returns the tokens that a pass reveals."""
    model, tokenizer = pair
    count, tokens_per_pass = blocks.shape[1] - 1 - PROMPT, {}
    parts = [[row[1 : 1 + PROMPT], count] for row in blocks]
    for name, how in ways.items():
        begun = time.perf_counter()
        samples = generate(model, tokenizer, parts=parts, **how, seed=5, return_history=True)
        seconds = time.perf_counter() - begun
        passes = sum(len(set(reveal.rows)) for reveal in samples.history)  # of all texts
        tokens_per_pass[name] = count * len(blocks) / passes
        gap = {key: value for key, value in how.items() if key not in ("steps", "temperature", "repetition_penalty")}
        restored = infilling(model, tokenizer, blocks, **gap)
        match = f"{restored.mean['token_match']:.3f} +- {restored.stderr['token_match']:.3f}"
        print(f"| {name} | {passes / len(blocks):.0f} | {tokens_per_pass[name]:.2f} | {seconds:.0f} | "
              f"{judged(judge, tokenizer, samples.tokens)} | {match} |", flush=True)  # fmt: skip
    return tokens_per_pass


def main() -> None:
    asked = options(__doc__.splitlines()[0], length=256, steps=16, count=32, texts=64, text_length=128, rounds=2)
    print(f"{machine()}\n\n| | plain, s | ours, s | times faster | of it in the trunk |\n|---|---|---|---|---|")
    large, small = gpt2(), load_diffusion("tiny-diffugpt")
    figures = against_plain(*gpt2(), asked.length, asked.steps, asked.rounds)

    for precision in dict.fromkeys(("fp32", pick_precision("auto", small[0].device))):  # any machine's, and this one's
        print(f"\n| {precision} | length | ms a pass, full | ms a pass, cached | times faster |\n|---|---|---|---|---|")
        speed, end = dict(rounds=asked.rounds, precision=precision), "" if precision == "fp32" else f"_{precision}"
        length, count = asked.length, asked.count
        figures[f"cache_speedup{end}"] = cached_speedup("tiny-diffugpt", *small, length, 4 * count, **speed)
        figures[f"cache_speedup_gpt2{end}"] = cached_speedup("GPT-2", *large, length, count, **speed)
        figures[f"cache_speedup_gpt2_512{end}"] = cached_speedup("GPT-2", *large, 2 * length, count, **speed)

    columns = ("passes a text", "tokens a pass", "s", "perplexity", "entropy", "repetition", "token match of infilling")
    print(f"\n| tiny-diffugpt, length {asked.text_length} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    judge, tokenizer = load_base("tiny-gpt2")
    blocks = stack(load_corpus("docstrings", tokenizer).blocks("test", asked.text_length, asked.texts))
    print(f"| held-out text | | | | {judged(judge, tokenizer, blocks)} | |")
    figures["tokens_per_pass"] = list(quality(small, judge, blocks, WAYS).values())[-1]
    finish(figures, asked.json)


if __name__ == "__main__":
    main()
