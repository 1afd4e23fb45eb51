PYTHON ?= python3
BIN := .venv/bin
VERSIONS := .venv/versions
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test test-all test-versions test-lowest-direct test-highest check format docs site dist clean

demo: .venv/package
	$(BIN)/lorasmith demo

# Under three minutes on two cores; what the markers mean is in CONTRIBUTING.md.
test: .venv/dev
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not (faults or processes or table or slow)"

test-all: .venv/dev
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist worksteal

# With the lowest versions that pyproject.toml allows, and with the newest. By hand: it downloads some 6 GB.
test-versions:
	$(MAKE) --keep-going test-lowest-direct test-highest

test-lowest-direct test-highest: test-%: .venv/package
	$(PIP) uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VERSIONS)
	$(BIN)/uv pip install --quiet --python $(VERSIONS) --resolution $* --all-extras --requirements pyproject.toml
	$(BIN)/uv pip install --quiet --python $(VERSIONS) --no-deps --editable .
	$(BIN)/uv pip freeze --python $(VERSIONS)
	$(OFFLINE) $(VERSIONS)/bin/python -m pytest -n 2
	rm -r $(VERSIONS)

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo site/index.html

site: docs
	$(BIN)/python -m http.server --directory site 8000

# The source archive and the wheel, in dist/, checked as PyPI checks them.
dist: .venv/package
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

.venv/package: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/package
	$(PIP) --editable '.[dev]'
	touch $@

.venv/docs: .venv/package
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv
