# Everything runs in .venv, which is made when it is not there. PYTHON=python3.12 uses another one.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos fuzz lint format docs

demo: .venv/installed
	$(BIN)/python scripts/demo.py

# A process a core, with one thread each: threads of several processes would wait for each other.
# Files in their order: the long ones, of few tests, would come last.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Kills runs of the three networks N times.
chaos: N ?= 200
chaos: .venv/installed
	$(BIN)/python -m tests.chaos $(N)

# Compares N training loops in which something changes with the same ones without the cache.
fuzz: N ?= 2000
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzz $(N)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_words.py

# The site, into site/. It takes nothing from a network; a broken link or name is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	@echo "installing PyTorch and the rest into .venv: a few GB, a few minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
