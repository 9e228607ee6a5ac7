"""A pytest plugin: nbval compares printed decimals within a tolerance, and everything else to the letter.

Training on another processor, or with another number of threads, ends with slightly different numbers. A
decimal that lies close enough to its stored twin is replaced by it before nbval compares; a figure that is
off, or any other difference in the text, still fails. Cells with the tag "recorded" print what stands in a file,
which is the same everywhere, and are compared to the letter. Progress bars and warnings (stderr) are not compared.
"""

import copy
import math
import re

RELATIVE, ABSOLUTE = 0.03, 0.006
PATIENCE = 1800  # seconds until a kernel has started or handed over its outputs: a slow machine is no failure
RECORDED = "recorded"
DECIMAL = re.compile(r"-?\d+\.\d+")


def snap(text: str, stored: str) -> str:
    """`text` with each decimal that is close to its stored twin replaced by it; other texts come back as they are."""
    ours, theirs = DECIMAL.findall(text), DECIMAL.findall(stored)
    if len(ours) != len(theirs):
        return text
    chosen = (b if is_close(float(a), float(b)) else a for a, b in zip(ours, theirs, strict=True))
    return DECIMAL.sub(lambda _: next(chosen), text)


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def snap_outputs(test: list, stored: list) -> list:
    """The same for a cell's outputs, pair by pair, where their number and kinds agree."""
    if len(test) != len(stored):
        return test
    snapped = []
    for ours, theirs in zip(test, stored, strict=True):
        ours = copy.deepcopy(ours)
        if "text" in ours and "text" in theirs:
            ours["text"] = snap(ours["text"], theirs["text"])
        if "data" in ours and "data" in theirs:
            ours["data"] = {
                kind: snap(value, theirs["data"][kind])
                if kind.startswith("text/") and kind in theirs["data"]
                else value
                for kind, value in ours["data"].items()
            }
        snapped.append(ours)
    return snapped


def without_stderr(outputs: list) -> list:
    return [output for output in outputs if output.get("name") != "stderr"]


def pytest_configure(config):
    from nbval.plugin import IPyNbCell  # takes seconds

    compare = IPyNbCell.compare_outputs

    def compare_outputs(self, test, ref, skip_compare=None):
        test, ref = without_stderr(test), without_stderr(ref)
        if RECORDED not in self.cell.metadata.get("tags", []):
            test = snap_outputs(test, ref)
        return compare(self, test, ref, skip_compare)

    IPyNbCell.compare_outputs = compare_outputs
    config.option.nbval_kernel_startup_timeout, config.option.nbval_cell_timeout = PATIENCE, 10 * PATIENCE


def pytest_collection_modifyitems(items):
    for cell in items:  # all of them are cells: nothing but a notebook is collected
        cell.output_timeout = PATIENCE
