"""Runs a notebook top to bottom, with its progress on the terminal."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

from ..config import PROJECT


def run_notebook(path: Path, *, in_place: bool = False) -> None:
    """Execute with the kernel's progress bars on the terminal; the results lie beside the run's checkpoints."""

    class Client(NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
                print(message["content"]["text"], end="", file=sys.stderr, flush=True)  # progress bars and warnings
                return None
            return super().process_message(message, cell, cell_index)

    notebook = nbformat.read(path, as_version=4)
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    begun = time.monotonic()

    def announce(cell, cell_index, **_):
        if cell.cell_type == "code" and cell.source.strip():
            first_line = next((line for line in cell.source.splitlines() if line.strip()), "")
            minutes = (time.monotonic() - begun) / 60
            print(f"[{minutes:4.1f} min] cell {code.index(cell_index) + 1}/{len(code)}: {first_line[:90]}", flush=True)

    client = Client(
        notebook,
        timeout=None,
        extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.on_cell_start = announce
    client.create_kernel_manager().shutdown_wait_time = 1200  # seconds; half of them to end a training step in
    target = path if in_place else PROJECT / "checkpoints" / "runs" / path.name
    failure = None
    try:
        client.execute()
    except CellExecutionError as error:
        failure = RuntimeError(f"a cell of {path.name} failed:\n{error}")
    except (AssertionError, DeadKernelError):  # nbclient's own, after Ctrl-C: its kernel is gone
        raise RuntimeError("stopped; the same command continues from the newest checkpoint") from None
    if failure is None or not in_place:  # a notebook under git is replaced by a whole run only
        target.parent.mkdir(parents=True, exist_ok=True)
        for cell in notebook.cells:  # when and how fast cells ran is nobody's business but the terminal's
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, target)
    if failure is not None:
        raise failure
    if not in_place:
        page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
        target.with_suffix(".html").write_text(page)
    print(f"\nfinished in {(time.monotonic() - begun) / 60:.1f} minutes")
    for output in notebook.cells[code[-1]].outputs:
        print(output.get("text", ""), end="")
    print(f"the executed notebook: {os.path.relpath(target)}")
    if not in_place:
        print(f"the same as a page:    {os.path.relpath(target.with_suffix('.html'))}")
