"""What a first run costs before its first step: imports, the docstring corpus from nothing to blocks, a base.

Each figure is the median of fresh processes, so that nothing is warm but the disk.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile

from tests.benchmarks import finish, machine, options

CLOCK = "import time; begun = time.perf_counter(); "
TELL = "; print(time.perf_counter() - begun)"
LOAD = "from pathlib import Path; from dalm_utils import load_base, load_corpus; "
TORCH = CLOCK + "import torch" + TELL
MODULE = "import torch; " + CLOCK + "import dalm_utils" + TELL
BASE = LOAD + CLOCK + "load_base('tiny-gpt2')" + TELL
CORPUS = LOAD + "tokenizer = load_base('tiny-gpt2')[1]; " + CLOCK + "load_corpus('docstrings', tokenizer{})" + TELL


def seconds(code: str) -> float:
    """What a fresh process that runs this code prints."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    asked = options(__doc__.splitlines()[0], rounds=3)
    fresh = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            fresh.append(seconds(CORPUS.format(f", cache=Path({folder!r})")))
    ways = {"torch": TORCH, "dalm_utils": MODULE, "base": BASE, "corpus_again": CORPUS.format("")}
    seconds(ways["corpus_again"])  # so that it is there
    taken = {name: statistics.median(seconds(code) for _ in range(asked.rounds)) for name, code in ways.items()}
    taken["corpus"] = statistics.median(fresh)

    print(f"{machine()}, median of {asked.rounds}\n\n| | seconds |\n|---|---|")
    for name, what in {
        "torch": "import torch",
        "dalm_utils": "import dalm_utils, after torch",
        "base": "load_base('tiny-gpt2')",
        "corpus": "the docstring corpus, from nothing to blocks",
        "corpus_again": "the same, prepared before",
    }.items():
        print(f"| {what} | {taken[name]:.2f} |")
    finish({f"{name}_seconds": taken[name] for name in ("dalm_utils", "base", "corpus", "corpus_again")}, asked.json)


if __name__ == "__main__":
    main()
