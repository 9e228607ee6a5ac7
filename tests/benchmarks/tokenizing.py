"""Preparing a large JSON Lines file: MB of text per second beside the tokenizer library's own ceiling, memory, a kill.

The file is made of the docstrings, repeated with other words put in so that no two documents are copies. A fresh
process prepares it and is killed half-way; a second one begins again and is measured. The ceiling is the library's
`encode_batch_fast` on all cores and on the same texts in memory, with nothing around it; the tokens of that pass
must be those that were written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from dalm_utils import load_base, load_corpus
from tests.benchmarks import finish, machine, options

MODEL = "tiny-gpt2"
SHARES = {"share": "seconds", "cpu_share": "cpu_seconds"}  # the second does not mind what else the machine does
EVERY = 25  # words between two that are put in
PREPARE = """
import json, sys, time
from dalm_utils import load_base, load_corpus
tokenizer, begun = load_base(sys.argv[1])[1], time.process_time()
facts = load_corpus(sys.argv[2], tokenizer, cache=sys.argv[3]).facts
print(json.dumps({**facts, "cpu_seconds": time.process_time() - begun}))
"""


def docstring_texts() -> list[str]:
    """The docstrings of the training split, put together again from their tokens."""
    tokenizer = load_base(MODEL)[1]
    corpus = load_corpus("docstrings", tokenizer)
    tokens = corpus.blocks("train", 2).tokens
    pieces = np.split(tokens, np.flatnonzero(tokens == corpus.begin) + 1)
    return [tokenizer.decode(piece[:-1], clean_up_tokenization_spaces=False) for piece in pieces if len(piece)]


def variants(texts: list[str]) -> Iterator[str]:
    """The texts again and again, hundreds of times, each time with other words put in."""
    vocabulary = sorted({word.lower() for text in texts[:2000] for word in text.split() if word.isalpha()})
    for turn, own in enumerate(vocabulary):  # a word of its own keeps a short text, too, from coming out twice
        for number, text in enumerate(texts):
            choose = random.Random(f"{turn} {number}").choice
            words = text.split(" ")
            for place in range(EVERY, len(words), EVERY):
                words[place] += f" {choose(vocabulary)}"
            yield " ".join([words[0], own, *words[1:]])


def write_file(path: Path, megabytes: int) -> None:
    """A JSON Lines file of this size."""
    with path.open("w") as file:
        for text in variants(docstring_texts()):
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= megabytes * 1e6:
                return


def begin(path: Path, cache: Path) -> subprocess.Popen:
    """A fresh process that prepares the file and prints its facts."""
    command = [sys.executable, "-c", PREPARE, MODEL, str(path), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def kill_in_the_middle(path: Path, cache: Path, written: int) -> None:
    """Begin, and kill once so many bytes of tokens are on disk."""
    process = begin(path, cache)
    while sum(file.stat().st_size for file in cache.glob("*.unfinished/train.bin")) < written:
        if process.poll() is not None:
            raise RuntimeError(f"the preparation ended with code {process.returncode} before it could be killed")
        time.sleep(0.1)
    process.kill()
    process.communicate()


def prepare(path: Path, cache: Path) -> tuple[dict, float]:
    """The facts of the text, and the peak memory of the process and its children, in GiB."""
    process, peak = begin(path, cache), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two looks
            root = psutil.Process(process.pid)
            tree = [root, *root.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in tree))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the preparation ended with code {process.returncode}")
    return json.loads(process.stdout.read()), peak / 2**30


def ceiling(path: Path) -> dict:
    """Seconds and CPU seconds of the library alone, and the digest of its tokens."""
    tokenizer = load_base(MODEL)[1]
    backend, end = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    backend.encode_special_tokens = True
    seconds, cpu_seconds, digest = 0.0, 0.0, hashlib.blake2b(digest_size=8)
    with path.open() as file:
        while lines := file.readlines(2**20):
            texts = [json.loads(line)["text"].strip() for line in lines]
            begun, cpu_begun = time.perf_counter(), time.process_time()
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            seconds, cpu_seconds = seconds + time.perf_counter() - begun, cpu_seconds + time.process_time() - cpu_begun
            for encoding in encodings:
                digest.update(np.array([*encoding.ids, end], dtype=np.uint16).tobytes())
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "digest": digest.hexdigest()}


def main() -> None:
    asked = options(__doc__.splitlines()[0], megabytes=1000)
    print(f"{machine()}; load before it began: {os.getloadavg()[0]:.1f}")
    folder = Path(tempfile.mkdtemp())
    try:
        path, cache = folder / "large.jsonl", folder / "cache"
        write_file(path, asked.megabytes)
        kill_in_the_middle(path, cache, written=asked.megabytes * 200_000)
        facts, peak = prepare(path, cache)
        library = ceiling(path)
        left = sorted(entry.name for entry in cache.iterdir() if not entry.name.startswith("."))
    finally:
        shutil.rmtree(folder)
    if library["digest"] != facts["digest"] or len(left) != 1 or facts["skipped"] or facts["copies"]:
        raise RuntimeError(f"other tokens, or something left out or over: {library}, {facts}, {left}")
    size = sum(facts["bytes"].values()) / 1e6
    print(f"\n{asked.megabytes} MB file, {size:.0f} MB of text, {sum(facts['tokens'].values()) / 1e6:.0f} M tokens\n")
    print("| | MB/s | MB per second of one core | peak GiB |\n|---|---|---|---|")
    ways = {"prepared, after a kill in the middle": facts, "the library alone, texts in memory": library}
    for name, way in ways.items():
        shown = f"{peak:.2f}" if way is facts else ""
        print(f"| {name} | {size / way['seconds']:.2f} | {size / way['cpu_seconds']:.2f} | {shown} |")
    shares = {f"{name}_of_ceiling": library[key] / facts[key] for name, key in SHARES.items()}
    finish({**shares, "peak_gib": peak}, asked.json)


if __name__ == "__main__":
    main()
