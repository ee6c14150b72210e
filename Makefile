# Two commands: `make quickstart` shows it, `make test` proves it. Both make the environment in .venv when there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The tests start many processes. Without compiled files each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint docs versions clean

# The quickstart needs no test tools and no optimizer packages. One of these, torchao, prints warnings whenever Transformers loads.
$(VENV)/quickstart: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[experiments]'
	touch $@

$(VENV)/installed: $(VENV)/quickstart
	$(PIP) --editable '.[dev]'
	touch $@

quickstart: $(VENV)/quickstart
	$(BIN)/python scripts/quickstart.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# The reference, from the docstrings.
docs: $(VENV)/installed
	$(BIN)/python scripts/reference.py build/docs

# The tests on the oldest and the newest versions of the libraries that are supported.
versions: $(VENV)/installed
	$(BIN)/nox

clean:
	rm -rf $(VENV) .nox runs build dist *.egg-info
