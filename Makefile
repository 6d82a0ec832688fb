PYTHON ?= python3
BIN := .venv/bin
WHOLE_STUDIES := tests/test_studies_and_reports.py

.PHONY: install report notebooks test test-all lint clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with `make PYTHON=...`" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

report: install
	$(BIN)/slt-interp run hierarchical-equality --out runs/hierarchical-equality

# Each notebook is a script, and beside it lies what running it gives.
notebooks: install
	$(BIN)/jupytext --to ipynb --set-kernel python3 --execute notebooks/*.py

# The tests of whole studies run alone: they use both cores themselves, and a reader may look at their times.
test: install
	$(BIN)/python -m pytest $(WHOLE_STUDIES)
	$(BIN)/python -m pytest -n 2 --ignore=$(WHOLE_STUDIES)

# The slow tests apart: the others need no optimization by the compiler, which would take most of their time.
test-all: install
	$(BIN)/python -m pytest -m '' $(WHOLE_STUDIES)
	$(BIN)/python -m pytest -n 2 --ignore=$(WHOLE_STUDIES)
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal --durations=30 --ignore=$(WHOLE_STUDIES)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs
