# What a fresh machine needs is Python 3.11 or later and make.
#
#   make demo   a picture from the shipped model, demo.png
#   make env    the same environment with what the tests need
#   make test   lint, types, import contract, tests
#   make slow   the tests that take longer, some of them hours: trainings, hundreds of round trips
#   make clean  remove what these made (.venv too)
#
# Variables:
#   PYTHON       the Python that makes .venv                (default python3)
#   TORCH_INDEX  the package index that torch's build comes from; empty means pip's own. On Linux
#                pip's own index has the CUDA build; see the README for CPU, CUDA and Apple.
#   ARGS         more arguments for pytest, as in make test ARGS="-k request"

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# torch first and alone (--no-deps: its index serves nothing else); with it in place, nothing that is
# installed after it can bring a second torch or another CUDA.
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo env test slow lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/hidream generate "a red cube left of a blue sphere" --seed 7 -o demo.png --overwrite
	@echo "The picture is $(CURDIR)/demo.png"

env: $(VENV)/.installed-dev

test: env lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

slow: env
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hidream needs Python 3.11 or later; give one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
