"""Records the runs that notebook 2 is too short for: `python -m dalm_utils.scripts.ablation`.

Each group of runs is one call of `train_arms`: the same batches, times, masks and annealing draws in every arm.
Interrupted, the same command continues; what is done stands in notebooks/recorded/shift-<profile>.json, and is not
made again unless that file is deleted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backbone import load_base, load_diffusion
from ..checkpoint import write_file
from ..config import PROJECT, RunConfig, load_config
from ..corpus import Blocks, load_corpus
from ..evaluation import ar_nll, mean_and_error, nelbo
from ..history import History
from ..machine import describe
from ..sampling import generate
from ..training import train_arms

RECORDED = PROJECT / "notebooks" / "recorded"
PAIR = ("shift", "no-shift")
SQUARE = ("shift", "shift-sudden", "no-shift", "no-shift-sudden", "scratch")
PLANS: dict[str, list[tuple]] = {  # groups of runs: (arms, optimizer steps, seed)
    "laptop": [
        *((SQUARE, 360, seed) for seed in (0, 1, 2)),
        *((PAIR, steps, seed) for steps in (90, 180) for seed in (0, 1, 2)),
        (PAIR, 720, 0),
    ],
    "real": [(PAIR, None, 0)],  # None: the run of notebook 2 itself, made here or there
}
TEST_BLOCKS, TEST_SAMPLES = 96, 8
PROMPT = dict(prompt="Return the", length=40, steps=40, top_p=0.9, seed=4)  # what each arm is asked to go on with


def arms(config: RunConfig, names: tuple[str, ...] = PAIR) -> dict[str, RunConfig]:
    """The arms of an ablation of one run: with and without the shift, with and without annealing, from scratch."""
    changes: dict[str, dict] = {
        "shift": dict(shift=True),
        "shift-sudden": dict(shift=True, anneal_steps=1),
        "no-shift": dict(shift=False),
        "no-shift-sudden": dict(shift=False, anneal_steps=1),
        "scratch": dict(shift=True, scratch=True),
    }
    return {name: config.replace(**changes[name]) for name in names}


def budget(config: RunConfig, steps: int | None, seed: int) -> RunConfig:
    """The same recipe for one epoch on a subset of another size: warm-up, annealing, evaluation in proportion."""
    if steps is None:
        return config.replace(seed=seed)
    return config.replace(
        name=f"{config.name}-{steps}-{seed}", seed=seed, train_blocks=steps * config.batch, steps=None, accumulate=1,
        anneal_steps=steps // 3, warmup_steps=steps // 12, eval_every=steps // 6, save_every=steps,
    )  # fmt: skip


def record(config: RunConfig, plan: list[tuple], path: Path) -> None:
    """Run what is left of a plan (groups of arms, steps, seed), and add each group to the file when it is done.

    Raises:
        SystemExit: the user stopped it; called again it continues.
    """
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    about = None
    for names, steps, seed in plan:
        group = budget(config, steps, seed)
        assert group.train_blocks is not None  # as every profile of notebook 2 says
        steps = group.train_blocks // group.batch
        if any((run["steps"], run["seed"]) == (steps, seed) for run in done):
            continue
        configs = arms(group, names)
        histories = train_arms(configs)
        if any((history.last("step") or 0) < steps for history in histories.values()):
            raise SystemExit("stopped; the same command continues")
        done += [
            {"arm": name, "steps": steps, "seed": seed, **_result(history, configs[name], name)}
            for name, history in histories.items()
        ]
        about = about or _about(config)
        path.parent.mkdir(exist_ok=True)
        write_file(path, _as_json(about | {"runs": done}))


def _as_json(content: dict) -> str:
    """A line for each short list, so that the file can be read and compared."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n[\s\d.,-]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _about(config: RunConfig) -> dict:
    base, tokenizer = load_base(config.base, hub=config.hub, device=config.device)
    ar = ar_nll(base, tokenizer, _blocks(config, tokenizer), precision=config.precision)
    return {
        "command": f"python -m dalm_utils.scripts.ablation {config.name.removeprefix('shift-')}",
        "date": str(datetime.date.today()),
        "machine": describe(),
        "test": f"{TEST_BLOCKS} test blocks, {TEST_SAMPLES} masks each; the NELBO of each block, nats per token",
        "ar_nll": round(ar.mean, 4),
        "config": {key: value for key, value in vars(config).items() if key != "runs"},
    }


def _result(history: History, config: RunConfig, arm: str) -> dict:
    """What is kept of one run: its curves, and the score of each test block, so that any two can be paired."""
    model, tokenizer = load_diffusion(config.folder.with_name(f"{config.name}-{arm}") / "best", device=config.device)
    test = _blocks(config, tokenizer)
    score = nelbo(model, tokenizer, test, num_samples=TEST_SAMPLES, precision=config.precision)
    curves = {key: history.series(key, "tokens") for key in ("loss", "nelbo", "nelbo_stderr")}
    return {
        "tokens": history.last("tokens"),
        "tokens_per_second": history.last("tokens_per_second"),
        "nelbo": round(score.mean, 4),
        "sample": generate(model, tokenizer, **PROMPT, precision=config.precision).text[0],
        "documents": test.documents.tolist(),
        "per_block": [round(float(value), 4) for value in score.per_block],
        "curves": {key: [x, [round(value, 4) for value in y]] for key, (x, y) in curves.items()},
    }


def _blocks(config: RunConfig, tokenizer) -> Blocks:
    return load_corpus(config.text, tokenizer, field=config.field).blocks("test", config.length, TEST_BLOCKS)


# ------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Recorded:
    """A recorded ablation: what it is about, and its runs."""

    about: dict
    runs: list[dict]

    def scores(self, arm: str, steps: int) -> list[np.ndarray]:
        """The NELBO of each test block, `[N]` in nats per token, for each seed in order."""
        chosen = [run for run in self.runs if (run["arm"], run["steps"]) == (arm, steps)]
        return [np.array(run["per_block"]) for run in sorted(chosen, key=lambda run: run["seed"])]

    def effects(self, worse: str, better: str, steps: int) -> list[float]:
        """NELBO of `worse` minus that of `better`, one paired difference for each seed."""
        pairs = zip(self.scores(worse, steps), self.scores(better, steps), strict=True)
        return [float((one - other).mean()) for one, other in pairs]

    def effect(self, worse: str, better: str, steps: int) -> tuple[float, float]:
        """The mean of `effects`, and its standard error: over seeds, or over the test where there is one seed only.

        The latter counts documents, or blocks where their documents were not recorded.
        """
        values = self.effects(worse, better, steps)
        if len(values) > 1:
            return mean_and_error(np.array(values))
        documents = next(run.get("documents") for run in self.runs if (run["arm"], run["steps"]) == (better, steps))
        difference = self.scores(worse, steps)[0] - self.scores(better, steps)[0]
        return mean_and_error(difference, None if documents is None else np.array(documents))

    def history(self, arm: str) -> History:
        """The curves of an arm's first run, from before its first step on."""
        run = next(run for run in self.runs if run["arm"] == arm)
        records: dict[int, dict] = {}
        for key, (tokens, values) in run["curves"].items():
            for seen, value in zip(tokens, values, strict=True):
                records.setdefault(seen, {})[key] = value
        steps = {seen: round(seen * run["steps"] / run["tokens"]) for seen in records}
        return History(records=[{"step": steps[seen], "tokens": seen} | records[seen] for seen in sorted(records)])

    def tokens(self, steps: int) -> int:
        """Tokens of training in a run of so many steps."""
        return next(run["tokens"] for run in self.runs if run["steps"] == steps)


def load(name: str) -> Recorded:
    """The record of a run's ablation, for instance "shift-laptop"."""
    content = json.loads((RECORDED / f"{name}.json").read_text())
    return Recorded({key: value for key, value in content.items() if key != "runs"}, content["runs"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="laptop", choices=sorted(PLANS))
    profile = parser.parse_args().profile
    path = RECORDED / f"shift-{profile}.json"
    record(load_config("shift", profile, name=path.stem), PLANS[profile], path)
    print(f"every run stands in {path.relative_to(PROJECT)}; to make them again, delete it and its runs first")
