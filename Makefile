# `make demo` and `make test` set everything up in .venv; they need Python 3.11 and git.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.installed

.PHONY: demo test test-all lint format clean

demo: $(READY)
	$(VENV)/bin/outrider demo

test: lint
	$(VENV)/bin/pytest -m "not slow and not gpu"

test-all: lint
	$(VENV)/bin/pytest -m "not gpu"

lint: $(READY) build/mypy/outrider
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outrider needs Python 3.11: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# mypy cannot follow an editable install of namespace packages; a link named `outrider` shows it the real files.
build/mypy/outrider:
	mkdir -p $(@D)
	ln -sfn ../.. $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
