"""How one training step of ours grows: tokens per second and peak memory against L, V, B and accumulation.

Each point is a fresh process on the laptop base's shape, one number changed at a time, and all points are visited in
turn, `--rounds` times. `--picture FILE` draws them, beside the tokens per second that the best rate of operations seen
in the run would give.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from tests.benchmarks import finish, machine
from tests.benchmarks.train_step import alone

USUAL = dict(batch=8, length=256, vocab=8_193, accumulate=1)
SWEEPS = {
    "length": (128, 256, 512, 1024, 2048),
    "vocab": (4_096, 8_192, 16_384, 32_768, 65_536, 131_072),
    "batch": (1, 2, 4, 8, 16, 32),
    "accumulate": (1, 2, 4, 8),
}
NAMES = {"length": "length L", "vocab": "vocabulary V", "batch": "batch B", "accumulate": "accumulation steps"}


def sweep(rounds: int) -> dict[str, list[dict]]:
    """Seconds, GiB and operations of a step at each point: medians over rounds that visit all points in turn."""
    taken = {(name, value): [] for name, values in SWEEPS.items() for value in values}
    for _ in range(rounds):
        for (name, value), runs in taken.items():
            runs.append(alone("ours", "laptop", **USUAL | {name: value}, rounds=3))
    results = {name: [] for name in SWEEPS}
    for (name, value), runs in taken.items():
        asked = USUAL | {name: value}
        tokens = asked["batch"] * asked["length"] * asked["accumulate"]
        point = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        point |= {"value": value, "tokens_per_second": tokens / point["seconds"], "per_token": point["work"] / tokens}
        results[name].append(point)
    return results


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Two rows of panels: speed beside the speed of the best operations per second, and memory."""
    figure, axes = plt.subplots(2, len(results), figsize=(12, 5.2), sharey="row", layout="constrained")
    best = max(point["work"] / point["seconds"] for points in results.values() for point in points)
    for column, (name, points) in enumerate(results.items()):
        x = [point["value"] for point in points]
        speed, memory = axes[:, column]
        speed.plot(x, [point["tokens_per_second"] for point in points], "o-", label="measured")
        ideal = [best / point["per_token"] for point in points]
        speed.plot(x, ideal, ":", color="gray", label="at the best rate of operations seen here")
        memory.plot(x, [point["gib"] for point in points], "o-", color="C1")
        for axis in (speed, memory):
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{v:,}" if v < 4096 else f"{v // 1024}k" for v in x])
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
        memory.set_xlabel(NAMES[name])
    axes[0, 0].set_ylabel("tokens per second")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    print(f"{machine()}\nthe laptop base's shape, {USUAL} but for the number named\n")
    print("| | | tokens/s | GFLOP/s | peak GiB |\n|---|---|---|---|---|")
    results = sweep(asked.rounds)
    for name, points in results.items():
        for point in points:
            rate = point["work"] / point["seconds"] / 1e9
            speed = f"{point['tokens_per_second']:,.0f} | {rate:.0f}"
            print(f"| {NAMES[name]} | {point['value']:,} | {speed} | {point['gib']:.2f} |")
    if asked.picture:
        draw(results, asked.picture)
    speeds = {name: [point["tokens_per_second"] for point in points] for name, points in results.items()}
    finish({f"last_over_first_{name}": speed[-1] / speed[0] for name, speed in speeds.items()}, asked.json)


if __name__ == "__main__":
    main()
