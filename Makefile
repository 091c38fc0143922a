# Thin: each line is a command a person could type.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# One thread per process: the processes already share the cores, and more threads only fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: setup demo test test-long lint bench proto clean

setup: $(READY)

$(READY): pyproject.toml proto/pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { apt-get update -qq && apt-get install -y -qq $(PYTHON)-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./proto --editable '.[teacher,trainer,local,dev]'
	touch $(READY)

demo: setup
	$(BIN)/tutelage quickstart

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m "not long and not gpu"

test-long: setup
	$(BIN)/pytest -m "long and not gpu"

bench: setup
	$(BIN)/tutelage bench

proto: setup
	$(BIN)/python proto/generate.py

clean:
	rm -rf runs artifacts
