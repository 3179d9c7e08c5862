# Everything a fresh clone needs: `make quickstart` trains, `make test` proves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# A process a core, up to 3 GB each, file by file: a file's tests share what is slow to make. PYTEST_ARGS=--numprocesses=0: one.
SHARED := --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.runtime ## install into .venv and train on the images that ship with the package (about 2 minutes)
	@$(BIN)/python -m xception_pl.fit recipes/quickstart.yaml

test: lint ## install into .venv, then ruff, mypy and pytest (PYTEST_ARGS=--slow adds the heavy proofs)
	@$(BIN)/python -m pytest $(SHARED) $(PYTEST_ARGS)

lint: $(VENV)/.development ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.development ## let ruff rewrite the code in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

wheel: $(VENV)/.development ## build dist/*.whl
	@$(BIN)/python -m build --wheel

clean: ## remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A stamp a kind of installation: newer pins or dependencies install again, nothing else does.
$(VENV)/.runtime $(VENV)/.development: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 …"; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing the versions of constraints.txt into $(VENV) (a few GB with CUDA, some minutes; once) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(if $(findstring development,$@),[dev])'
	@touch $@
