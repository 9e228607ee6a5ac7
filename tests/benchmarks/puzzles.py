"""Latin squares: a diffusion model, which fills them in the order of certainty, against an AR model, which cannot.

tiny-diffugpt and tiny-gpt2, from which it was made, are finetuned on the same pairs (`dalm_utils.scripts.puzzles`), in
the same order, for the same number of steps, and complete the same test squares greedily. A square counts as solved if
it is a Latin square that keeps its givens. tiny-diffugpt has read more text before (checkpoints/README.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import dalm_utils as dalm
from dalm_utils.config import RunConfig, load_config
from dalm_utils.evaluation import standard_error
from dalm_utils.pairs import Pairs
from dalm_utils.scripts.puzzles import is_solved, puzzles
from tests.benchmarks import finish, machine

ARMS = {"diffusion": ("finetune", "tiny-diffugpt"), "ar": ("finetune-ar", "tiny-gpt2")}
ORDERS = {"diffusion": ("confidence", "first_hitting"), "ar": ("left to right",)}
LENGTH = 44  # tokens of a square, its completion, and their begin and end


def settings(folder: Path, steps: int, **changes) -> RunConfig:
    """What the arms have in common."""
    common = dict(
        runs=str(folder), text=str(folder / "squares.jsonl"), length=LENGTH, batch=32, steps=steps,
        learning_rate=1e-3, warmup_steps=steps // 20, eval_every=steps, eval_blocks=64, save_every=steps,
        sample_every=0, device="cpu", precision="fp32",
    )  # fmt: skip
    return load_config("gpt2", "laptop", **{**common, **changes})


def solved(model, tokenizer, pairs: Pairs, order: str) -> np.ndarray:
    """`[N]` of 0 and 1: which squares a model completes."""
    options = dict(order=order) if order in ORDERS["diffusion"] else {}
    answers = dalm.answer_quality(model, tokenizer, pairs, precision="fp32", **options).texts
    prompts = (tokenizer.decode(pairs.prompt(i).tolist()) for i in range(len(pairs)))
    return np.array([float(is_solved(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)])


def measure(folder: Path, steps: int, count: int, givens: int, squares: int, **changes) -> dict[str, np.ndarray]:
    """Finetune both arms and let them complete test squares; by order, which ones they solve."""
    lines = (json.dumps(puzzle) for puzzle in puzzles(count, givens))
    (folder / "squares.jsonl").write_text("\n".join(lines))
    results = {}
    for arm, (objective, base) in ARMS.items():
        config = settings(folder, steps, name=arm, objective=objective, **{"base": base, **changes.get(arm, {})})
        model, tokenizer = dalm.build(config)
        history = dalm.train(model, tokenizer, config)
        score = history.last("nelbo") or history.last("nll")
        print(f"{arm}: {score:.3f} nats per answer token after {history.last('seconds'):.0f} s", flush=True)
        pairs = dalm.load_pairs(config.text, tokenizer).pairs("test", config.length, squares)
        for order in ORDERS[arm]:
            begun = time.perf_counter()
            results[order] = solved(model, tokenizer, pairs, order)
            print(f"| {arm} | {order} | {results[order].mean():.3f} +- {standard_error(results[order]):.3f} "
                  f"| {time.perf_counter() - begun:.0f} |", flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Latin squares by a diffusion and an AR model, finetuned alike.")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 32 squares, for each arm")
    parser.add_argument("--givens", type=int, default=8, help="cells that are shown, of 16")
    parser.add_argument("--count", type=int, default=20_000, help="squares, of which 2%% are for testing")
    parser.add_argument("--squares", type=int, default=256, help="test squares to complete")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    print(f"{machine()}; {asked.steps} steps, {asked.givens} givens\n")
    print("| arm | order | solved | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), asked.steps, asked.count, asked.givens, asked.squares)
    gain = results["confidence"] - results["left to right"]
    print(f"\nconfidence over left to right: {gain.mean():+.3f} +- {standard_error(gain):.3f}, paired")
    figures = {order.replace(" ", "_"): float(which.mean()) for order, which in results.items()}
    finish({**figures, "gain": float(gain.mean()), "gain_stderr": standard_error(gain)}, asked.json)


if __name__ == "__main__":
    main()
