# Everything here takes the environment as it is; images/set_up.sh makes one.
PYTHON ?= .venv/bin/python
PYTEST = $(PYTHON) -m pytest -q

.PHONY: check test test-qemu test-all generate

check: # the linters, the types, the layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(PYTHON))lint-imports --no-cache

test: # what needs no QEMU: about a minute
	$(PYTEST) -m "not (qemu or gdb or guest)" tests/unit tests/contract \
	    tests/static/test_documentation.py

test-qemu: # what starts QEMU and gdb, but boots no guest
	$(PYTEST) -m "(qemu or gdb) and not guest"

test-all:
	$(PYTEST)

generate: # manual pages, completions, and the generated parts of docs/
	$(PYTHON) -m docs.generate
