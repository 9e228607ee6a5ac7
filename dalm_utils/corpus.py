"""Documents in, token blocks out: read, clean, split, tokenise, pack, and remember."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .backbone import begin_id
from .config import PROJECT

VERSION = 2  # of this file's output: raise it when a change alters what is written
CACHE = PROJECT / "data" / "cache"
PACKAGES = ("numpy", "networkx", "sympy", "matplotlib", "torch", "pandas", "transformers", "accelerate", "datasets")
MIN_CHARACTERS = 200  # a shorter docstring says too little to learn from
HELD_OUT = {"validation": 2, "test": 2}  # percent of the documents
SKIP_LIMIT = 100  # unreadable lines or files that are passed over, or this share of all, before it is an error
SKIP_SHARE = 0.01
LONGEST_LINE = 64 * 2**20  # bytes; a longer line is no document but a damaged file
SPLITS = ("train", "validation", "test")


# ------------------------------------------------------------------------------------------------ blocks
class Blocks:
    """Fixed-length blocks cut from one long array of tokens; position 0 of each is the begin token.

    `blocks[i]` is `[L]` long; `blocks[[i, j, ...]]` is `[B, L]`.
    """

    def __init__(self, tokens: np.ndarray, length: int, begin: int, limit: int | None = None):
        self.tokens, self.length, self.begin = tokens, length, begin
        self.count = min(len(tokens) // (length - 1), limit or len(tokens))
        if self.count == 0:
            raise ValueError(f"{len(tokens)} tokens are too few for one block of {length}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index) -> Tensor:
        rows = np.atleast_1d(np.asarray(index))
        if rows.max(initial=0) >= self.count or rows.min(initial=0) < 0:
            raise IndexError(f"no block {rows.max() if rows.min() >= 0 else rows.min()} among {self.count}")
        inside = rows[:, None] * (self.length - 1) + np.arange(self.length - 1)  # [B, L - 1]
        block = np.full((len(rows), self.length), self.begin, dtype=np.int64)
        block[:, 1:] = self.tokens[inside]
        return torch.from_numpy(block if np.ndim(index) else block[0])


@dataclass(frozen=True)
class Corpus:
    """Tokenised text on disk, in three splits, with the facts about it."""

    folder: Path
    facts: dict
    begin: int

    def blocks(self, split: str, length: int, limit: int | None = None) -> Blocks:
        """Blocks of `length` tokens of a split ("train", "validation" or "test"); at most `limit`.

        Raises:
            ValueError: the split has too few tokens for a single block.
        """
        tokens = (
            np.memmap(self.folder / f"{split}.bin", dtype=self.facts["dtype"], mode="r")
            if self.facts["tokens"][split]
            else np.empty(0, int)
        )
        if len(tokens) < length - 1:
            share = f" (it gets {HELD_OUT[split]}% of the documents)" if split in HELD_OUT else ""
            raise ValueError(
                f"the {split} split of {self.facts['name']!r} has {len(tokens)} tokens{share}, too few for one block "
                f"of {length}; add text or lower `length`"
            )
        return Blocks(tokens, length, self.begin, limit)


# ------------------------------------------------------------------------------------------- documents
@dataclass
class Skips:
    """What could not be read: counted, the first places remembered, and an error past the limit.

    The limit is `limit` documents or `SKIP_SHARE` of those read so far, whichever is more.
    """

    limit: int = SKIP_LIMIT
    read: int = 0
    reasons: Counter = dataclass_field(default_factory=Counter)
    places: list[str] = dataclass_field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        self.reasons[reason] += 1
        self.places = [*self.places, f"{place}: {reason}"][:10]
        if self.reasons.total() > max(self.limit, SKIP_SHARE * self.read):
            raise ValueError(
                f"{self.reasons.total()} of {self.read} documents cannot be read: {dict(self.reasons)}. The first: "
                + "; ".join(self.places)
            )


def documents(source: str, field: str = "text", skips: Skips | None = None) -> Iterator[str]:
    """The documents of a source, one string each, in a fixed order.

    Args:
        source: "docstrings"; a .jsonl file with one object a line; or a folder of .txt, .md, .rst and .tex files.
        field: the field of a JSON line that holds the text.
        skips: collects what was passed over (a line that is not JSON, a missing field, an empty document,
            bytes that are not UTF-8, a line of more than `LONGEST_LINE` bytes).

    Raises:
        FileNotFoundError, ValueError: no such source, or nothing in it that can be read.
    """
    skips = Skips() if skips is None else skips
    if source == "docstrings":
        yield from docstrings()
        return
    path = _locate(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".rst", ".tex"))
        if not files:
            raise ValueError(f"the folder {source!r} has no .txt, .md, .rst or .tex file")
        lines = ((file.relative_to(path).as_posix(), file.read_bytes()) for file in files)
        parse = _parse_text
    elif path.suffix in (".jsonl", ".json"):
        lines = _numbered_lines(path)
        parse = partial(_parse_json_line, field=field)
    else:
        raise ValueError(f"{source!r} is neither a .jsonl file nor a folder")
    for place, raw in lines:
        skips.read += 1
        try:
            yield parse(raw)
        except ValueError as error:
            skips.add(place, str(error))


def _locate(source: str) -> Path:
    path = next((p for p in (Path(source), PROJECT / source) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"no text at {source!r}: give 'docstrings', a .jsonl file, or a folder of text files")
    return path


def _numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line with its place; of a line that is too long no more than `LONGEST_LINE` + 1 bytes are ever held."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            rest = line
            while len(line) > LONGEST_LINE and rest and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE)
            yield f"{path.name}:{number}", line


def _parse_text(raw: bytes) -> str:
    if len(raw) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE // 2**20} MiB")
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not text:
        raise ValueError("empty document")
    return text


def _parse_json_line(raw: bytes, field: str) -> str:
    try:
        record = json.loads(_parse_text(raw))
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or field not in record:
        raise ValueError(f"no field {field!r}")
    if not isinstance(record[field], str):
        raise ValueError(f"field {field!r} is not a string")
    return _parse_text(record[field].encode("utf-8", "replace"))


def docstrings() -> Iterator[str]:
    """Every docstring of the installed scientific packages, in the order of their files; tests left out."""
    roots = [Path(importlib.util.find_spec(package).origin).parent for package in PACKAGES]
    files = [f for root in roots for f in sorted(root.rglob("*.py")) if "tests" not in f.relative_to(root).parts]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for found in tqdm(pool.map(_docstrings_of, files, chunksize=32), "reading docstrings", len(files), leave=False):
            yield from found


def _docstrings_of(file: Path) -> list[str]:
    source = file.read_text(encoding="utf-8", errors="replace")
    if '"""' not in source and "'''" not in source:
        return []
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates that only look like Python
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) >= MIN_CHARACTERS]


# ------------------------------------------------------------------------------------- clean and split
def normalise(text: str) -> str:
    """The words alone, in lower case: what two copies of a document share when layout and numbers differ."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def drop_near_copies(texts: Iterable[str], width: int = 8, share: float = 0.5) -> list[str]:
    """Keep a document only if at most `share` of its runs of `width` words stand in the ones kept before.

    Long documents go first, so that one which is contained in another falls, whichever came first.
    The result is ordered by a hash of the document: mixed, and the same on every machine.
    """
    seen: set[int] = set()
    kept = []
    for text in sorted(set(texts), key=lambda text: (-len(text), text)):
        words = normalise(text).split()
        runs = {hash(tuple(words[i : i + width])) for i in range(max(1, len(words) - width + 1))}
        if len(runs & seen) <= share * len(runs):
            seen |= runs
            kept.append(text)
    return sorted(kept, key=_digest)


def split_of(text: str) -> str:
    """The split a document belongs to, by a hash of its normalised form: stable, and the same for all copies."""
    bucket = int(_digest(normalise(text))[:8], 16) % 100
    for split, percent in HELD_OUT.items():
        if bucket < percent:
            return split
        bucket -= percent
    return "train"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def clean_documents(source: str, field: str = "text", skips: Skips | None = None) -> Iterable[str]:
    """The documents without copies; docstrings, which repeat each other, without near copies either."""
    if source == "docstrings":
        return drop_near_copies(documents(source, field, skips))
    return _drop_copies(documents(source, field, skips))


def _drop_copies(texts: Iterable[str]) -> Iterator[str]:
    seen = set()
    for text in texts:
        key = _digest(normalise(text))
        if key not in seen:
            seen.add(key)
            yield text


# ---------------------------------------------------------------------------------------------- prepare
def load_corpus(source: str, tokenizer: PreTrainedTokenizerBase, *, field: str = "text", cache: Path = CACHE) -> Corpus:
    """The tokenised text of a source: from the cache if it is there, else made and put there whole.

    Every document ends with the begin token, which thus separates documents as well.

    Raises:
        ValueError: a source without a document, or with more unreadable ones than `SKIP_LIMIT`.
    """
    facts = {"version": VERSION, "source": _identify(source, field), "tokenizer": tokenizer_digest(tokenizer)}
    fingerprint = _digest(json.dumps(facts, sort_keys=True))[:12]
    folder = Path(cache) / f"{Path(source).stem}-{fingerprint}"
    if not (folder / "facts.json").exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}.") as unfinished:
            _write(Path(unfinished), source, field, tokenizer, {**facts, "fingerprint": fingerprint})
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(unfinished, folder)
            os.mkdir(unfinished)  # what the context manager expects to remove
    return Corpus(folder, json.loads((folder / "facts.json").read_text()), begin_id(tokenizer))


def _write(folder: Path, source: str, field: str, tokenizer, facts: dict) -> None:
    skips = Skips()
    dtype = np.uint16 if len(tokenizer) < 2**16 else np.uint32
    digest = hashlib.blake2b(digest_size=8)  # of the tokens: two copies of a text are the same text
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "bytes")}
    files = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
    for batch in _batched(tqdm(clean_documents(source, field, skips), "tokenising", leave=False), 512):
        for text, ids in zip(batch, encode(tokenizer, batch), strict=True):
            split = split_of(text)
            written = np.asarray([*ids, begin_id(tokenizer)], dtype=dtype).tobytes()
            files[split].write(written)
            digest.update(written)
            counts["documents"][split] += 1
            counts["tokens"][split] += len(ids) + 1
            counts["bytes"][split] += len(text.encode("utf-8", "replace"))
    for file in files.values():
        file.close()
    if not counts["documents"]["train"]:
        raise ValueError(f"no document to train on in {source!r}; skipped: {dict(skips.reasons) or 'none'}")
    facts |= {
        "name": source,
        "dtype": np.dtype(dtype).name,
        "digest": digest.hexdigest(),
        **counts,
        "skipped": dict(skips.reasons),
        "skipped_at": skips.places,
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain text: a document that mentions "[MASK]" gets the letters, never the special token."""
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does to plain text; an added special token such as [MASK] does not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    relevant["words"] = [token["content"] for token in state["added_tokens"] if not token["special"]]
    return _digest(json.dumps([relevant, begin_id(tokenizer)], sort_keys=True))


def _identify(source: str, field: str) -> dict:
    if source == "docstrings":
        return {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    path = _locate(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(p.relative_to(path.parent).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return {"field": field, "files": _digest(json.dumps(stats)), "name": path.name}


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
