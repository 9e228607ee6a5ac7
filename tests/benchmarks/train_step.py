"""One training step of ours beside plain loops: tokens per second, peak memory, and the fraction of the machine used.

    ours      `TrainStep`, as a run takes it: masked positions only, fused GELU and AdamW, no dropout; on a GPU replayed
              as a CUDA graph
    eager     the same, one kernel at a time (on a GPU only; elsewhere it is what ours does)
    plain     every position's logits, a dense mask for each sequence, the same precision, no dropout
    released  plain with dropout 0.1, on a CPU in float32, as the authors' release would run on this machine
    ar        ordinary AR finetuning through transformers' own loss, in our precision
    lora      ours, with adapters of rank 8 (by `--only lora` alone)

Each way runs in processes of its own, in turns. Where there is a GPU, the GPU is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dalm_utils import RunConfig, annealed_mask, corrupt, sample_times
from dalm_utils.backbone import fuse_gelu
from dalm_utils.corpus import Blocks
from dalm_utils.lora import Adapter
from dalm_utils.machine import DTYPES, autocast, keep_memory, pick_device, pick_precision
from dalm_utils.processes import make_accelerator
from dalm_utils.step import TrainStep
from dalm_utils.tasks import MaskedDiffusion
from tests.benchmarks import finish, in_turns, machine

DEVICE = pick_device()
STEPS = {"cpu": 1, "cuda": 20}  # timed together: a GPU works on one while the next is prepared
WAYS = ("ours", "eager", "plain", "released", "ar") if DEVICE.type == "cuda" else ("ours", "plain", "released", "ar")
WARM_UP = 8  # steps before the clock starts: kernels are loaded, and a CUDA graph is captured


def make(size: str, dropout: float, positions: int, vocab: int | None = None) -> PreTrainedModel:
    """A model of this size with random weights, as transformers makes it; the last token is [MASK]."""
    torch.manual_seed(0)
    if size == "smollm2":
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        config = LlamaConfig(
            vocab_size=vocab or 49_153,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            max_position_embeddings=positions,
            attention_dropout=dropout,  # the only one that Llama has
            **shape,
        )
        model = LlamaForCausalLM(config)
    else:
        shape = {
            "laptop": dict(vocab_size=vocab or 8_193, n_layer=4, n_embd=288, n_head=3),
            "gpt2": dict(vocab_size=vocab or 50_258),
        }[size]
        rates = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        model = GPT2LMHeadModel(GPT2Config(n_positions=positions, bos_token_id=0, eos_token_id=0, **shape, **rates))
    model.config.mask_token_id, model.config.shift = model.config.vocab_size - 1, True
    return model.train()


class RandomTokens(MaskedDiffusion):
    """The task of a run, on random tokens and under a mask that stays half open."""

    def load(self) -> None:
        tokens = np.random.default_rng(0).integers(1, self.model.config.mask_token_id, size=64 * self.config.length)
        self.train = Blocks(tokens, self.config.length, begin=0)

    def ratio(self, step: int) -> float:
        return 0.5


def stepper(
    way: str,
    size: str,
    batch: int,
    length: int,
    vocab: int | None = None,
    accumulate: int = 1,
    precision: str = "auto",
) -> Callable[[], None]:
    """A function that takes one whole training step, including the noise."""
    model = make(size, 0.1 if way == "released" else 0.0, length, vocab)
    if way == "released" and DEVICE.type == "cpu":
        precision = "fp32"
    precision = pick_precision(precision, DEVICE)
    if way == "lora":
        Adapter(model, rank=8)
    if way in ("ours", "eager", "lora"):
        step = our_step(model, batch, length, accumulate, precision, cuda_graph=way != "eager")
    else:
        step = plain_step(model.to(DEVICE), way, batch, length, accumulate, precision)
    step.model = model
    step.work = accumulate * work(model, batch, length)
    return step


def our_step(model, batch: int, length: int, accumulate: int, precision: str, cuda_graph: bool) -> Callable[[], None]:
    """`TrainStep` on a model as `load_base` returns it."""
    if DEVICE.type == "cpu":
        keep_memory()
    config = RunConfig(
        base="none", batch=batch, length=length, accumulate=accumulate, device=DEVICE.type, precision=precision,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    task = RandomTokens(fuse_gelu(model), None, config)
    train_step, steps = TrainStep(task, config, make_accelerator(config), precision, None), itertools.count()
    return lambda: train_step(next(steps), 1e-5, 0.0)


def plain_step(model, way: str, batch: int, length: int, accumulate: int, precision: str) -> Callable[[], None]:
    """A loop as it is usually written."""
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    mask_id, dtype = model.config.mask_token_id, DTYPES[precision]
    tokens = torch.randint(mask_id, (batch, length)).to(DEVICE)
    model.config.is_causal = way == "ar"

    def plain() -> torch.Tensor:
        times = sample_times(batch, method="uniform", device=DEVICE)
        noised, masked = corrupt(tokens, times, mask_id)
        mask = annealed_mask(length, 0.5, device=DEVICE).expand(batch, 1, length, length).contiguous()
        positions = torch.arange(length, device=DEVICE)[None]
        logits = model(noised, attention_mask=mask.to(dtype), position_ids=positions, use_cache=False).logits
        nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (nll.view(batch, -1) * masked[:, 1:] / times[:, None]).sum() / masked[:, 1:].numel()

    def step() -> None:
        for _ in range(accumulate):
            with autocast(DEVICE, precision):
                loss = model(tokens, labels=tokens, use_cache=False).loss if way == "ar" else plain()
            scaler.scale(loss / accumulate).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def work(model: PreTrainedModel, batch: int, length: int) -> float:
    """Multiplications and additions of our step, forward and backward; half of the positions meet the head."""
    head = model.get_output_embeddings()
    matrices = (m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head)
    inside = sum(matrix.weight.numel() for matrix in matrices)
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * length
    return batch * length * (6 * inside + attention + 0.5 * 6 * head.weight.numel())


def gemm_rate(precision: str, rounds: int) -> float:
    """Operations per second of a large matrix product in our precision."""
    dtype, size = DTYPES[pick_precision(precision, DEVICE)], 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / in_turns({"gemm": lambda: a @ b}, rounds)["gemm"]


def peak() -> float:
    """GiB: the most that was allocated on the GPU, or that this process ever held."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Of one step, in this process: seconds, seconds in which the host enqueues it, kernel launches, and peak GiB."""
    for _ in range(WARM_UP if DEVICE.type == "cuda" else 0):
        step()
    together = STEPS[DEVICE.type]
    seconds = in_turns({"steps": lambda: [step() for _ in range(together)]}, rounds)["steps"] / together
    if DEVICE.type != "cuda":
        return {"seconds": seconds, "host": seconds, "launches": 0, "gib": peak()}
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    host = time.perf_counter() - begun
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    calls = (event for event in profile.events() if event.name.startswith(("cudaLaunchKernel", "cudaGraphLaunch")))
    return {"seconds": seconds, "host": host, "launches": len(list(calls)), "gib": peak()}


def alone(way: str, size: str, **numbers: int | str) -> dict[str, float]:
    """A fresh process that takes a few steps: median seconds of one, and its peak memory in GiB."""
    command = [sys.executable, "-m", "tests.benchmarks.train_step", "--only", way, "--sizes", size]
    command += [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--sizes", nargs="+", default=["laptop", "gpt2"], choices=("laptop", "gpt2", "smollm2"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, help="another vocabulary than the size has")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument(
        "--only", choices=(*WAYS, "lora"), help="one way alone, in this process: its seconds and peak memory"
    )
    asked = parser.parse_args()
    if asked.only:
        numbers = (asked.batch, asked.length, asked.vocab, asked.accumulate, asked.precision)
        step = stepper(asked.only, asked.sizes[0], *numbers)
        measured = measure(step, asked.rounds)  # first, since it reads the peak of the memory
        gemm = gemm_rate(asked.precision, 7 * asked.rounds)  # a product takes a fraction of a step
        print(json.dumps(measured | {"work": step.work, "gemm": gemm}))
        return

    print(machine())
    figures = {}
    for size in asked.sizes:
        shape = dict(batch=asked.batch, length=asked.length, accumulate=asked.accumulate)
        shape |= dict(precision=asked.precision, rounds=2)
        shape |= {} if asked.vocab is None else dict(vocab=asked.vocab)
        taken = {way: [] for way in WAYS}
        for _ in range(asked.rounds):
            for way in WAYS:
                taken[way].append(alone(way, size, **shape))
        seconds = {way: statistics.median(one["seconds"] for one in runs) for way, runs in taken.items()}
        memory = {way: max(one["gib"] for one in runs) for way, runs in taken.items()}
        rate = statistics.median(one["gemm"] for runs in taken.values() for one in runs)
        done = taken["ours"][0]["work"] / seconds["ours"]
        precision = pick_precision(asked.precision, DEVICE)
        print(f"\n{size}, batch {asked.batch}, length {asked.length}, {precision}, median of {asked.rounds} rounds\n")
        print("| step | tokens/s | peak GiB |\n|---|---|---|")
        for way in WAYS:
            print(f"| {way} | {asked.accumulate * asked.batch * asked.length / seconds[way]:.0f} | {memory[way]:.1f} |")
        print(f"\na large matrix product runs at {rate / 1e9:.0f} GFLOP/s, our step at {done / 1e9:.0f}")
        suffix = {"gpt2": "", "laptop": "_laptop"}.get(size, f"_{size}")
        figures |= {
            f"speedup_vs_plain{suffix}": seconds["plain"] / seconds["ours"],
            f"speedup_vs_released{suffix}": seconds["released"] / seconds["ours"],
            f"speedup_vs_ar{suffix}": seconds["ar"] / seconds["ours"],
            f"gemm_share{suffix}": done / rate,
            f"memory_saving{suffix}": memory["plain"] / memory["ours"],
        }
    finish(figures, asked.json)


if __name__ == "__main__":
    main()
