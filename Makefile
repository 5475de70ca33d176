# vllm-kvpress: `make help` lists the targets.
#
# PYTHON           interpreter for the environment, 3.11 or newer (default: the first one found)
# TORCH_INDEX_URL  package index for torch alone (default: pip's own). Name the CPU wheel index of
#                  PyTorch here where the ordinary index offers only the CUDA build.
# DEMO_ARGS        arguments of the demo, e.g. DEMO_ARGS="--seed 7 --policy keydiff"
# TEST_JOBS        processes that share out the test files (default: 2; an engine needs about 2 GB)
# TEST_ARGS        arguments of pytest, e.g. TEST_ARGS="-k plan -x"

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
TORCH_INDEX_URL ?=
DEMO_ARGS ?=
TEST_JOBS ?= 2
TEST_ARGS ?=
# A file's tests share an engine, so a file goes to one process.
PYTEST = $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile \
	--no-loadscope-reorder
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint types clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)
	@sed -n 's/^# \([A-Z_ ].*\)/  \1/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything

$(STAMP): pyproject.toml setup.py scripts/setup_env.py
	@'$(PYTHON)' -c '$(IS_NEW_ENOUGH)' 2>/dev/null || { \
		echo "vllm-kvpress needs Python 3.11 or newer; '$(PYTHON)' is" \
		"$$( ('$(PYTHON)' --version) 2>/dev/null || echo 'no interpreter')." \
		"Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; '$(PYTHON)' -m venv $(VENV); } || { \
		echo "This Python cannot create environments: install its venv and pip modules" \
		"(python3-venv on Debian and Ubuntu)." >&2; rm -rf $(VENV); exit 1; }
	@$(BIN)/python scripts/setup_env.py --torch-index-url '$(TORCH_INDEX_URL)'
	@touch $@

demo: $(STAMP)  ## serve the bundled model with and without a policy, and compare
	@$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(STAMP)  ## run the test suite
	$(PYTEST) -m 'not full' $(TEST_ARGS)

test-full: $(STAMP)  ## run every test, the exhaustive ones too
	$(PYTEST) $(TEST_ARGS)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
