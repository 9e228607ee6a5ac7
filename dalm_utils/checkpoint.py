"""A run's folder on disk: whole checkpoints or none, one writer at a time, and a history that outlives both."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError

from .config import RunConfig

MANIFEST = "manifest.json"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full or read-only disk raises, library by library
DEFAULTS = {field.name: field.default for field in fields(RunConfig)}
NOT_COMPARED = {"text", "field"}  # where the tokens came from; a digest of the tokens is compared instead
MACHINE_KEYS = ("seconds", "tokens_per_second", "memory", "eta")  # of a record: they differ when a run is repeated


# ---------------------------------------------------------------------------------------- whole or absent
def write_whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder beside `folder`, sync it, and rename it into place: a reader sees all of it or nothing.

    An error, or an interruption, leaves what was there untouched, and no half-written folder behind.
    """
    beside = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        write_file(beside / MANIFEST, json.dumps({f.name: _digest(f) for f in sorted(beside.iterdir())}, indent=1))
        sync(*beside.iterdir(), beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():  # a folder cannot be renamed onto another: the old one steps aside, see `_recover`
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        beside.rename(folder)
    sync(folder.parent)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file stands there as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(_digest(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def write_file(path: Path, text: str) -> None:
    """Replace a small file in one move."""
    beside = path.with_name(f"{path.name}.unfinished")
    try:
        beside.write_text(text)
        sync(beside)
        beside.replace(path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(*paths: Path) -> None:
    """Have files and folders on the disk itself, where a power cut leaves them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------- the folder
class RunFolder:
    """The folder of one run: `open` claims it for this process, `close` gives it back.

    It holds `step-000500/` (a whole checkpoint), `best/`, `history.jsonl` and `config.json`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)

    def open(self, settings: dict, resume: str = "auto") -> Path | None:
        """Claim the folder for these settings; returns its newest whole checkpoint, or None.

        Damaged checkpoints are named on stderr and moved aside.

        Raises:
            RuntimeError: another process is writing there.
            ValueError: the folder belongs to other settings (each difference is named), and `resume` is not
                "never", which moves the earlier run aside.
        """
        if resume not in ("auto", "never"):
            raise ValueError(f"resume must be auto or never, got {resume!r}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RuntimeError(
                f"another process is writing to the run {self.path.name!r}; wait for it or stop it, "
                "or give this one another `name`"
            ) from None
        try:
            if resume == "never":
                self._move_aside()
            self._agree(settings)
            self._recover()
            return self.newest()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write here again."""
        self._lock.release()

    def is_claimed(self) -> bool:
        """Whether some process is writing here now."""
        try:
            with self._lock.acquire(timeout=0):
                return False
        except filelock.Timeout:
            return True

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; whole ones, once the folder is open."""
        return sorted(self.path.glob("step-*[0-9]"), key=step_of)

    def write(self, name: str, fill: Callable[[Path], None]) -> bool:
        """Write a folder whole. A disk that refuses is reported, not raised: False, and what was there still is."""
        try:
            write_whole(self.path / name, fill)
            return True
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, but not the disk's
        except WRITE_ERRORS as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            newest = next((folder.name for folder in reversed(self.checkpoints())), "none yet")
            warn(f"{name} could not be written ({reason}); training goes on. The newest whole checkpoint: {newest}")
            return False

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints; `best` is not among them."""
        for folder in self.checkpoints()[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)

    def _move_aside(self) -> None:
        if self.path.exists():
            free = (self.path.with_name(f"{self.path.name}.old{n}") for n in itertools.count(1))
            self.path.rename(next(path for path in free if not path.exists()))

    def _agree(self, settings: dict) -> None:
        written = self.path / "config.json"
        models = [*self.path.glob("step-*"), *self.path.glob("best*")]
        if not written.exists() or not models:  # a run that ended before its first checkpoint binds nobody
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(written, json.dumps(settings, indent=1))
        before = DEFAULTS | json.loads(written.read_text())  # a field newer than the run had its default
        changed = {name: now for name, now in settings.items() if before.get(name, now) != now}
        refused = changed.keys() - NOT_COMPARED
        if (
            refused == {"total_steps"}
            and self._has_finished(before["total_steps"])
            and not self._has_finished(settings["total_steps"])
        ):
            refused = set()  # a finished run may be given more steps
        if refused:
            differences = [f"{name}: {before[name]!r} then, {now!r} now" for name, now in changed.items()]
            raise ValueError(
                f"the run {self.path.name!r} exists with other settings ({'; '.join(differences)}). "
                "Give this one another `name`, or move the old run aside: pass resume='never', in a terminal --fresh."
            )
        if changed:
            write_file(written, json.dumps(settings, indent=1))

    def _has_finished(self, step: int) -> bool:
        return any(step_of(folder) >= step for folder in self.checkpoints())

    def _recover(self) -> None:
        """Undo what a killed process left: half-written folders, and an old one that had just stepped aside."""
        for folder in self.path.glob("*.unfinished"):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        for old in self.path.glob("*.old"):
            place = old.with_suffix("")
            shutil.rmtree(old) if place.exists() else old.rename(place)

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are named on stderr and moved aside."""
        for folder in reversed(self.checkpoints()):
            if is_whole(folder):
                return folder
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            warn(f"checkpoint {folder.name} is damaged; moved to {aside.name} and passed over")
        return None


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def warn(message: str) -> None:
    """One line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)
