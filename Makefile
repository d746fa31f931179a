# What a developer runs by hand. `make test` is what CI runs.
PYTHON ?= python3

.PHONY: test fast lint format

test: lint
	$(PYTHON) -m pip install --quiet --no-deps -r tests/requirements-parts.txt -r tests/requirements-lmms-eval.txt
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m "not slow"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m "slow and not processes"
	$(PYTHON) -m pytest -m processes

fast:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m "not slow"

lint:
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --check --quiet .
	$(PYTHON) -m mypy --no-error-summary

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
