"""Records the runs that notebook 2 is too short for: `python -m dalm_utils.ablation`.

Each group of runs is one call of `train_arms`: the same batches, times, masks and annealing draws in every arm.
Interrupted, the same command continues; what is done stands in notebooks/recorded/<profile>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path

import torch

from .backbone import load_diffusion
from .checkpoint import History
from .config import PROJECT, RunConfig, load_config
from .corpus import load_corpus
from .evaluation import nelbo
from .training import train_arms

RECORDED = PROJECT / "notebooks" / "recorded"
PAIR = ("shift", "no-shift")
SQUARE = ("shift", "shift-sudden", "no-shift", "no-shift-sudden", "scratch")
PLANS = {  # groups of runs: (arms, optimizer steps, seed)
    "laptop": [
        *((SQUARE, 120, seed) for seed in (0, 1, 2)),
        *((PAIR, steps, 0) for steps in (30, 60, 240, 480)),
        *((PAIR, steps, seed) for seed in (1, 2) for steps in (30, 60, 240)),
    ],
}
TEST_BLOCKS, TEST_SAMPLES = 96, 8


def arms(config: RunConfig, names: tuple[str, ...] = PAIR) -> dict[str, RunConfig]:
    """The arms of an ablation of one run: with and without the shift, with and without annealing, from scratch."""
    changes = {
        "shift": {},
        "shift-sudden": dict(anneal_steps=1),
        "no-shift": dict(shift=False),
        "no-shift-sudden": dict(shift=False, anneal_steps=1),
        "scratch": dict(scratch=True),
    }
    return {name: config.replace(**changes[name]) for name in names}


def budget(config: RunConfig, steps: int, seed: int) -> RunConfig:
    """The same recipe for one epoch on a subset of another size: warm-up, annealing, evaluation in proportion."""
    return config.replace(
        name=f"{config.name}-{steps}-{seed}", seed=seed, train_blocks=steps * config.batch, anneal_steps=steps // 3,
        warmup_steps=steps // 12, eval_every=steps // 6, save_every=steps,
    )  # fmt: skip


def record(profile: str) -> Path:
    """Run what is left of a profile's plan; returns the file with the results."""
    config = load_config("shift", profile)
    path = RECORDED / f"{config.name}.json"
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    for names, steps, seed in PLANS[profile]:
        if any((run["steps"], run["seed"]) == (steps, seed) for run in done):
            continue
        configs = arms(budget(config, steps, seed), names)
        histories = train_arms(configs)
        if any(history.last("step") < steps for history in histories.values()):
            raise SystemExit("stopped; the same command continues")
        done += [
            {"arm": name, "steps": steps, "seed": seed, **_result(history, configs[name], name)}
            for name, history in histories.items()
        ]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(_about(config, profile) | {"runs": done}, indent=1) + "\n")
    return path


def _about(config: RunConfig, profile: str) -> dict:
    machine = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.cpu.get_capabilities()['cpu_name']}"
    return {
        "command": f"python -m dalm_utils.ablation {profile}",
        "date": str(datetime.date.today()),
        "machine": f"{machine}, torch {torch.__version__}",
        "test": f"{TEST_BLOCKS} test blocks, {TEST_SAMPLES} masks each; the NELBO of each block, nats per token",
        "config": {key: value for key, value in vars(config).items() if key != "runs"},
    }


def _result(history: History, config: RunConfig, arm: str) -> dict:
    """What is kept of one run: its curves, and the score of each test block, so that any two can be paired."""
    model, tokenizer = load_diffusion(config.folder.with_name(f"{config.name}-{arm}") / "best", device=config.device)
    blocks = load_corpus(config.text, tokenizer, field=config.field).blocks("test", config.length, TEST_BLOCKS)
    score = nelbo(model, tokenizer, blocks, num_samples=TEST_SAMPLES)
    curves = {key: history.series(key, "tokens") for key in ("loss", "nelbo")}
    return {
        "tokens": history.last("tokens"),
        "tokens_per_second": history.last("tokens_per_second"),
        "nelbo": round(score.mean, 4),
        "per_block": [round(float(value), 4) for value in score.per_block],
        "curves": {key: [x, [round(value, 4) for value in y]] for key, (x, y) in curves.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="laptop", choices=sorted(PLANS))
    print("recorded in", record(parser.parse_args().profile).relative_to(PROJECT))
