# What a user and a developer run. Every target makes its own environment first; nothing outside this folder is
# changed, except that as root `make test` refreshes Debian's package lists, and `make test-all` installs a browser.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# One set of pins for everything that is installed here, the build's own requirements included (hence no isolation).
PINS   := --quiet --constraint constraints.txt
OR_SAY := || { echo "make: installing failed, see above; without a network pip has to be told of a mirror" >&2; exit 1; }
NATIVE := $(shell find csrc optwatch -name '*.h' -o -name '*.cpp' -o -name CMakeLists.txt 2>/dev/null)
# tests/conftest.py orders the files. The tests that only wait get a worker of their own.
WORKERS := --numprocesses=auto --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
AND_ONE := --numprocesses=$(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 8) + 1)') --dist=loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -P -m pytest
ifeq ($(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null),False)
PYTEST := $(BIN)/pytest
endif

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# ---- environments ----------------------------------------------------------------------------------------------

$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"optwatch needs Python 3.10 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PINS) pip scikit-build-core cmake ninja $(OR_SAY)
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) install $(PINS) --no-build-isolation --editable '.[demo,triton]' $(OR_SAY)
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) install $(PINS) --no-build-isolation --editable '.[test]' $(OR_SAY)
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install $(PINS) --no-build-isolation --editable '.[dev]' $(OR_SAY)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) install $(PINS) --no-build-isolation --editable '.[test,bench]' $(OR_SAY)
	@touch $@

# ---- what a user does ------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.demo ## train a small transformer for two minutes and watch it live
	$(BIN)/optwatch demo $(DEMO)

.PHONY: test
test: $(VENV)/.test ## the tests that need no other process than promtool (minutes)
	tests/install-debian-packages prometheus
	$(PYTEST) $(WORKERS) -m "not slow and not integration" $(TESTS)

.PHONY: test-all
test-all: $(VENV)/.test ## every test, also those against a real Prometheus
	tests/install-debian-packages
	$(PYTEST) $(AND_ONE) $(TESTS)

# ---- what a developer does -------------------------------------------------------------------------------------

.PHONY: lint
lint: $(VENV)/.dev ## style, types, layers, and that generated files are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.h' '*.cpp' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python tools/generate.py --check

.PHONY: format
format: $(VENV)/.dev ## put everything into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' | xargs --no-run-if-empty $(BIN)/clang-format -i

.PHONY: generate
generate: $(VENV)/.test ## write docs/metrics.md, the dashboards and the rules from the catalogue
	$(BIN)/python tools/generate.py

.PHONY: bench
bench: $(VENV)/.bench ## measure, and write benchmarks/results/; one of them with BENCH=cpu
	$(BIN)/python -m benchmarks $(BENCH)

.PHONY: pictures
pictures: $(VENV)/.test ## train for seven minutes and draw the dashboards' pictures in docs/images
	tests/install-debian-packages
	$(BIN)/python tools/pictures.py $(PICTURES)

.PHONY: build
build: $(VENV)/.base ## a wheel in dist/
	$(PIP) wheel $(PINS) --no-build-isolation --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove the environment and everything built
	rm -rf $(VENV) .tools build dist tools/frontend/node_modules tools/frontend/dist
