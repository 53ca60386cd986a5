# `make generate` and `make test` set up everything they need on a machine with Python 3.11, git and make.

PYTHON ?= python3
VENV ?= .venv
# Exactly this version: an open range can pull gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
# Where your package index serves GPU builds of torch and you have no GPU, give the CPU wheel index that
# PyTorch's installation page names: make TORCH_INDEX=URL generate
TORCH_INDEX ?=
PROMPT ?= Once upon a time

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup generate test slow check sanitize format clean

help:
	@echo "make generate   set up and stream a story (PROMPT=...)"
	@echo "make test       set up, then lint, types, import contracts and all tests"
	@echo "make slow       the tests that take half a minute each: torchrun, two machines"
	@echo "make check      lint, types and import contracts only"
	@echo "make sanitize   tests of the C++ kernels under address, undefined-behaviour and thread sanitizers"
	@echo "make format     format the code"

$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

CSRC := CMakeLists.txt $(shell find csrc -type f)
CPP := $(filter %.h %.cpp,$(CSRC))

$(VENV)/run: $(VENV)/torch pyproject.toml $(CSRC)
	$(PIP) --editable ".[serve]"
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(PIP) --editable ".[dev]"
	@touch $@

setup: $(VENV)/run

generate: $(VENV)/run
	@$(BIN)/olmoe generate "$(PROMPT)" --temperature 0.7 --top-p 0.95

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest

slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

sanitize: $(VENV)/dev
	$(PIP) "nanobind>=2.4"
	$(BIN)/python scripts/sanitize.py

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
