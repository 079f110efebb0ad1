# Everything runs in .venv, which is made when it is not there. PYTHON=python3.12 uses another one.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos lint format

demo: .venv/installed
	$(BIN)/python -m cachefreeze.train --arch wrn

test: .venv/installed
	$(BIN)/python -m pytest

# Kills N runs of the three networks, and damages N files of stores ten times over.
N ?= 200
chaos: .venv/installed
	$(BIN)/python -m tests.chaos $(N)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	@echo "installing PyTorch and the rest into .venv: a few GB, a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
