# The few commands that everything is done with. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install clipkit with all its tools

demo: $(STAMP) ## train on the sample shards, index them, serve the page on 127.0.0.1:8000
	$(BIN)/clipkit demo $(DEMO_FLAGS)

test: $(STAMP) ## run all tests, one process with one thread per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(PYTEST_FLAGS)

check: $(STAMP) ## lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP) ## run the benchmarks in benchmarks/
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipkit needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[cpu,emoji,graph,video]" --group dev
	touch $@
