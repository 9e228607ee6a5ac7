# make run   notebook 1, top to bottom, on the embedded default (minutes, no network, no GPU)
# make test  lint, unit tests, and the notebooks' outputs checked against the stored ones

PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: run test setup clean
.DELETE_ON_ERROR:

run: setup
	@$(BIN)/python -m dalm_utils notebook notebooks/01_gpt2_full_training.ipynb

# Runs of the tests live in a folder of their own, with the settings of the stored notebooks: they neither continue nor
# disturb the user's. The stored figures are a CPU's, and are compared with a CPU's.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && trap 'exit 130' INT TERM && \
	unset $$(env | sed -n 's/^\(DALM_[A-Z0-9_]*\)=.*/\1/p') && export DALM_RUNS="$$runs" && set -x && \
	$(BIN)/python -m pytest tests && \
	DALM_DEVICE=cpu $(BIN)/python -m pytest -p tests.nbval_tolerance --nbval --nbval-current-env $(NOTEBOOKS)

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	{ echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv data/cache .pytest_cache .ruff_cache
