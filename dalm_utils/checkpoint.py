"""A run's folder: checkpoints that are whole or absent, one writer at a time, and nothing touched but what it wrote."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import filelock

from .config import RunConfig
from .terminal import DISK_REFUSED, first_line, warn

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"  # in every folder that `write_whole` wrote, and in no other
CHECKPOINT = r"step-(?:\d{6}|[1-9]\d{6,})"
TEMPORARY = re.compile(rf"\.(?:(best|{CHECKPOINT})\.(unfinished|old)|(?:config\.json|history\.jsonl)\.unfinished)")
RUN_KEYS = ("model", "corpus", "total_steps")  # in the config.json of every run, and not of a model
FRESH = "pass resume='never', in a terminal --fresh"
DEFAULTS = {field.name: field.default for field in fields(RunConfig)}
DEFAULTS["train_blocks_are"] = "the first"  # of the text; later versions sample them over its documents
RESUMABLE = {  # how to resume after all, where only this setting differs
    "adapted": "The model is not the one that the run began with: build or load the base again to resume it. ",
    "total_steps": "A run takes more steps when it has finished and its last checkpoint is there; if `patience` ended "
    "it before, raise that first. ",
    "precision": "Machines differ in the precision they choose: to resume, pass that of then, as in precision=bf16. ",
    "global_batch": "It resumes on another number of processes if `batch` x `accumulate` x processes stays the same. ",
    "corpus": "The text has changed, as docstrings do when packages are upgraded, so the run cannot resume. ",
}
NOT_COMPARED = {"text", "field"}  # where the tokens came from; a digest of the tokens is compared instead
MACHINE_KEYS = ("seconds", "tokens_per_second", "memory", "eta")  # of a record: they differ when a run is repeated

CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # errno of a disk that cannot sync folders
IS_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # errno of a lock that another process holds
PROBE = 2**20  # bytes that are written to find out whether a disk is full
LOCK_WAIT = 1.0  # seconds; a process that calls `is_claimed` holds a lock for a moment


# ---------------------------------------------------------------------------------------- whole or absent
def write_whole(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder beside `folder`, sync it, and rename it into place: a reader sees all of it or nothing.

    An error, or an interruption, leaves what was there untouched, and no half-written folder behind.

    Raises:
        OSError: the disk refused to write, whatever the library that noticed made of it.
        FileExistsError: what is there was not written by this function.
    """
    if _is_foreign(folder):
        raise FileExistsError(f"{folder} has no {MANIFEST}, so it was not written here; move it elsewhere")
    beside, old = _beside(folder, "unfinished"), _beside(folder, "old")
    _delete(beside)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        digests = {path.relative_to(beside).as_posix(): _digest(path) for path in files}
        write_file(beside / MANIFEST, json.dumps(digests, indent=1))
        sync(*beside.rglob("*"), beside)
    except BaseException as error:
        try:
            _raise_hidden_refusal(error, beside)
        finally:
            _delete(beside)
        raise
    if folder.exists():  # a folder cannot be renamed onto another: the old one steps aside, see `_recover`
        _discard(old, folder)
        folder.rename(old)
    beside.rename(folder)
    _discard(old, folder)
    sync(folder.parent)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file in the folder is what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return isinstance(manifest, dict) and all(_digest(folder / name) == manifest[name] for name in manifest)
    except (OSError, ValueError):
        return False


def write_file(path: Path, text: str) -> None:
    """Replace a small file in one move; it keeps its permissions."""
    beside = _beside(path, "unfinished")
    try:
        beside.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, beside)
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def require_writable(folder: Path, remedy: str = "") -> None:
    """Make a folder if it is missing. Raises OSError, with the remedy, if no file can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}){remedy}") from error


def acquire(lock: filelock.BaseFileLock, timeout: float, elsewhere: str) -> None:
    """Wait for a lock, for at most `timeout` seconds if that is not negative.

    Args:
        elsewhere: what names another folder, for the error.

    Raises:
        filelock.Timeout: another process holds it.
        OSError: the disk has no locks.
    """
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise
    except OSError as error:
        folder = Path(lock.lock_file).parent
        raise OSError(f"{folder} cannot be locked ({error.strerror}); {elsewhere} names another folder") from error


def sync(*paths: Path) -> None:
    """Flush files and folders to the disk, so that they survive a power cut.

    Some network disks cannot flush a folder, and Windows cannot even open one: there, only files are flushed.
    """
    for path in paths:
        is_folder = path.is_dir()
        if is_folder and os.name == "nt":
            continue
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not (is_folder and error.errno in CANNOT_SYNC):
                raise
        finally:
            os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    """The hidden name under which a file or folder exists for a moment. Nobody else would choose it."""
    return path.with_name(f".{path.name}.{kind}")


def _is_foreign(folder: Path) -> bool:
    """Whether something is there that `write_whole` did not write."""
    if folder.is_dir():
        return any(folder.iterdir()) and not (folder / MANIFEST).is_file()
    return folder.exists()


def _raise_hidden_refusal(error: BaseException, folder: Path) -> None:
    """Raise OSError if the disk refused to write, and a library made an error of its own kind of it.

    There are two ways to find out. Libraries written in Rust, one of which deletes its own half-written file, quote the
    number of the system's error. For others the disk is asked for a few more bytes, past the end of the longest file in
    `folder`, while what was written there still fills it.
    """
    if isinstance(error, OSError) or not isinstance(error, Exception):
        return
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    if quoted and int(quoted[1]) in DISK_REFUSED:
        raise OSError(int(quoted[1]), os.strerror(int(quoted[1]))) from error
    with (folder / ".probe").open("wb") as probe:
        probe.seek(max(path.stat().st_size for path in folder.rglob("*")))
        probe.write(bytes(PROBE))
        probe.flush()
        os.fsync(probe.fileno())


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _discard(old: Path, place: Path) -> None:
    """Delete a folder that `write_whole` wrote at `place`; keep it under a free name if others wrote in it, too."""
    if _others(old):
        kept = old.rename(free(place, "old"))
        warn(f"the earlier {place.name} was kept as {kept.name}, since it holds files that were added or changed")
    elif old.exists():  # it is renamed first, since half of a folder would look like one with other files
        beside = _beside(place, "unfinished")
        _delete(beside)
        with contextlib.suppress(OSError):
            _delete(old.rename(beside))


def _others(folder: Path) -> list[Path]:
    """The files in a folder that its manifest does not name, or that were changed after it was written."""
    manifest = folder / MANIFEST
    try:
        written = manifest.stat().st_ctime_ns  # which, unlike mtime, a file that is moved here cannot bring along
        digests = {**json.loads(manifest.read_bytes())}
    except (OSError, ValueError, TypeError):
        return [path for path in folder.rglob("*") if not path.is_dir()]

    def is_ours(path: Path) -> bool:
        digest = digests.get(path.relative_to(folder).as_posix())
        return digest is not None and (path.stat().st_ctime_ns <= written or _digest(path) == digest)

    return [path for path in folder.rglob("*") if not path.is_dir() and path != manifest and not is_ours(path)]


def free(path: Path, kind: str) -> Path:
    """The first of `path`.kind1, `path`.kind2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.{kind}{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_end(record: dict, total: int) -> bool:
    """Whether a record of a run's curve is that of its end, after `total` steps or where `patience` ended it."""
    return record.get("step", 0) >= total or record.get("event", "").startswith("finished")


def _has_ended(history: Path, total: int) -> bool:
    """Whether the last record of a run's curve is that of its end; False for a curve that cannot be read."""
    try:
        return is_end(json.loads(history.read_bytes().splitlines()[-1]), total)
    except (OSError, IndexError, AttributeError, TypeError, ValueError):
        return False


# --------------------------------------------------------------------------------------------- the folder
class RunFolder:
    """The folder of one run: `open` claims it for this process, `close` releases it.

    It holds `step-000500/` (a whole checkpoint), `best/`, `history.jsonl` and `config.json`. Whatever else is in it
    stays as it is.
    """

    def __init__(self, path: Path):
        self.path = path
        place = path.resolve() if path.is_symlink() else path  # every path to a run leads to the same lock
        self._lock = filelock.FileLock(_beside(place, "lock"), thread_local=False)
        self._writer = ThreadPoolExecutor(1)  # one thread, started when it is first used: two writes never overlap
        self._writes: list[Future] = []

    def open(self, settings: dict, resume: str = "auto") -> Path | None:
        """Claim the folder for these settings; returns its newest whole checkpoint, or None.

        Damaged checkpoints are named on stderr and moved aside.

        Args:
            settings: what a resumed run must have in common with the run it resumes.
            resume: "auto" resumes an earlier run, "never" moves it aside.

        Raises:
            RuntimeError: another process is writing there.
            ValueError: the folder belongs to other settings (each difference is named), or its config.json is damaged
                or not a run's.
            FileNotFoundError: the folder has checkpoints, but no config.json.
            FileExistsError: a file that the run would replace is not a run's.
            OSError: the folder cannot be written.
        """
        if resume not in ("auto", "never"):
            raise ValueError(f"resume must be auto or never, got {resume!r}")
        require_writable(self.path.parent, "; `runs`, or DALM_RUNS in the environment, names another folder")
        try:
            acquire(self._lock, LOCK_WAIT, "`runs`, or DALM_RUNS in the environment,")
        except filelock.Timeout:
            raise RuntimeError(
                f"another process is writing to the run {self.path.name!r}; wait for it or stop it, "
                "or give this one another `name`"
            ) from None
        try:
            if self.path.is_dir():
                require_writable(self.path, "; give this run another `name`, or change the folder's permissions")
            self._recover()
            if resume == "never" and self._is_run():
                self.path.rename(free(self.path, "old"))
            earlier = self._agree(settings)
            newest = self.newest()
            if newest is None:
                self._keep_results(earlier)
            if settings != earlier:
                self.path.mkdir(parents=True, exist_ok=True)
                write_file(self.path / "config.json", json.dumps(settings, indent=1))
            return newest
        except BaseException:
            self.close()
            raise

    def _keep_results(self, earlier: dict | None) -> None:
        """Keep the best model, curve and settings of a run that has lost its checkpoints, before it starts over.

        A run that was killed before its first checkpoint has lost none, and makes the same best model again.
        """
        config, best, history = (self.path / name for name in ("config.json", "best", "history.jsonl"))
        found = [path for path in (best, history) if path.exists()]
        set_aside = any(self.path.glob("config.json.old*"))  # before, when the run lost the checkpoints that lie here
        had_checkpoints = any(self.path.glob("step-*")) and not set_aside
        if earlier is None or not found or not (had_checkpoints or _has_ended(history, earlier["total_steps"])):
            return
        kept = [free(config, "old")]
        shutil.copy(config, kept[0])  # a copy, since a folder without config.json is no run's
        kept += [path.rename(free(path, "old")) for path in found]
        warn(
            f"{self.path.name} has no checkpoint to resume, so it starts over; what it had is now "
            f"{', '.join(path.name for path in kept)}"
        )

    def close(self) -> None:
        """Let other processes write here again, as soon as everything is written."""
        self._writes.append(self._writer.submit(self._lock.release))  # even if waiting for it is interrupted
        self.wait()

    def is_claimed(self) -> bool:
        """Whether some process is writing here now. Needs no permission to write, and keeps no process from starting.

        A shared lock fails only if a writer holds its own, and `open` waits for longer than it is held here.
        """
        if sys.platform == "win32":
            try:
                with self._lock.acquire(timeout=0):
                    return False
            except filelock.Timeout:
                return True
        try:
            lock = os.open(self._lock.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError as error:
            return error.errno in IS_LOCKED  # another one comes from a disk without locks
        finally:
            os.close(lock)

    # -- checkpoints ------------------------------------------------------------------------------------
    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first; whole ones, once the folder is open."""
        return [folder for folder in self._steps() if (folder / MANIFEST).is_file()]

    def newest(self) -> Path | None:
        """The newest whole checkpoint. Damaged ones are named on stderr and moved aside."""
        for folder in reversed(self._steps()):
            if is_whole(folder):
                return folder
            if _is_foreign(folder):
                warn(f"{folder.name} is damaged or not a checkpoint: it has no {MANIFEST}; left alone and passed over")
            elif (folder / MANIFEST).is_file():
                aside = folder.rename(free(folder, "damaged"))
                warn(f"checkpoint {folder.name} is damaged; moved to {aside.name} and passed over")
        return None

    def write(self, name: str, fill: Callable[[Path], None]) -> bool:
        """Write a folder whole. A disk that refuses is reported, not raised: False, and what was there still is."""
        try:
            write_whole(self.path / name, fill)
            return True
        except OSError as error:
            reason = error.strerror or first_line(error)
            newest = next((folder.name for folder in reversed(self.checkpoints())), "none yet")
            warn(f"{name} could not be written ({reason}); training goes on. The newest whole checkpoint: {newest}")
            return False

    def write_later(self, name: str, fill: Callable[[Path], None], then: Callable[[], None]) -> None:
        """Write a folder in the background, after those before it, and call `then` if the disk did not refuse.

        Nothing that `fill` reads may change until `wait` returns.
        """

        def write() -> None:
            if self.write(name, fill):
                then()

        self._writes.append(self._writer.submit(write))

    def wait(self) -> None:
        """Wait until all that is to be written in the background is written. Raises what `fill` raised there."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints, and none in which there are other files."""
        for folder in self.checkpoints()[:-keep]:
            if not _others(folder):
                _discard(folder, folder)

    def _steps(self) -> list[Path]:
        folders = [path for path in self.path.glob("step-*") if re.fullmatch(CHECKPOINT, path.name)]
        return sorted(folders, key=step_of)

    # -- whose folder it is -----------------------------------------------------------------------------
    def settings(self) -> dict | None:
        """The settings in config.json, which every run writes first; None if no run has begun here.

        Raises:
            FileNotFoundError, ValueError, FileExistsError: as `open`.
        """
        file, history = self.path / "config.json", self.path / "history.jsonl"
        remedy = f"give this run another `name`, or move what is in {self.path} elsewhere"
        if self._has_checkpoints():
            remedy = f"put the right one back, or move the run aside: {FRESH}"
        if not file.exists():
            if self._has_checkpoints():
                raise FileNotFoundError(f"{file} is missing, but there are checkpoints beside it; {remedy}")
            if history.exists():
                raise FileExistsError(f"{history} would be replaced, but no run wrote it; {remedy}")
            return None
        try:
            settings = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}); {remedy}") from None
        missing = ", ".join(key for key in RUN_KEYS if not isinstance(settings, dict) or key not in settings)
        if missing:
            raise ValueError(f"{file} is not the config.json of a run (it lacks {missing}); {remedy}")
        return settings

    def _agree(self, settings: dict) -> dict | None:
        """Compare the settings with those of the run that is here, and return these; None if there is no run."""
        earlier = self.settings()
        best = self.path / "best"
        if _is_foreign(best):
            raise FileExistsError(f"{best} would be replaced, but no run wrote it; move it elsewhere")
        if earlier is None or not self._has_checkpoints():  # without a checkpoint there is nothing to resume
            return earlier
        before = DEFAULTS | earlier  # a field newer than the run had its default
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
            hints = [hint for name, hint in RESUMABLE.items() if refused == {name}]
            raise ValueError(
                f"the run {self.path.name!r} exists with other settings ({'; '.join(differences)}). "
                f"{''.join(hints)}Give this one another `name`, or move the old run aside: {FRESH}."
            )
        return earlier

    def _has_finished(self, step: int) -> bool:
        return any(step_of(folder) >= step for folder in self.checkpoints())

    def _has_checkpoints(self) -> bool:
        return bool(self.checkpoints()) or (self.path / "best" / MANIFEST).is_file()

    def _is_run(self) -> bool:
        """Whether a run of ours is in the folder, even if its settings are lost."""
        try:
            return self._has_checkpoints() or self.settings() is not None
        except (OSError, ValueError):
            return False

    def _recover(self) -> None:
        """Undo what a killed process left: half-written folders, and an old one that had just stepped aside."""
        for path in [*self.path.glob(".*")]:
            name = TEMPORARY.fullmatch(path.name)
            if name is None:
                continue
            if name[2] != "old":
                _delete(path)
            elif (place := path.with_name(name[1])).exists():
                _discard(path, place)
            else:
                path.rename(place)


# ---------------------------------------------------------------------------------------------- small things
def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))
