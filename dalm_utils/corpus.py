"""Documents in, token blocks out: tokenized on all cores, and kept in a cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .checkpoint import acquire, require_writable, write_whole
from .config import cache_folder
from .documents import (
    BY_WORDS,
    SPLITS,
    Skips,
    SplitRule,
    about_left_out,
    clean_documents,
    digest,
    identify,
    short_name,
    size_of,
    split_few,
)
from .terminal import warn
from .tokens import begin_id, plain_backend, token_ids, tokenizer_digest

VERSION = 2  # of this file's output: raise it when a change alters what is written
SAMPLE_SEED = 0  # of the blocks that a limit leaves: the same in every run, so that their scores can be compared
PIECE = 2**16  # tokens that are searched at once for the end of a document
BATCH = 2**18  # characters that are tokenized together: enough to keep every core busy, and 30 MB while it lasts
THREADS = min(16, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------ blocks
class Blocks:
    """Fixed-length blocks cut from one long array of tokens; position 0 of each is the begin token.

    `blocks[i]` is `[L]` long; `blocks[[i, j, ...]]` and `blocks[i:j]` are `[B, L]`.

    Args:
        tokens: `[T]` of integers, such as a memory-mapped file, in which every document ends with the token `begin`.
        limit: how many blocks to draw, all equally likely and none twice; as many as there are, or None, gives all in
            order. The sample depends on nothing but the number of blocks and the limit, so it is the same for every
            model with the same tokenizer, and the first blocks of a sample are a smaller sample.
    """

    def __init__(self, tokens: np.ndarray, length: int, begin: int, limit: int | None = None):
        self.tokens, self.length, self.begin = tokens, length, begin
        available = len(tokens) // (length - 1)
        if available == 0:
            raise ValueError(f"{len(tokens)} tokens are too few for one block of {length}")
        self.count = min(available, limit or available)
        self.sample = None
        if self.count < available:
            drawn = torch.randperm(available, generator=torch.Generator().manual_seed(SAMPLE_SEED))
            self.sample = drawn[: self.count].numpy().copy()  # without the rest of the permutation

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index) -> Tensor:
        if isinstance(index, slice):
            index = np.arange(self.count)[index]
        rows = np.atleast_1d(np.asarray(index))
        if rows.max(initial=0) >= self.count or rows.min(initial=0) < 0:
            raise IndexError(f"no block {rows.max() if rows.min() >= 0 else rows.min()} among {self.count}")
        inside = self._starts(rows)[:, None] + np.arange(self.length - 1)  # [B, L - 1]
        block = np.full((len(rows), self.length), self.begin, dtype=np.int64)
        block[:, 1:] = self.tokens[inside]
        return torch.from_numpy(block if np.ndim(index) else block[0])

    def _starts(self, rows: np.ndarray) -> np.ndarray:
        """Where the blocks of these numbers begin in `tokens`."""
        return (rows if self.sample is None else self.sample[rows]) * (self.length - 1)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """`[N]`: for each block the document that holds its middle, as the place in `tokens` where that one ends.

        Only these documents are read, whatever the size of the file.
        """
        middles = self._starts(np.arange(self.count)) + (self.length - 1) // 2
        ends = np.empty_like(middles)
        end = -1
        for i in np.argsort(middles):
            if middles[i] > end:
                end = self._end_of_document(middles[i])
            ends[i] = end
        return ends

    def _end_of_document(self, start: int) -> int:
        """The first place from `start` on with the begin token; the last place where there is none."""
        for piece in range(start, len(self.tokens), PIECE):
            found = np.flatnonzero(self.tokens[piece : piece + PIECE] == self.begin)
            if len(found):
                return piece + int(found[0])
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Corpus:
    """Tokenized text on disk, in three splits, with the facts about it."""

    folder: Path
    facts: dict
    begin: int

    def blocks(self, split: str, length: int, limit: int | None = None) -> Blocks:
        """Blocks of `length` tokens of a split ("train", "validation" or "test").

        With fewer than there are, `limit` blocks are drawn from all over the split: always the same ones, see `Blocks`.

        Raises:
            ValueError: the split has too few tokens for a single block, or a length or limit that makes none.
        """
        if length < 2 or (limit is not None and limit < 1):
            raise ValueError(f"blocks need a length of at least 2 and a limit of at least 1, got {length} and {limit}")
        tokens = (
            np.memmap(self.folder / f"{split}.bin", dtype=self.facts["dtype"], mode="r")
            if self.facts["tokens"][split]
            else np.empty(0, int)
        )
        if len(tokens) < length - 1:
            raise ValueError(self._too_few(split, length))
        return Blocks(tokens, length, self.begin, limit)

    def about_left_out(self) -> str:
        """A sentence about documents that were skipped or dropped; empty if there are none to speak of."""
        return about_left_out(self.facts, "documents")

    def _too_few(self, split: str, length: int) -> str:
        """That a split has too few tokens for one block of `length`, and what helps."""
        tokens, documents = self.facts["tokens"][split], self.facts["documents"]
        subject, total = f"the {split} split of {self.facts['name']!r}", sum(documents.values())
        if tokens:
            return (
                f"{subject} has {tokens} tokens, in {documents[split]} of {total} documents, too few for one block of "
                f"{length}: use a length of at most {tokens + 1}, or a text with about "
                f"{math.ceil((length - 1) / tokens)} times as many documents"
            )
        if total < len(SPLITS):
            return (
                f"{subject} is empty, since the text is {total} document{'s' * (total > 1)}: cut it into three or "
                "more, one a line of a .jsonl file or one a file of a folder"
            )
        return (
            f"{subject} is empty: an earlier version of this project prepared it. Delete {str(self.folder)!r} to have "
            "it split anew; a model trained on it has then seen test documents"
        )


# ---------------------------------------------------------------------------------------------- prepare
def load_corpus(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    cache: str | Path | None = None,
) -> Corpus:
    """The tokenized text of a source (see `documents`): from the cache if it is there, else made and put there whole.

    The cache is the folder `cache`; None means `DALM_CACHE` from the environment, else data/cache of the project.

    Every document ends with the begin token, which thus separates documents as well. Of two processes that want
    the same text at once, one makes it and the other waits. A killed one leaves an unfinished folder, which the
    next one removes; one that lost some of its tokens is made again.

    Raises:
        ValueError: a source without a document, or with more unreadable ones than `SKIP_LIMIT`.
        FileNotFoundError, ConnectionError: no such source, or a hub that does not give it.
        OSError: the cache cannot be written.
    """
    source = os.fspath(source)
    facts = {"version": VERSION, "source": identify(source, field), "tokenizer": tokenizer_digest(tokenizer)}
    folder, facts = prepared(source, facts, cache, lambda place, facts: _write(place, source, field, tokenizer, facts))
    return Corpus(folder, facts, begin_id(tokenizer))


def prepared(
    source: str, facts: dict, cache: str | Path | None, write: Callable[[Path, dict], None]
) -> tuple[Path, dict]:
    """The folder that `write(folder, facts)` fills, from the cache if it is there, and the facts that it wrote.

    Args:
        facts: what the content depends on; they name the folder.
    """
    facts = {**facts, "fingerprint": digest(json.dumps(facts, sort_keys=True))[:12]}
    cache = Path(os.path.expanduser(cache or cache_folder()))
    folder = cache / f"{short_name(source)}-{facts['fingerprint']}"
    if not _is_whole(folder):
        require_writable(cache, ", where prepared texts are kept; DALM_CACHE names another folder")
        with _alone(folder):
            if not _is_whole(folder):  # another process may have made it meanwhile
                write_whole(folder, lambda place: write(place, facts))
    return folder, json.loads((folder / "facts.json").read_text())


def _is_whole(folder: Path) -> bool:
    """Whether a text is there with all of its tokens; a machine that lost power may have kept only some.

    A text without a validation split is split anew: no model can have been trained on it. Before texts had "split_by",
    this happened to small ones and to those of which all documents share their words.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text())
        width = np.dtype(facts["dtype"]).itemsize
        sizes_fit = all((folder / f"{s}.bin").stat().st_size == facts["tokens"][s] * width for s in SPLITS)
        return sizes_fit and (facts["documents"]["validation"] > 0 or "split_by" in facts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time; the lock goes with its holder, however that ends."""
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        acquire(lock, 0, "DALM_CACHE")
    except filelock.Timeout:
        warn(f"another process is preparing {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(folder: Path, source: str, field: str, tokenizer: PreTrainedTokenizerBase, facts: dict) -> None:
    """Write the tokens of each split and facts.json. A text of which `BY_WORDS` leaves a split empty is read again."""
    begun = time.perf_counter()
    made = _tokenize(folder, source, field, tokenizer, BY_WORDS)
    if not all(made["documents"].values()):
        made = _tokenize(folder, source, field, tokenizer, split_few(clean_documents(source, field)))
    seconds = round(time.perf_counter() - begun, 1)
    facts = {**facts, "name": source, **made, "seconds": seconds}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def _tokenize(folder: Path, source: str, field: str, tokenizer: PreTrainedTokenizerBase, rule: SplitRule) -> dict:
    """Stream the documents through all cores onto disk, in order, a bounded number of batches at a time.

    Threads are enough, since the tokenizer does nine tenths of the work and does it outside Python's lock.

    Returns:
        The facts about what was read and written.
    """
    skips = Skips()
    dtype = np.dtype(np.uint16 if token_ids(tokenizer)[-1] + 1 < 2**16 else np.uint32)
    hashed = hashlib.blake2b(digest_size=8)  # of the tokens: two copies of a text are the same text
    if rule is not BY_WORDS:
        hashed.update(rule.name.encode())  # split in another way it is another text to train on
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "bytes")}
    texts = clean_documents(source, field, skips)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        backend = stack.enter_context(plain_backend(tokenizer))
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        bar = tqdm(desc="tokenizing", total=size_of(source), unit="B", unit_scale=True, leave=False)
        stack.enter_context(bar)
        pack = partial(_pack, backend, begin_id(tokenizer), dtype)
        for batch, packed in _in_order(pool, pack, _batched((rule.split_of(text), text) for text in texts)):
            for (split, text), tokens in zip(batch, packed, strict=True):
                files[split].write(tokens)
                hashed.update(tokens)
                counts["documents"][split] += 1
                counts["tokens"][split] += len(tokens) // dtype.itemsize
                counts["bytes"][split] += len(text.encode("utf-8", "replace"))
            bar.update((skips.bytes or sum(counts["bytes"].values())) - bar.n)
    if not any(counts["documents"].values()):
        raise ValueError(f"no document to train on in {source!r}; skipped: {skips}")
    return {
        "dtype": dtype.name,
        "digest": hashed.hexdigest(),
        "split_by": rule.name,
        **counts,
        "copies": skips.copies,
        "skipped": dict(skips.reasons),
        "skipped_at": skips.places,
    }


def _pack(backend: Tokenizer, begin: int, dtype: np.dtype, batch: list[tuple[str, str]]) -> list[bytes]:
    """The tokens of each text of a batch of (split, text), and the begin token, as bytes."""
    encodings = backend.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    return [np.array([*encoding.ids, begin], dtype=dtype).tobytes() for encoding in encodings]


def _in_order(pool: ThreadPoolExecutor, work: Callable, batches: Iterable[list]) -> Iterator[tuple[list, list]]:
    """Each batch with what `work` makes of it, in order; no more than two for each thread are ever held."""
    pending: deque[tuple[list, Future]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(work, batch)))
        if len(pending) == 2 * THREADS:
            batch, result = pending.popleft()
            yield batch, result.result()
    for batch, result in pending:
        yield batch, result.result()


def _batched(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
