"""What a text costs in each order, at GPT-2's size and vocabulary (random weights), and beside a plain sampler.

The plain sampler does what public ones do: at every step the logits of every position, a sort of the whole
vocabulary for top-p, a draw everywhere, and then most of it is thrown away.
"""

from __future__ import annotations

import statistics
import time

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dalm_utils import as_diffusion, generate
from dalm_utils.machine import autocast
from dalm_utils.sampling import ORDERS
from tests.benchmarks import finish, in_turns, machine, options


class Trunk:
    """Counts and times the calls of a model's trunk."""

    def __init__(self, model):
        self.passes, self.seconds = 0, 0.0
        forward = model.base_model.forward

        def timed(*inputs, **named):
            begun = time.perf_counter()
            output = forward(*inputs, **named)
            self.passes, self.seconds = self.passes + 1, self.seconds + time.perf_counter() - begun
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


def main() -> None:
    asked = options(__doc__.splitlines()[0], length=256, steps=64, rounds=1)
    model, tokenizer = gpt2()
    trunk = Trunk(model)
    spent: dict[str, list[tuple[int, float]]] = {}

    def timed(name: str, do) -> None:
        trunk.passes, trunk.seconds = 0, 0.0
        do()
        spent.setdefault(name, []).append((trunk.passes, trunk.seconds))

    def ours(order: str):
        return generate(model, tokenizer, length=asked.length - 1, steps=asked.steps, order=order, top_p=0.9)

    ways = {"plain": lambda: timed("plain", lambda: plain(model, asked.length - 1, asked.steps, 0.9))}
    ways |= {order: (lambda order=order: timed(order, lambda: ours(order))) for order in ORDERS}
    seconds = in_turns(ways, asked.rounds)

    print(f"{machine()}\nGPT-2 124M, length {asked.length}, {asked.steps} steps, top-p 0.9, one text\n")
    print("| order | forward passes | seconds | outside the trunk | share |\n|---|---|---|---|---|")
    inside = {name: statistics.median(trunk for _, trunk in turns[1:]) for name, turns in spent.items()}
    for name, whole in seconds.items():
        outside = whole - inside[name]
        print(f"| {name} | {spent[name][0][0]} | {whole:.1f} | {outside:.1f} | {outside / whole:.0%} |")
    figures = {
        "trunk_share": inside["random"] / seconds["random"],
        "speedup_vs_plain": seconds["plain"] / seconds["random"],
    }
    finish(figures, asked.json)


if __name__ == "__main__":
    main()
