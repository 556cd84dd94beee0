# Two commands do everything: `make run` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test check format claims bench faults clean

run: $(VENV)/installed
	@$(BIN)/retort run

test: $(VENV)/installed
	@$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not long'

check: $(VENV)/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Measures the claims whose code or data changed; minutes each.
claims: $(VENV)/installed
	@$(BIN)/python -m tests.claims
	@cd tests/claims && dvc repro
	@$(BIN)/python -m tests.claims

bench: $(VENV)/installed
	@$(BIN)/python -m tests.benchmarks

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Retort needs Python 3.11 or later; name one with: make PYTHON=python3.11 run")'
	@echo "Installing into $(VENV): some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Kills the main job and a deletion request at random moments, twenty times each. `make test` has the first alone, with fewer.
faults: $(VENV)/installed
	@RETORT_KILLS=20 $(BIN)/python -m pytest tests/faults

# What the project has made, models and registry included, lies in .retort and data; that is for nobody's `clean` to remove.
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
