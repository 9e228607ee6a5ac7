"""What a token teaches: trials of recipes on the laptop base, `python -m tests.benchmarks.recipe --help`.

Each trial is one line of words: `released` for the recipe of arXiv 2410.17891's code, then `name=value`, where a name
is a field of `RunConfig`, a share of the run (`anneal`, `warmup`), or how [MASK] begins (`begin`). What a line does not
name is as in `PLAIN`. All trials start from the same base, see the same text in the same order, and are scored by the
NELBO of the same held-out blocks under the same masks. One core each, so that several can run side by side; what is
done is not done again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import dalm_utils as dalm
from dalm_utils.config import PROJECT, load_config, parse_field

RESULTS = PROJECT / "notebooks" / "recorded" / "recipe.jsonl"
PLAIN = dict(batch=16, learning_rate=1e-3, distill=0.0, anneal=1 / 3, warmup=1 / 12, begin="mean")
RELEASED = dict(times="uniform", normalize="masked", dropout=0.1, anneal=0.01)


def parse(recipe: str) -> dict:
    """The settings that a recipe names, and those of `PLAIN` for the rest."""
    settings = dict(PLAIN)
    for word in recipe.split():
        name, _, value = word.partition("=")
        name = {"lr": "learning_rate"}.get(name, name)
        if name == "released":
            settings |= RELEASED
        elif name in ("anneal", "warmup"):
            settings[name] = float(value)
        else:
            settings[name] = value if name == "begin" else parse_field(name, value)
    return settings


@torch.no_grad()
def begin(model, tokenizer, kind: str) -> None:
    """Let [MASK] start as the mean of all embeddings (`mean`), the begin token (`bos`), or any other token."""
    table, mask_id = model.get_input_embeddings().weight, tokenizer.mask_token_id
    like = tokenizer.bos_token_id if kind == "bos" else tokenizer.convert_tokens_to_ids(kind)
    table[mask_id] = table[: len(tokenizer) - 1].mean(0) if kind == "mean" else table[like]


def trial(recipe: str, profile: str, tokens: float, seed: int) -> dict:
    """Adapt the base of a profile by one recipe; its figures."""
    settings = parse(recipe)
    anneal, warmup, kind = (settings.pop(name) for name in ("anneal", "warmup", "begin"))
    base = load_config("gpt2", profile, device="cpu", precision="fp32", seed=seed, sample_every=0, **settings)
    steps = round(tokens / (base.batch * base.accumulate * base.length))
    with tempfile.TemporaryDirectory() as folder:
        config = base.replace(
            name="trial", runs=folder, steps=steps, anneal_steps=max(1, round(anneal * steps)),
            warmup_steps=round(warmup * steps), log_every=max(1, steps // 10), eval_every=steps, eval_blocks=1,
            save_every=steps,
        )  # fmt: skip
        model, tokenizer = dalm.build(config)
        begin(model, tokenizer, kind)
        history = dalm.train(model, tokenizer, config)
    if history.last("step") < steps:
        raise SystemExit("stopped: this trial counts for nothing, and starts again next time")
    held_out = dalm.load_corpus(config.text, tokenizer).blocks("validation", config.length, limit=96)
    score = dalm.nelbo(model, tokenizer, held_out, num_samples=4, precision="fp32")
    return {
        "tokens": history.last("tokens"),
        "seconds": round(history.last("seconds"), 1),
        "nelbo": round(score.mean, 4),
        "stderr": round(score.stderr, 4),
        "per_block": [round(value, 3) for value in score.per_block.tolist()],
    }


def table(lines: list[str]) -> str:
    """The results in Markdown: a row for each recipe and number of tokens, the best first; a mean over its seeds."""
    groups: dict[tuple, list[dict]] = {}
    for result in map(json.loads, lines):
        groups.setdefault((result["profile"], result["asked"], result["recipe"]), []).append(result)
    rows = ["| profile | million tokens | recipe | NELBO of each seed | seconds |", "|---|---|---|---|---|"]
    mean = {key: sum(result["nelbo"] for result in group) / len(group) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (*key[:2], mean[key])):
        scores = ", ".join(f"{result['nelbo']:.3f}" for result in groups[key])
        seconds = sum(result["seconds"] for result in groups[key]) / len(groups[key])
        rows.append(f"| {' | '.join(map(str, key))} | {scores} | {seconds:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help='none: show the results; for instance "released lr=1e-3"')
    parser.add_argument("--profile", default="laptop", help="laptop or real: the base, its text and its length")
    parser.add_argument("--tokens", type=float, default=0.49, help="millions of training tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.recipes:
        print(table(options.results.read_text().splitlines()))
    for recipe in options.recipes:
        for seed in options.seeds:
            asked = {"profile": options.profile, "recipe": recipe, "seed": seed, "asked": options.tokens}
            lines = options.results.read_text().splitlines() if options.results.exists() else []
            if not any(asked.items() <= json.loads(line).items() for line in lines):
                result = trial(recipe, options.profile, options.tokens * 1e6, seed)
                with open(options.results, "a") as file:
                    file.write(json.dumps(asked | result, ensure_ascii=False) + "\n")
                print(recipe, seed, result["nelbo"], result["seconds"], flush=True)
