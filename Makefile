# `make demo` and `make test` set everything up in .venv; they need Python 3.11 and git.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What running needs, and what lint and tests need besides.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
# One more than the two processors of a small machine, which two leave idle a tenth of the time. A file stays
# together: its tests share running engines.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
# The tests start some hundred processes: they need not compile every module again, whatever a machine prefers.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/pytest
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

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

$(RUN): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outrider needs Python 3.11: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(DEV): $(RUN)
	$(INSTALL) -e '.[dev,train,cluster]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
