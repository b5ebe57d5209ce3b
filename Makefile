# `make demo` and `make test` set everything up in .venv; they need Python 3.11 and git.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What running needs, and what lint and tests need besides.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
# One more than the two processors of a small machine, which two leave idle a tenth of the time. A file stays
# together: its tests share running engines.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest
# Of twenty thousand modules few are ever imported: those are compiled then, once, whatever a machine prefers.
INSTALL := $(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint format clean

demo: $(RUN)
	$(VENV)/bin/outrider demo

test: lint
	$(PYTEST) -m "not slow and not gpu" $(SIDE_BY_SIDE)

test-all: lint
	$(PYTEST) -m "not gpu" $(SIDE_BY_SIDE)

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(DEV)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(RUN): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev,train,cluster]'
	touch $(RUN) $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outrider needs Python 3.11: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
