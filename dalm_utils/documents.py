"""Sources in, documents out: read, count what cannot be read, drop copies, split."""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from . import arxiv
from .config import PROJECT
from .hubs import LFS_POINTER
from .terminal import warn

PACKAGES = {  # texts that need no download: the docstrings of packages that are installed anyway
    "docstrings": (
        "numpy", "networkx", "sympy", "matplotlib", "torch", "pandas", "transformers", "accelerate", "datasets",
    ),
    "mathematics": ("sympy", "networkx", "numpy"),
}  # fmt: skip
TEXT_FILES = (".txt", ".md", ".rst", ".tex")
OTHER_DATA = (".json", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow")  # which a folder may hold unread
ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog")  # files about a dataset, not of it
MIN_CHARACTERS = 200  # of a docstring; shorter ones say too little to learn from
FILES = 100  # parsed by each process: enough that starting it costs little
MIN_WORDS = 50  # of a text, and for each number in it: with fewer, `content_of` compares more than words
MIN_LETTERS = 4  # for each sign or digit, likewise
HELD_OUT = {"validation": 2, "test": 2}  # percent of the documents
FEW = 1000  # documents; fewer may leave a split of 2% empty by chance
SPLITS = ("train", "validation", "test")
SKIP_LIMIT = 100  # more lines or files that cannot be read than this, and than this fraction of all, are an error
SKIP_FRACTION = 0.01
ENDS = 64 * 2**10  # bytes at either end of a file that identify it, beside its name, size and time
LONGEST_NAME = 128  # bytes of a text's name in the names of files, which may have 255
LONGEST_LINE = 4 * 2**20  # bytes; a longer one is damaged or no document, and tokenizing takes 130 times its size
ROWS = 1000  # of a parquet file, held at once
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the first bytes of such a file
AN_ARRAY = "a JSON array; write one object a line (jq -c '.[]' FILE > lines.jsonl)"
RULES = 3  # of reading files and hubs: raise it when the same source gives other documents, and all is prepared anew


# -------------------------------------------------------------------------------------------------- read
@dataclass
class Skips:
    """Counts what was read and what had to be skipped, and raises an error past a limit.

    The limit is `limit` documents or `SKIP_FRACTION` of those read so far, whichever is more.
    """

    limit: int = SKIP_LIMIT
    read: int = 0
    bytes: int = 0  # read so far, of files
    copies: int = 0  # documents dropped because another says the same
    reasons: Counter = dataclass_field(default_factory=Counter)
    places: list[str] = dataclass_field(default_factory=list)  # the first ten, each with its reason
    first: dict[str, str] = dataclass_field(default_factory=dict)  # the first place of each reason
    fields: list[str] = dataclass_field(default_factory=list)  # of the first record that lacks the one asked for

    def add(self, place: str, reason: ValueError) -> None:
        """Count a document that cannot be read. Raises ValueError past the limit."""
        self.reasons[str(reason)] += 1
        self.first.setdefault(str(reason), place)
        self.fields = self.fields or getattr(reason, "fields", [])
        if len(self.places) < 10:
            self.places.append(f"{place}: {reason}")
        if self.reasons.total() > max(self.limit, SKIP_FRACTION * self.read):
            raise ValueError(f"{self.reasons.total()} of {self.read} documents cannot be read: {self}")

    def __str__(self) -> str:
        """Each reason once, with its count and its first place."""
        told = [f"{count} {reason} (the first at {self.first[reason]})" for reason, count in self.reasons.items()]
        if self.fields:
            told.append(f"the fields there are {', '.join(map(repr, self.fields))}; choose `field` among them")
        return "; ".join(told) or "none"


def about_left_out(facts: dict, kind: str) -> str:
    """A sentence about what of a prepared text was skipped or dropped; empty if that is nothing, or to be expected.

    Args:
        facts: those of the text; docstrings, which repeat each other, always have copies.
        kind: of what it is made: "documents" or "pairs".
    """
    counts, copies = dict(facts["skipped"]), 0 if facts["name"] in PACKAGES else facts.get("copies", 0)
    left_out = sum(counts.values()) + copies
    if not left_out:
        return ""
    told = [f"{count:,} {reason}" for reason, count in counts.items()]
    if told:
        reason = next(iter(counts))
        told[0] += f" (the first at {facts['skipped_at'][0].removesuffix(f': {reason}')})"
    if copies:
        told.append(f"{copies:,} {'copy' if copies == 1 else 'copies'}")
    total = left_out + sum(facts["documents"].values())
    return f"left out of {facts['name']!r}: {left_out:,} of {total:,} {kind}: {', '.join(told)}"


class MissingField(ValueError):
    """A record without the field that holds the text; `fields` are those that it has."""

    def __init__(self, field: str, record: dict):
        super().__init__(f"no field {field!r}")
        self.fields = list(record)[:20]


def documents(source: str, field: str = "text", skips: Skips | None = None) -> Iterator[str]:
    """The documents of a source, one string each, in a fixed order.

    Args:
        source: "docstrings" or "mathematics" (see `PACKAGES`); "arxiv", or "arxiv:2" for two of its shards (see
            `arxiv.ArxivSet`); a .jsonl file with one object a line; a .parquet file, or a folder of them; or a
            folder of .txt, .md, .rst and .tex files.
        field: the field of a JSON line or parquet row that holds the text: a string, or a list of strings, which
            become lines. Where a record has no "text", its "article" is taken; the arXiv set knows its own field.
        skips: counts what was skipped (a line that is not a JSON object, a missing field, an empty document,
            bytes that are not UTF-8, a file that cannot be opened, a Git-LFS pointer, a line of more than
            `LONGEST_LINE` bytes).

    Raises:
        FileNotFoundError, ConnectionError, ValueError: no such source, or nothing in it that can be read.
    """
    skips = Skips() if skips is None else skips
    if source in PACKAGES:
        yield from docstrings(PACKAGES[source])
        return
    opened, parse = _open(source, field)
    yield from (text for _, text in _parsed(opened, parse, skips))


def records(source: str, fields: Collection[str], skips: Skips) -> Iterator[tuple[str, dict]]:
    """The records of a .jsonl or .parquet file, or of a folder of .parquet files, each with its place, in order.

    Args:
        fields: those that are read of a .parquet file; the others are None.

    Raises:
        FileNotFoundError, ValueError: as `documents`; or a source of texts, which has no records.
    """
    if source in PACKAGES or arxiv.ArxivSet.parse(source):
        raise ValueError(f"{source!r} is a text without records; give a .jsonl or .parquet file")
    path = _locate(source)
    files = _files(path)
    parquet = _ending(files[0]) == ".parquet"
    if not parquet and not path.is_file():
        raise ValueError(f"{source!r} is a folder of texts without records; give a .jsonl or .parquet file")
    opened: Iterator[tuple[str, int, Any]] = _rows_on_disk(files, fields) if parquet else _numbered_lines(path)
    yield from _parsed(opened, _record, skips)


def _parsed(opened: Iterable[tuple[str, int, Any]], parse: Callable, skips: Skips) -> Iterator[tuple[str, Any]]:
    """What `parse` makes of each raw record, with its place; those that it refuses are counted."""
    for place, size, raw in opened:
        skips.read += 1
        skips.bytes += size
        try:
            parsed = parse(raw)
        except ValueError as error:
            skips.add(place, error)
        else:
            yield place, parsed


def _open(source: str, field: str) -> tuple[Iterator[tuple[str, int, Any]], Callable[[Any], str]]:
    """The records of a source as (place, bytes, raw), and the function that makes a raw one a text."""
    wanted = arxiv.ArxivSet.parse(source)
    if wanted:
        return _arxiv_rows(wanted), partial(_text_of, field=arxiv.FIELD)
    path = _locate(source)
    files = _files(path)
    if _ending(files[0]) == ".parquet":
        fields = (field, arxiv.FIELD) if field == "text" else (field,)
        return _rows_on_disk(files, fields), partial(_text_of, field=field)
    if path.is_file():
        return _numbered_lines(path), partial(_text_of, field=field)
    return ((file.relative_to(path).as_posix(), file.stat().st_size, file) for file in files), _parse_file


def _locate(source: str) -> Path:
    places = (Path(os.path.expanduser(source)), PROJECT / source)
    path = next((p for p in places if os.path.exists(p)), None)
    if path is None or not source:  # the empty path would be the current folder
        raise FileNotFoundError(
            f"no text at {source!r}: give {', '.join(map(repr, PACKAGES))}, 'arxiv', a .jsonl or .parquet file, or a "
            "folder of text or .parquet files"
        )
    return path


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _files(path: Path) -> list[Path]:
    """The files of a source on disk, all of one kind, in order."""
    if path.is_file():
        if _ending(path) not in (".jsonl", ".json", ".parquet"):
            raise ValueError(
                f"{str(path)!r} is neither a .jsonl or .parquet file nor a folder: put texts into a folder, one "
                "document a file (a book cut into chapters); decompress what is compressed (zcat x.jsonl.gz > x.jsonl)"
            )
        return [path]
    if not path.is_dir():  # such as a pipe, which could not be read twice
        raise ValueError(f"{str(path)!r} is neither a file nor a folder; write what it gives to a .jsonl file first")
    found = _below(path)
    tables, lines, texts, others = (
        [file for file in found if _ending(file) in endings and file.is_file()]
        for endings in ((".parquet",), (".jsonl",), TEXT_FILES, OTHER_DATA)
    )
    only_about = all(file.stem.lower() in ABOUT for file in texts)
    if others and only_about and not (tables or lines):
        raise ValueError(
            f"the folder {str(path)!r} holds {others[0].name}, which is not read; decompress it, or write one JSON "
            "object a line to a .jsonl file, and give that by its path"
        )
    if tables or lines:
        texts = [file for file in texts if file.stem.lower() not in ABOUT]
    kinds = [files for files in (tables, lines, texts) if files]
    if not kinds:
        raise ValueError(f"the folder {str(path)!r} has no .txt, .md, .rst, .tex or .parquet file")
    if len(kinds) > 1:
        raise ValueError(
            f"the folder {str(path)!r} holds files of several kinds ({', '.join(files[0].name for files in kinds)}); "
            "give the one that holds the text, by its path, or a folder with nothing else in it"
        )
    if lines:
        raise ValueError(f"give one of the .jsonl files in {str(path)!r} by its path, such as {str(lines[0])!r}")
    return kinds[0]


def _below(folder: Path) -> list[Path]:
    """All files of a folder and of those in it, in order, but the hidden ones: older copies, caches, environments."""

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"the folder {error.filename!r} cannot be read ({error.strerror}); permit it, or move that folder elsewhere"
        ) from error

    def is_shown(name: str) -> bool:
        return not name.startswith(".") and name != "__MACOSX"

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(is_shown, folders)
        found += (Path(place, name) for name in filter(is_shown, names))
    return sorted(found)


def _numbered_lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Each line with its place and size; of one that is too long at most `LONGEST_LINE` + 1 bytes are held."""
    with path.open("rb") as file:
        if file.peek(2)[:2] in UTF_16:
            raise ValueError(f"{str(path)!r} is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
        _refuse_pointer(path, file.peek(100))
        start = file.peek(100).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"[\n") or (start.startswith(b"[") and _ending(path) == ".json"):
            raise ValueError(f"{str(path)!r} is {AN_ARRAY}")
        for number in itertools.count(1):
            line = rest = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            size = len(line)
            while len(line) > LONGEST_LINE and rest and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE)
                size += len(rest)
            yield f"{path.name}:{number}", size, line


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise ValueError(f"{str(path)!r} is a Git-LFS pointer, not the file; fetch that (git lfs pull)")


def _rows_on_disk(files: list[Path], fields: Collection[str]) -> Iterator[tuple[str, int, dict | bytes]]:
    """The rows of parquet files, read `ROWS` at a time, and only in these fields: the others are None."""
    from pyarrow.parquet import ParquetFile

    def rows(file: Path) -> Iterator[dict]:
        with ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            for batch in opened.iter_batches(ROWS, columns=[name for name in names if name in fields]):
                yield from (dict.fromkeys(names) | row for row in batch.to_pylist())

    for file in files:
        if not file.stat().st_size:
            yield file.name, 0, b""
            continue
        with file.open("rb") as opened:
            _refuse_pointer(file, opened.read(100))
        try:
            yield from _numbered_rows(rows(file), fields, file.name)
        except Exception as error:  # of pyarrow
            raise ValueError(f"{str(file)!r} cannot be read as parquet: {error}") from error


def _arxiv_rows(wanted: arxiv.ArxivSet) -> Iterator[tuple[str, int, dict]]:
    try:
        for file in wanted.files():
            yield from _numbered_rows(_streamed_rows(file), (arxiv.FIELD,), file.rpartition("/")[2])
    except Exception as error:  # each hub client has errors of its own; all of them mean "not from here"
        raise wanted.unreachable(error) from error


def _streamed_rows(address: str) -> Iterable[dict]:
    """The rows of one parquet file on a hub, read `ROWS` at a time."""
    from datasets import load_dataset  # takes seconds to import

    # without a batch_size it is the length of the first row group, which may be 0
    return load_dataset("parquet", data_files=address, split="train", streaming=True, batch_size=ROWS)


def _numbered_rows(rows: Iterable[dict], fields: Iterable[str], name: str) -> Iterator[tuple[str, int, dict]]:
    """Each row of the file of this name with its place, and the size of its text."""
    for number, row in enumerate(rows, 1):
        texts = (row.get(field) for field in fields)
        lines = itertools.chain.from_iterable(text if isinstance(text, list) else [text] for text in texts)
        yield f"{name}:{number}", sum(len(x) for x in lines if isinstance(x, str | bytes)), row


def _parse_file(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            raw = opened.read(LONGEST_LINE + 1)  # enough to tell that it is too long
    except OSError as error:
        raise ValueError(f"cannot be opened: {error.strerror}") from None
    if raw.startswith(LFS_POINTER):
        raise ValueError("a Git-LFS pointer, not the file (git lfs pull)")
    return _parse_text(raw)


def _parse_text(raw: bytes) -> str:
    """The text without space around it, and without the byte order mark that some programs put before UTF-8."""
    if len(raw) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE // 2**20} MiB (cut it into documents)")
    if raw[:2] in UTF_16 or raw.count(b"\0") > len(raw) / 4:  # without a mark, half of the bytes of English are zero
        raise ValueError("UTF-16 or damaged, not UTF-8")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 (convert it, as by iconv -f WINDOWS-1252 -t UTF-8)") from None
    if not text:
        raise ValueError("empty document")
    return text


def _record(raw: dict | bytes) -> dict:
    """A row of a parquet file as it is, or the object in a line of JSON; b"" stands for a file without rows."""
    if isinstance(raw, dict):
        return raw
    text = _parse_text(raw)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits is a ValueError
        raise ValueError("not JSON") from None
    if isinstance(record, list):
        raise ValueError(AN_ARRAY)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _text_of(raw: dict | bytes, field: str) -> str:
    record = _record(raw)
    if field == "text" and field not in record and arxiv.FIELD in record:
        field = arxiv.FIELD
    if field not in record:
        raise MissingField(field, record)
    text = record[field]
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "\n".join(text)
    if isinstance(text, bytes):  # a parquet file may not say that they are UTF-8
        return _parse_text(text)
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is not a string")
    return _parse_text(text.encode("utf-8", "replace"))


def docstrings(packages: Iterable[str]) -> Iterator[str]:
    """The docstrings of at least `MIN_CHARACTERS` of these installed packages, in the order of their files; no tests.

    The files are parsed in several processes. Each runs a fixed script, not this program again as multiprocessing
    would, so reading works the same in a notebook and in a script without an `if __name__ == "__main__"` guard.
    """
    roots = [_folder_of(package) for package in packages]
    files = [str(f) for root in roots for f in sorted(root.rglob("*.py")) if "tests" not in f.relative_to(root).parts]
    batches = [files[i : i + FILES] for i in range(0, len(files), FILES)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each thread waits for a process
        for found in tqdm(pool.map(_docstrings_of, batches), "reading docstrings", len(batches), leave=False):
            yield from (text for text in found if len(text) >= MIN_CHARACTERS)


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _not_installed(package)
    return Path(spec.origin).parent


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed(package) from None


def _not_installed(package: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the docstrings of {package!r} cannot be read: it is not installed (pip install {package})"
    )


def _docstrings_of(files: list[str]) -> list[str]:
    """What `_docstrings.py` finds in these files. `-I` keeps the environment and the current folder out of it."""
    script = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_docstrings.py"))]
    result = subprocess.run(script, input=json.dumps(files).encode(), capture_output=True)
    if result.returncode:
        error = result.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"docstrings cannot be read: {sys.executable} ended with {result.returncode}: {error}")
    return json.loads(result.stdout)


def identify(source: str, field: str) -> dict:
    """What a text made from a source depends on: versions of packages, a hub's revision, or the files on disk."""
    wanted = arxiv.ArxivSet.parse(source)
    if (source in PACKAGES or wanted) and os.path.exists(source):
        _say_which(source)
    if source in PACKAGES:
        return {name: _version_of(name) for name in PACKAGES[source]}
    if wanted:
        return {**vars(wanted), "rules": RULES}
    path = _locate(source)
    files = [(file.relative_to(path.parent).as_posix(), *_marks(file)) for file in _files(path)]
    return {"field": field, "files": digest(json.dumps(files)), "name": path.name, "rules": RULES}


@functools.cache  # so that it is said once
def _say_which(source: str) -> None:
    warn(f"{source!r} is a text that this project brings; for the file or folder of that name write './{source}'")


def _marks(file: Path) -> tuple[int, int, str]:
    """Size, time, and a hash of both ends of a file; of one that cannot be opened, that of nothing."""
    stat, ends = file.stat(), b""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        ends = opened.read(ENDS)
        opened.seek(max(0, stat.st_size - ENDS))
        ends += opened.read(ENDS)
    return stat.st_size, stat.st_mtime_ns, hashlib.blake2b(ends, digest_size=16).hexdigest()


def short_name(source: str) -> str:
    """A source's name without path, ending, hub and shards; of a long one what leaves room in the name of a file."""
    if arxiv.ArxivSet.parse(source):
        return "arxiv"
    return os.fsencode(Path(source).stem)[:LONGEST_NAME].decode(errors="ignore")


def size_of(source: str) -> int | None:
    """The bytes of a source's files, for a progress bar; None where they are only known once it is read."""
    if source in PACKAGES or arxiv.ArxivSet.parse(source):
        return None
    files = _files(_locate(source))
    return None if _ending(files[0]) == ".parquet" else sum(file.stat().st_size for file in files)


# ------------------------------------------------------------------------------------- clean and split
_ASCII_LETTERS, _ASCII_DIGITS = (  # for bytes.translate: all other characters become spaces
    bytes(byte if belongs(chr(byte)) else ord(" ") for byte in range(128)).ljust(256)
    for belongs in (str.isalpha, str.isdigit)
)
_NO_SIGNS = "LMZC"  # the first letters of Unicode's categories of letters, marks on them, space and what is not seen
_ASCII_NO_SIGNS = bytes(byte for byte in range(128) if unicodedata.category(chr(byte))[0] in _NO_SIGNS)


@functools.lru_cache(maxsize=1)  # called twice in a row for each document: is it a copy, and which split is it in
def normalize(text: str) -> str:
    """The words alone, in lower case: what two copies of a document share when layout and numbers differ."""
    text = text.lower()
    if text.isascii():  # nearly every text is, and this is three times faster
        return " ".join(text.encode().translate(_ASCII_LETTERS).decode().split())
    return " ".join(re.findall(r"[^\W\d_]+", text))


def drop_near_copies(texts: Iterable[str], width: int = 8, fraction: float = 0.5) -> list[str]:
    """Keep a document only if at most `fraction` of its runs of `width` words occur in those kept before.

    Long documents come first, so a document that is contained in another is dropped, whichever was read first.
    The result is ordered by a hash of the document: mixed, and the same on every machine.
    """
    seen: set[int] = set()
    kept = []
    for text in sorted(set(texts), key=lambda text: (-len(text), text)):
        words = normalize(text).split()
        runs = {hash(tuple(words[i : i + width])) for i in range(max(1, len(words) - width + 1))}
        if len(runs & seen) <= fraction * len(runs):
            seen |= runs
            kept.append(text)
    return sorted(kept, key=digest)


def split_of(text: str) -> str:
    """The split a document belongs to, by a hash of its normalized form: stable, and the same for all copies."""
    return split_at(digest(normalize(text)))


def split_at(key: str) -> str:
    """The split that a hash, in hexadecimal, falls into."""
    bucket = int(key[:8], 16) % 100
    for split, percent in HELD_OUT.items():
        if bucket < percent:
            return split
        bucket -= percent
    return "train"


class SplitRule(NamedTuple):
    """How a text is split."""

    name: str  # as "split_by" in facts.json
    split_of: Callable[[str], str]  # from a document to its split


BY_WORDS = SplitRule("words", split_of)


def split_few(
    texts: Iterable[str], content: Callable[[str], str] = normalize, names: tuple[str, str] = ("words", "text")
) -> SplitRule:
    """The rule for a text of which a hash of the documents' content leaves a split empty.

    Each held-out split gets a tenth of the documents, at least one, by the rank of the hashes of their content, and
    documents with the same content stay together. Where that leaves a split empty, most documents share their content,
    such as the words around different numbers: then the exact texts count, each once, by rank if there are few, by
    `HELD_OUT` if there are many. Of two documents one is for training and one for validation.

    Args:
        content: what documents must share to stay together.
        names: of the content and of the exact text, for the name of the rule.
    """
    same_content: Counter[str] = Counter()
    exact: dict[str, int] = {}
    for text in texts:
        same_content[digest(content(text))] += 1
        if len(exact) < FEW:
            exact[digest(text)] = 1
    by_content = _held_out_by_rank(same_content)
    if len(set(by_content.values())) == min(same_content.total(), len(SPLITS)) - 1:
        return SplitRule(f"rank of {names[0]}", lambda text: by_content.get(digest(content(text)), "train"))
    if len(exact) == FEW:
        return SplitRule(names[1], lambda text: split_at(digest(text)))
    by_text = _held_out_by_rank(exact)
    return SplitRule(f"rank of {names[1]}", lambda text: by_text.get(digest(text), "train"))


def _held_out_by_rank(sizes: dict[str, int]) -> dict[str, str]:
    """The split of each hash that is held out. `sizes` counts the documents of each, which go together."""
    documents, splits = sum(sizes.values()), {}
    for split, needed in (("validation", 2), ("test", 3)):
        room = max(1, documents // 10) if documents >= needed else 0
        for key in sorted(sizes):
            if key not in splits and sizes[key] <= room:
                splits[key] = split
                room -= sizes[key]
    return splits


def digest(text: str) -> str:
    """128 bits of a hash, in hexadecimal."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


def clean_documents(source: str, field: str = "text", skips: Skips | None = None) -> Iterable[str]:
    """The documents without copies; docstrings, which repeat each other, without near copies either."""
    skips = Skips() if skips is None else skips
    if source not in PACKAGES:
        return _drop_copies(documents(source, field, skips), skips)
    texts = list(documents(source, field, skips))
    kept = drop_near_copies(texts)
    skips.copies += len(texts) - len(kept)
    return kept


def _drop_copies(texts: Iterable[str], skips: Skips) -> Iterator[str]:
    seen = set()
    for text in texts:
        key = bytes.fromhex(digest(content_of(text)))
        if key in seen:
            skips.copies += 1
            continue
        seen.add(key)
        yield text


def content_of(text: str) -> str:
    """What two documents share if one of them is a copy.

    The words, where they say nearly everything; with more than one number in `MIN_WORDS` words, or one sign in
    `MIN_LETTERS` letters, everything but case and layout; and a text of fewer words, such as a formula, as it stands.
    """
    words = normalize(text)
    count = words.count(" ") + 1
    if count < MIN_WORDS:
        return text
    letters = len(words) - count + 1
    is_prose = count >= MIN_WORDS * _numbers(text) and letters >= MIN_LETTERS * _signs(text)
    return words if is_prose else " ".join(text.lower().split())


def _numbers(text: str) -> int:
    """How many runs of digits it has."""
    if text.isascii():  # as in `normalize`
        return len(text.encode().translate(_ASCII_DIGITS).split())
    return len(re.findall(r"\d+", text))


def _signs(text: str) -> int:
    """How many digits and other visible characters it has that are neither letters nor marks on letters."""
    if text.isascii():
        return len(text.encode().translate(None, _ASCII_NO_SIGNS))
    return sum(n for sign, n in Counter(text).items() if unicodedata.category(sign)[0] not in _NO_SIGNS)
