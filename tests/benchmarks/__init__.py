"""Benchmarks, each run as `python -m tests.benchmarks.NAME`; results with their machines in RESULTS.md.

A figure is a ratio of two measurements of one run on one machine, taken in turns (`tokenizing`: one after the other);
`--json` makes the last line one JSON object of the headline ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable

import torch

from dalm_utils.machine import describe


def options(description: str, **numbers: int) -> argparse.Namespace:
    """The command line of a benchmark: `--json`, and some numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()


def machine() -> str:
    """When and on what this run is measured."""
    return f"{datetime.date.today()}, {describe()}"


def settle() -> None:
    """Wait until a GPU, where there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, all measured once in every round; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, do in ways.items():
            settle()
            begun = time.perf_counter()
            do()
            settle()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def finish(figures: dict[str, float], as_json: bool) -> None:
    """Print the headline ratios."""
    print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    if as_json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
