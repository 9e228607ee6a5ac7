"""A run's state on disk: whole checkpoints or none, and a history of one JSON line per logged step."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST = "manifest.json"


def write_whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder beside `folder`, sync it, and rename it into place: a reader sees all of it or nothing."""
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    fill(beside)
    (beside / MANIFEST).write_text(json.dumps({f.name: _digest(f) for f in sorted(beside.iterdir())}, indent=1))
    for path in [*beside.iterdir(), beside]:
        _sync(path)
    if folder.exists():  # a folder cannot be renamed onto another: move the old one aside until the new one stands
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    else:
        beside.rename(folder)
    _sync(folder.parent)
    return folder


def open_run(folder: Path, settings: dict, resume: str) -> None:
    """Make a run's folder, or make sure that the one there belongs to the same settings.

    Raises:
        ValueError: it belongs to other settings (each difference is named), and `resume` is not "never",
            which moves the earlier run aside.
    """
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, got {resume!r}")
    written = folder / "config.json"
    if written.exists() and resume == "never":
        aside = next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}.old{n}")).exists())
        folder.rename(aside)
    if not written.exists():
        folder.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(settings, indent=1))
    before = json.loads(written.read_text())
    changed = [
        f"{name}: {before.get(name)!r} then, {now!r} now" for name, now in settings.items() if before.get(name) != now
    ]
    if changed:
        raise ValueError(
            f"the run {folder.name!r} exists with other settings ({'; '.join(changed)}). "
            "Give this one another `name`, or pass resume='never' to move the old run aside."
        )


def is_whole(folder: Path) -> bool:
    """Whether every file stands there as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(_digest(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named on stderr and passed over."""
    for folder in sorted(run.glob("step-*[0-9]"), reverse=True):
        if is_whole(folder):
            return folder
        print(f"checkpoint {folder.name} is damaged and passed over", file=sys.stderr)
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; `best` is not among them."""
    for folder in sorted(run.glob("step-*[0-9]"))[:-keep]:
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class History:
    """What a run recorded, one dictionary per logged step, kept in `history.jsonl` while it grows.

    Keys: step, tokens, loss (mean since the last record), ratio, lr, grad_norm, seconds,
    tokens_per_second, and on evaluated steps nelbo (nats per token), nelbo_stderr, bits_per_byte; a
    generated text under sample. AR runs have nll in place of nelbo.
    """

    path: Path | None = None
    records: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, until: int | None = None) -> History:
        """Read a file back, up to step `until`; a last line that a crash cut short is dropped."""
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return cls(path, [r for r in records if until is None or r["step"] <= until])

    def append(self, record: dict) -> None:
        """Add a record, on disk first."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def rewrite(self) -> None:
        """Make the file say what `records` says."""
        beside = self.path.with_suffix(".unfinished")
        beside.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        beside.rename(self.path)

    def series(self, key: str, x: str = "step") -> tuple[list, list]:
        """The points at which `key` was recorded: ([x...], [value...])."""
        points = [(record[x], record[key]) for record in self.records if record.get(key) is not None]
        return [a for a, _ in points], [b for _, b in points]

    def last(self, key: str):
        """The newest value of `key`, or None."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    def window(self, key: str, first: int, last: int) -> float:
        """The mean of `key` over records with first <= step < last; steadier than any single value."""
        values = [r[key] for r in self.records if first <= r["step"] < last and r.get(key) is not None]
        if not values:
            raise ValueError(f"no record of {key!r} with {first} <= step < {last}")
        return sum(values) / len(values)
