# make run     run notebook 1 from top to bottom (minutes; no GPU, and no network after the set-up)
# make check   lint, types and the fast tests: two minutes on two slow cores
# make test    everything: also the slow tests, and the notebooks' outputs compared with the stored ones
# make setup   only the virtual environment, with the package installed in it so that edits take effect

PYTHON ?= python3
BIN := .venv/bin
# how many tests run at a time, each with one thread
JOBS ?= 2

# Threads that wait for each other spin for a moment only; dalm_utils/__init__.py says why.
export GOMP_SPINCOUNT ?= 1000

# Tests know nothing of the user's settings, and their runs lie in a folder of their own. Bytecode is kept: they start
# some hundred processes, and each would compile the package anew.
CLEAN = runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && trap 'exit 130' INT TERM && \
	unset PYTHONDONTWRITEBYTECODE $$(env | sed -n 's/^\(DALM_[A-Z0-9_]*\)=.*/\1/p') && \
	export DALM_RUNS="$$runs" OMP_NUM_THREADS=1
# nbval takes seconds to import, and is used in processes of its own only (tests/check_notebooks.py)
PYTEST = $(BIN)/python -m pytest -p no:nbval --numprocesses $(JOBS) --maxschedchunk 1

.PHONY: run check test lint setup clean
.DELETE_ON_ERROR:

run: setup
	@$(BIN)/python -m dalm_utils notebook notebooks/01_gpt2_full_training.ipynb

check: lint
	@$(CLEAN) && set -x && $(PYTEST) -m "not slow" tests

# The longest come first, so that no core is left idle at the end. The test files are named one by one: next to the
# folder that contains it, pytest would ignore tests/check_notebooks.py.
test: lint
	@$(CLEAN) && set -x && $(PYTEST) tests/check_notebooks.py tests/test_*.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dalm_utils

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	{ echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # on every core; some packages hold templates
	@touch $@

clean:
	rm -rf .venv build *.egg-info data/cache .pytest_cache .ruff_cache .mypy_cache
