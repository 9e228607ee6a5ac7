"""Each notebook, run anew, prints the figures that are stored in it.

This takes minutes for each. `make test` names this file; pytest alone does not collect it.
"""

import os
import subprocess
import sys

import pytest

from dalm_utils.config import PROJECT

# the longest first
NOTEBOOKS = ("01_gpt2_full_training", "03_galactica_adaptation", "02_shift_ablation")
COMMAND = [sys.executable, "-m", "pytest", "-p", "tests.nbval_tolerance", "--nbval", "--nbval-current-env"]


def test_every_notebook_is_checked():
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_prints_its_stored_figures(name):
    """On a CPU and in FP32, since that is how the stored figures were made, and from texts in the user's own cache."""
    environment = {key: value for key, value in os.environ.items() if key != "DALM_CACHE"}
    environment |= {"DALM_DEVICE": "cpu", "DALM_PRECISION": "fp32"}
    command = [*COMMAND, "-p", "no:cacheprovider", "-p", "no:xdist", f"notebooks/{name}.ipynb"]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
