# Two commands: `make quickstart` shows it, `make test` proves it. Both make the environment in .venv when there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python scripts/quickstart.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

clean:
	rm -rf $(VENV) runs build dist *.egg-info
