"""The stored notebooks are whole, and the comparison that guards them can fail."""

import re
import statistics
import subprocess
import sys

import nbformat
import pytest

from dalm_utils.config import PROJECT
from tests.helpers import PATIENCE
from tests.nbval_tolerance import RECORDED, snap, snap_outputs

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
IGNORED = "nbval-ignore-output"


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed_thin_and_private(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    lengths = [len(cell.source.splitlines()) for cell in cells]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 25
    outputs = str([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|Users|work)/", outputs), "an absolute path in an output"
    checked = [cell for cell in cells if IGNORED not in cell.metadata.get("tags", []) and cell.outputs]
    assert len(re.findall(r"\d\.\d+", str([cell.outputs for cell in checked]))) >= 10, "too few figures are checked"


def test_close_figures_pass_and_others_fail():
    stored = "NELBO 5.312 +- 0.041, better by 0.92"
    assert snap("NELBO 5.290 +- 0.043, better by 0.93", stored) == stored
    assert snap("NELBO 5.600 +- 0.041, better by 0.92", stored) != stored
    assert snap("NELBO 5.312, better by 0.92", stored) != stored
    assert snap("nelbo 5.312 +- 0.041, better by 0.92", stored) != stored
    assert snap("step 100", "step 101") != "step 101"  # whole numbers are compared to the letter


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_checked_figure_would_be_missed(path):
    """Change any one stored decimal by 12% and 0.1: the outputs no longer compare as equal."""
    for cell in code_cells(path):
        for output in cell.outputs:
            text = output.get("text", "")
            for number in re.finditer(r"\d+\.\d+", text):
                wrong = f"{float(number[0]) * 1.12 + 0.1:.4f}"
                changed = {**output, "text": text[: number.start()] + wrong + text[number.end() :]}
                assert snap_outputs([changed], [output])[0]["text"] != text


THIRD = "import sys\nprint('noise', file=sys.stderr)\nprint(f'a third is {1 / 3:.3f}')"


@pytest.mark.slow
def test_nbval_with_our_plugin_fails_where_a_figure_is_off(tmp_path):
    stored = [  # what the cell printed once, its tags, and whether 0.333 passes now
        ("0.333", [], True),
        ("0.338", [], True),
        ("0.400", [], False),
        ("0.333", [RECORDED], True),
        ("0.338", [RECORDED], False),
    ]
    notebook = nbformat.v4.new_notebook()
    for count, (printed, tags, _) in enumerate(stored, 1):
        output = nbformat.v4.new_output("stream", name="stdout", text=f"a third is {printed}\n")
        cell = nbformat.v4.new_code_cell(THIRD, execution_count=count, outputs=[output], metadata={"tags": tags})
        notebook.cells.append(cell)
    nbformat.write(notebook, tmp_path / "third.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "tests.nbval_tolerance", "-p", "no:cacheprovider", "-rA"]
    command += ["--nbval", "--nbval-current-env", "--rootdir", str(tmp_path), str(tmp_path / "third.ipynb")]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE).stdout
    verdicts = {int(cell): verdict == "PASSED" for verdict, cell in re.findall(r"^([A-Z]+) .*::Cell (\d+)", told, re.M)}
    assert [verdicts.get(number) for number in range(len(stored))] == [passes for *_, passes in stored], told
