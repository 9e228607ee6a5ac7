"""What the profile `full` costs, computed and not measured: operations and bytes of a step, and the time that follows;
and what memory a model of 7 billion parameters takes with and without LoRA.

    time = operations / (share x peak), where share is the part of the GPU's peak that training is assumed to reach

The operations are those that `train_step` divides by its seconds; bytes count what AdamW reads and writes for each
parameter, and the activations of each layer once for every time they are written or read (about 150 numbers of 2 bytes
for each token and unit of width). Bytes say whether the memory would be the limit; the time does not add them.

Memory is that of weights, gradients and AdamW's two moments, in FP32 as a run keeps them: 16 bytes for each parameter
that is trained, 4 for each that is not. Activations come on top.
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from dalm_utils import load_config
from dalm_utils.lora import Adapter
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


def memory(model: PreTrainedModel, rank: int) -> tuple[int, float, float]:
    """Trained parameters, and GiB for the trained and the frozen ones, with adapters of a rank; 0: without any."""
    whole = model.num_parameters()
    trained = sum(weight.numel() for weight in Adapter(model, rank).trained().values()) if rank else whole
    frozen = whole if rank else 0
    return trained, 16 * trained / 2**30, 4 * frozen / 2**30


def large(name: str) -> PreTrainedModel:
    """GPT-2 (124M), or a model of the shape of Llama 2 (7B), as diffusion models, without memory for the weights."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50_258)) if name == "GPT-2 124M" else LlamaForCausalLM(
            LlamaConfig(vocab_size=32_001)
        )  # fmt: skip
    model.config.mask_token_id = model.config.vocab_size - 1
    return model


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
    print("\n| model | LoRA | trained parameters | GiB for the trained | GiB for the frozen |\n|---|---|---|---|---|")
    for name in ("GPT-2 124M", "Llama 2 7B"):
        for rank in (0, 8):
            trained, own, frozen = memory(large(name), rank)
            print(f"| {name} | {f'rank {rank}' if rank else 'no'} | {trained:,} | {own:.2f} | {frozen:.2f} |")
    finish({f"minutes_{name}": value for name, value in minutes.items()}, asked.json)


if __name__ == "__main__":
    main()
