# What a developer runs by hand. `make test` is what CI runs.
PYTHON ?= python3

.PHONY: test fast lint format

test: lint
	$(PYTHON) -m pip install --quiet --no-deps -r tests/requirements-parts.txt
	$(PYTHON) -m pytest -m "not slow"
	$(PYTHON) -m pytest -m slow

fast:
	$(PYTHON) -m pytest -m "not slow"

lint:
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --check --quiet .
	$(PYTHON) -m mypy --no-error-summary

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
