# `make demo` and `make test` set everything up by themselves on a machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test check format bench test-gpu train tables clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## create .venv and install tritflow with everything for tests

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("tritflow needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,dev,lora]"
	@touch $(STAMP)

demo: $(STAMP) ## quantize the built-in FLUX, draw with it, score it: runs/demo
	$(BIN)/tritflow demo --out runs/demo

test: $(STAMP) ## the test suite (CPU)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

check: $(STAMP) ## lint, types, import directions, stale tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/tritflow report --check README.md docs

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure on this CPU and append to benchmarks/results
	$(BIN)/tritflow bench kernels --device cpu --results benchmarks/results
	$(BIN)/tritflow bench latency --device cpu --results benchmarks/results

test-gpu: $(STAMP) ## tests that need a CUDA device
	$(BIN)/python -m pytest tests -m gpu

train: $(STAMP) ## train the small FLUX from nothing (one CUDA GPU, about half an hour)
	$(BIN)/python -m tritflow.training --out runs/small-flux

tables: $(STAMP) ## write the generated tables of README and docs again
	$(BIN)/tritflow report --update README.md docs --curve docs/images/training-curve.png

clean: ## remove what these commands made
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
