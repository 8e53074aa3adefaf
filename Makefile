# The first target that needs it creates .venv and installs everything; later ones start at once.
# `make PYTHON=/path/to/python3.12` picks the interpreter, `make test ARGS="-k heads -n 0"` the tests.
PYTHON ?= python3.11 python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## create .venv and install graft with all it needs

# No stamp means that an install never finished: a half-linked package looks installed, so start
# from an empty .venv. A stamp older than pyproject.toml only needs the difference.
$(INSTALLED): pyproject.toml
	@set -e; \
	if test -f $@; then rm $@; else \
	  found=; for python in $(PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$python; break; fi; \
	  done; \
	  if test -z "$$found"; then \
	    echo "Graft needs Python 3.11 or newer (tried: $(PYTHON)); name one: make PYTHON=..." >&2; exit 1; \
	  fi; \
	  echo "Creating .venv with $$found and installing (several GB with torch, once)"; \
	  $$found -m venv --clear .venv; \
	  PIP_REQUIRE_VIRTUALENV=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; \
	fi; \
	VIRTUAL_ENV='$(CURDIR)/.venv' $(BIN)/uv pip install --editable '.[dev,timm]'; \
	touch $@

demo: $(INSTALLED)  ## the main job on the embedded data, start to end
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED)  ## the default tests, two at a time
	@$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(INSTALLED)  ## only the tests that take minutes, two at a time
	@$(BIN)/python -m pytest -m slow -n 2 $(ARGS)

test-all: $(INSTALLED)  ## both
	@$(BIN)/python -m pytest -m '' $(ARGS)

lint: $(INSTALLED)  ## ruff (rules and format) and mypy; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## fix what ruff can fix, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove tool caches and build output; .venv, logs and data stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
