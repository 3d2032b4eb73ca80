# smelt, from a bare machine with Python 3.11 (or newer): every target sets up what it needs.
#
# Two environments in one folder: what smelt runs on (demo, bench) and, on top, what its tests need.
# A stamp file marks each; it is older than pyproject.toml or constraints.txt when they changed, and
# then, and only then, pip runs again.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV    := .venv
BIN     := $(VENV)/bin
RUNTIME := $(VENV)/.runtime.stamp
DEV     := $(VENV)/.dev.stamp

# The Python that makes the environment: the first of these that runs and is new enough.
# make PYTHON=/path/to/python3.11 demo names another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# More arguments for the installation of torch alone, e.g. the index of its CPU-only builds.
TORCH_FLAGS ?=
# More arguments for pytest: make test ARGS="-k walk -x".
ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# One thread per test process: two processes of many threads each only wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@echo "smelt: make mixture-of-experts language models small"
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1   \2/p' $(MAKEFILE_LIST)
	@echo
	@echo "Each target sets up what it needs in $(VENV); the first run takes some minutes."

demo: $(RUNTIME)  ## compress the checkpoint inside the package to 75, 50 and 25 %, and measure it
	@echo "==> smelt demo"
	@$(BIN)/smelt demo

test: $(DEV)  ## the tests (two processes; the folder of test data is named by SMELT_DATA)
	@echo "==> pytest -n 2$(if $(ARGS), $(ARGS))"
	@echo "    $(if $(SMELT_DATA),test data in $(SMELT_DATA),SMELT_DATA is not set: the tests that need it are skipped)"
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(DEV)  ## formatting, lint and types
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> mypy (strict, on src)"
	@$(BIN)/mypy

bench: $(DEV)  ## every benchmark, at its own defaults (ONE=memory runs benchmarks/memory.py alone)
	@for file in $(if $(ONE),benchmarks/$(ONE).py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "==> $$file"; $(BIN)/python "$$file"; \
	done

clean:  ## forget the environment and every cache (results under runs/ stay)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environments ----------------------------------------------------------------------------

# torch goes first, by itself and by its exact version: left to the resolver it is the newest one.
$(RUNTIME): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: smelt needs Python 3.11 or newer, and found $(or $(PYTHON),none)." >&2; \
	  echo "      Install it, or name the one to use: make PYTHON=/path/to/python3.11 demo" >&2; \
	  exit 1; }
	@echo "==> setting up $(VENV) with $$("$(PYTHON)" --version 2>&1) (once; some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@torch=$$(sed -n 's/^torch==/torch==/p' constraints.txt); \
	  echo "==> installing $$torch"; $(PIP) install $(TORCH_FLAGS) "$$torch"
	@echo "==> installing smelt and what it runs on"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "==> installing what the tests need"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
