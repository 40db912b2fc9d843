# make demo: train, sample and evaluate on handwritten digits, a few minutes on a CPU.
# make demo-flux: text to image, trained here on captioned digits, likewise.
# make test: format, lint, import contract and the whole test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo demo-flux test lint tests clean

demo: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python launch/demo.py

demo-flux: $(VENV)/.installed-text
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python launch/demo_flux.py

test: lint tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tests.import_contract

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -rs -n $(JOBS) --dist loadfile --no-loadscope-reorder

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt -e .
	touch $@

$(VENV)/.installed-text: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[text]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
