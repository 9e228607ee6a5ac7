"""Runs a notebook top to bottom, with its progress on the terminal."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import html
import os
import re
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jinja2 import pass_context
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

from ..checkpoint import free, require_writable, write_file
from ..config import display_path, profile_name, runs_folder
from ..terminal import despite_lost_output, first_line, stop_signals, warn

RECORD = ".notebooks"  # the hashes of all files that were written to the folder of runs, one per line
ORIGIN = "dalm_utils"  # in the metadata of a notebook there: which one was run, and in which profile
STARTUP = 600  # seconds that a kernel may take to begin, on a busy machine
SHUTDOWN = 1200  # seconds that a kernel may take to end in the middle of a cell: a training step may take minutes
IDLE_SHUTDOWN = 20  # seconds that an idle one may take: now and then ipykernel's threads wait for each other forever


def run_notebook(path: Path, *, in_place: bool = False) -> int | None:
    """Execute a notebook in a kernel of this Python, whatever kernel the notebook names.

    The executed notebook, and an HTML page of it, go to the folder of runs, and with `in_place` into the notebook
    itself. If a cell fails, the kernel dies or a signal stops it, the notebook is not touched, and the outputs so far
    go to NAME.unfinished.ipynb in the folder of runs. The same happens if the notebook was changed while it ran with
    `in_place`. A file in the folder of runs is replaced only if this function wrote it; results of another notebook or
    profile, and an unfinished run that got further, are kept under another name.

    Returns:
        The signal that stopped the run, see `stop_signals`, or None.

    Raises:
        ValueError: the file is not a notebook, or not one of Python.
        OSError: the results cannot be written. This is checked before the first cell runs.
        RuntimeError: a cell failed, the kernel died, or the notebook was changed meanwhile.
    """
    notebook, results = _read(path), _plan(path, in_place)
    unchanged = _digest(path.read_bytes())
    client = Client(notebook, path.parent)
    try:
        client.execute()
        if client.stopped_by:
            raise RuntimeError("stopped in the last cell")
    except BaseException as error:
        kept = _keep(notebook, results)
        if client.stopped_by:
            warn(f"stopped in {client.current}. {kept}")
            return client.stopped_by
        if isinstance(error, (CellExecutionError, RuntimeError)):
            raise RuntimeError(f"{client.explain(path.name, error)}. {kept}") from None
        raise
    finally:
        client.stop_listening()
        if client.km is None:  # the kernel is gone, and of one that did not start nbclient keeps this
            atexit.unregister(client._cleanup_kernel)
    if in_place:
        if not path.exists() or _digest(path.read_bytes()) != unchanged:
            raise RuntimeError(f"{path} was changed while it ran, and stays as it is. {_keep(notebook, results)}")
        _write(results.notebook, nbformat.writes(notebook), record=False)
    else:
        _save(results.notebook, notebook, results)
    if results.page:
        if results.page.exists() and not _is_ours(results.page):  # edited meanwhile
            results.page.rename(free(results.page, "old"))
        _write(results.page, Page(template_name="classic").from_notebook_node(notebook)[0], record=True)
    print(f"\nfinished in {client.minutes:.1f} minutes")
    for output in client.code[-1].outputs if client.code else []:
        print(output.get("text", ""), end="")
    print(f"the executed notebook: {display_path(results.notebook)}")
    if results.page:
        print(f"the same as a page:    {display_path(results.page)}")
    return None


def _keep(notebook: nbformat.NotebookNode, results: Results) -> str:
    """Save the outputs of a run that did not get to its end, and say where they are."""
    try:
        _save(results.unfinished, notebook, results)
    except OSError as error:
        where = f"could not be written to {display_path(results.unfinished)} ({error.strerror})"
    else:
        where = f"are in {display_path(results.unfinished)}"
    return f"The outputs so far {where}; the same command resumes training from the newest checkpoint"


# ----------------------------------------------------------------------------------------------- the kernel
class ThisPython(KernelSpecManager):
    """Knows one kernel, that of this Python, under every name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Manager(AsyncKernelManager):
    """Interrupts its kernel only while that executes a cell, where the interrupt reaches the cell.

    Anywhere else it would reach the kernel's own code, which answers with a traceback or by never ending. And
    `shutdown_kernel` interrupts first, whatever the kernel does.
    """

    is_executing = False

    async def _async_interrupt_kernel(self) -> None:
        if self.is_executing:
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel


class Client(NotebookClient):
    """Runs the cells of a notebook, prints the progress, and stops at the end of a cell when a signal asks for it.

    The first Ctrl-C, SIGTERM or hangup interrupts the cell in progress, like the stop button of Jupyter: training
    finishes its step and writes a checkpoint. The second one kills the kernel.

    A kernel that executes nothing is interrupted as soon as it says that it executes the next cell.
    """

    def __init__(self, notebook: nbformat.NotebookNode, folder: Path):
        super().__init__(
            notebook, timeout=None, startup_timeout=STARTUP, record_timing=False,
            extra_arguments=["--log-level=CRITICAL"], resources={"metadata": {"path": str(folder)}},
        )  # fmt: skip
        self.code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        self.current = "the start of the kernel"  # what it does now, in words
        self.stopped_by: int | None = None
        self.exit_status: int | None = None  # of a kernel that died
        self.heard: list[signal.Signals] = []  # until `stop_listening`
        self.begun = time.monotonic()
        self.on_cell_start, self.on_cell_executed = self._announce, self._rest
        self.on_notebook_error = self._ask_exit_status

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = Manager(kernel_spec_manager=ThisPython(), shutdown_wait_time=IDLE_SHUTDOWN)
        return self.km

    async def async_start_new_kernel(self, **options) -> None:
        self.loop, self.heard = asyncio.get_running_loop(), stop_signals()
        for kind in self.heard:
            self.loop.add_signal_handler(kind, self._stop, kind)  # instead of nbclient's, which shuts the kernel down
        await super().async_start_new_kernel(**options)

    def stop_listening(self) -> None:
        """Leave later signals to this process: the loop would keep them for the next notebook that runs in it."""
        for kind in self.heard:
            self.loop.remove_signal_handler(kind)

    def _stop(self, kind: signal.Signals) -> None:
        if self.stopped_by == kind and kind.name == "SIGHUP":
            return  # the shell and the system may both report the same hangup
        again, self.stopped_by = self.stopped_by is not None, kind
        warn(f"stopping {self.current}" + ("" if again else "; once more kills it"))
        if self.km is not None and self.km.has_kernel:
            self._send(self.km.shutdown_kernel(now=True) if again else self.km.interrupt_kernel())

    def _send(self, request) -> None:
        self._request = asyncio.ensure_future(request)  # kept, since the loop holds tasks weakly

    def _announce(self, cell: nbformat.NotebookNode, **_) -> None:
        if self.stopped_by:
            raise RuntimeError("stopped")
        if cell.cell_type == "code" and cell.source.strip():
            number = next(n for n, other in enumerate(self.code, 1) if other is cell)
            line = next(text for text in cell.source.splitlines() if text.strip())[:90]
            self.current = f"cell {number} of {len(self.code)} ({line})"
            with despite_lost_output():
                print(f"[{self.minutes:4.1f} min] cell {number}/{len(self.code)}: {line}", flush=True)

    def _rest(self, **_) -> None:
        self._set_executing(False)

    def _set_executing(self, executing: bool) -> None:
        if isinstance(self.km, Manager):
            self.km.is_executing = executing
            self.km.shutdown_wait_time = SHUTDOWN if executing else IDLE_SHUTDOWN

    async def _ask_exit_status(self, **_) -> None:
        if self.km is not None and self.km.provisioner is not None:
            self.exit_status = await self.km.provisioner.poll()

    def process_message(self, message, cell, cell_index):
        if message["msg_type"] == "execute_input":
            self._set_executing(True)
            if self.stopped_by and self.km is not None:
                self._send(self.km.interrupt_kernel())
        if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
            warn(message["content"]["text"], end="")  # progress bars and warnings
            return None
        return super().process_message(message, cell, cell_index)

    def explain(self, name: str, error: Exception) -> str:
        """What went wrong, for the user of a notebook of this name."""
        if isinstance(error, CellExecutionError):
            return f"{error}\n{self.current} of {name} failed"
        if not isinstance(error, DeadKernelError):
            return f"the kernel of {name} failed: {error}"
        status = self.exit_status or 0
        if status < 0:
            how = f"killed by signal {-status} ({signal.strsignal(-status)}), perhaps because memory ran out"
        else:
            how = f"with exit status {status}"
        return f"the kernel of {name} died in {self.current}, {how}"


# ------------------------------------------------------------------------------------------------- the page
FORMULA = re.compile(
    r"<code.*?</code>|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$]*[^\s$\\])?)\$(?![\w$])", re.DOTALL
)


class Page(HTMLExporter):
    """A page whose formulas are MathML, which browsers show by themselves; MathJax would come from the network."""

    @pass_context
    def markdown2html(self, context, source):
        return FORMULA.sub(_mathml, super().markdown2html(context, source))


def _mathml(found: re.Match) -> str:
    if found.lastgroup is None:  # dollars in code
        return found[0]
    try:
        return convert(html.unescape(found[found.lastgroup]), display=found.lastgroup)
    except Exception:  # whatever a formula that it does not know leads to; MathJax may know it
        return found[0]


# ------------------------------------------------------------------------------------------------ the files
def _read(path: Path) -> nbformat.NotebookNode:
    """A notebook in the current format, without the outputs of earlier runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cells without an id, which get one
            notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        for name in ("widgets", ORIGIN):
            notebook.metadata.pop(name, None)
        language = _language(notebook.metadata)
        _validate(notebook)
    except OSError:
        raise
    except Exception as error:  # nbformat lets through whatever a malformed file leads to
        raise ValueError(f"{path} is not a notebook: {first_line(error)}") from error
    if "python" not in language.lower():
        raise ValueError(f"{path} is a notebook of {language}; only those of Python can be run")
    return notebook


def _language(metadata: dict) -> str:
    for name, field in (("language_info", "name"), ("kernelspec", "language")):
        about = metadata.get(name)
        if isinstance(about, dict) and isinstance(about.get(field), str):
            return about[field]
    return "python"


def _validate(notebook: nbformat.NotebookNode) -> None:
    """Check against nbformat's schema; what the notebook says about its kernel may be wrong, and is dropped then."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError:
        for name in ("kernelspec", "language_info"):
            notebook.metadata.pop(name, None)
        nbformat.validate(notebook)


@dataclass(frozen=True)
class Results:
    """Where the results of a notebook go."""

    notebook: Path
    page: Path | None
    unfinished: Path  # the outputs of a run that does not get to its end
    origin: dict  # which notebook was run, and in which profile


def _plan(path: Path, in_place: bool) -> Results:
    """Where the results will go. Raises OSError if they cannot be written, ValueError if they would replace `path`."""
    runs = runs_folder()
    require_writable(runs, "; DALM_RUNS names another folder")
    unfinished = runs / f"{path.stem}.unfinished.ipynb"
    origin = {"source": str(path.resolve()), "profile": profile_name()}
    _check_ours(unfinished)
    if in_place:
        target = path.resolve()
        require_writable(target.parent)
        if not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
            raise PermissionError(f"{path} is read-only")
        return Results(target, None, unfinished, origin)
    target, page = runs / path.name, runs / f"{path.stem}.html"
    if target.exists() and target.samefile(path):
        raise ValueError(f"{path} is where its own results would go; pass --in-place to write them into it")
    _check_ours(target)
    _check_ours(page)
    return Results(target, page, unfinished, origin)


def _check_ours(path: Path) -> None:
    """Raise FileExistsError for what is not ours to replace, see `_is_ours`."""
    if path.exists() and not _is_ours(path):
        raise FileExistsError(f"{path} was not written by this command, or was changed since; move it to another place")


def _is_ours(path: Path) -> bool:
    """Whether `_write` wrote this file, and nobody has changed it since."""
    return path.is_file() and _digest(path.read_bytes()) in _record_of(path).split()


def _save(path: Path, notebook: nbformat.NotebookNode, results: Results) -> None:
    """Write an executed notebook to the folder of runs; one that it must not replace is renamed, and so is its page."""
    notebook.metadata[ORIGIN] = results.origin
    if path.exists() and not _may_replace(path, notebook, path == results.unfinished):
        kept = path.rename(free(path, "old"))
        if path == results.notebook and results.page and results.page.exists():
            results.page.rename(free(results.page, "old"))
        warn(
            f"the earlier {path.name} was kept as {kept.name}, since it is of another notebook or profile, "
            "got further, or was edited meanwhile"
        )
    _write(path, nbformat.writes(notebook), record=True)


def _may_replace(path: Path, new: nbformat.NotebookNode, unfinished: bool) -> bool:
    """Whether a file has results of the same notebook and profile, and of an unfinished run that got no further."""
    if not _is_ours(path):
        return False
    old = nbformat.read(path, as_version=4)
    executed = [sum(cell.get("execution_count") is not None for cell in one.cells) for one in (old, new)]
    return old.metadata.get(ORIGIN) == new.metadata[ORIGIN] and not (unfinished and executed[0] > executed[1])


def _write(path: Path, text: str, *, record: bool) -> None:
    """Replace a file in one move, and with `record` remember that it is ours to replace."""
    content = f"{text.rstrip()}\n".encode("utf-8", "replace")
    if record:
        with path.with_name(RECORD).open("a") as file:
            file.write(f"{_digest(content)}\n")
    write_file(path, content.decode())


def _record_of(path: Path) -> str:
    record = path.with_name(RECORD)
    return record.read_text(errors="replace") if record.exists() else ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
