"""What the profile `full` costs, computed and not measured: operations and bytes of a step, and the time that follows.

    time = operations / (share x peak), where share is the part of the GPU's peak that training is assumed to reach

The operations are those that `train_step` divides by its seconds; bytes count what AdamW reads and writes for each
parameter, and the activations of each layer once for every time they are written or read (about 150 numbers of 2 bytes
for each token and unit of width). Bytes say whether the memory would be the limit; the time does not add them.
"""

from __future__ import annotations

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from dalm_utils import load_config
from tests.benchmarks import finish
from tests.benchmarks.train_step import work

ARMS = {"gpt2": 2, "shift": 2, "galactica": 1}  # runs in each: adapted and from scratch, with and without shift


def shape(base: str) -> PreTrainedModel:
    """GPT-2 (124M) or Galactica-125M, without memory for the weights."""
    with torch.device("meta"):
        if base == "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=50_258))
        wide = dict(hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=12)
        return OPTForCausalLM(OPTConfig(vocab_size=50_001, num_attention_heads=12, **wide))


def cost(notebook: str) -> dict[str, float]:
    """Steps, and operations and bytes of one; operations of the whole run, its evaluations included."""
    config = load_config(notebook, "full")
    model = shape(config.base)
    rows = config.batch * config.accumulate
    steps = round(config.epochs * config.train_blocks / rows)
    step = work(model, rows, config.length)
    scored = steps / config.eval_every * config.eval_blocks * config.eval_samples  # forward only: a third
    width = model.config.num_hidden_layers * model.config.hidden_size
    moved = 32 * model.num_parameters() + 2 * 150 * rows * config.length * width
    whole = ARMS[notebook] * (steps * step + scored / rows * step / 3)
    return {"steps": ARMS[notebook] * steps, "step": step, "moved": moved, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="RTX 5090")
    parser.add_argument("--tflops", type=float, default=209.5, help="peak in FP16 with FP32 accumulation, dense")
    parser.add_argument("--terabytes", type=float, default=1.79, help="memory bandwidth per second")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that training reaches")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    rate = asked.share * asked.tflops * 1e12
    print(f"computed for one {asked.gpu}: {asked.tflops:g} TFLOP/s, {asked.terabytes:g} TB/s, at {asked.share:.0%}\n")
    print("| notebook | steps | TFLOP a step | GB a step | ms: operations | ms: bytes | whole, minutes |")
    print("|---|---|---|---|---|---|---|")
    minutes = {}
    for notebook in ARMS:
        c = cost(notebook)
        minutes[notebook] = c["whole"] / rate / 60
        bytes_ms = c["moved"] / asked.terabytes / 1e9
        print(
            f"| {notebook} | {c['steps']:,} | {c['step'] / 1e12:.2f} | {c['moved'] / 1e9:.1f} "
            f"| {c['step'] / rate * 1e3:.0f} | {bytes_ms:.0f} | {minutes[notebook]:.1f} |"
        )
    finish({f"minutes_{name}": value for name, value in minutes.items()}, asked.json)


if __name__ == "__main__":
    main()
