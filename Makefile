PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint types check bench studies results nightly wheel clean

setup: .venv/installed ## make .venv with everything that the other targets need

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.8,<=2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: setup ## adapt the embedded PLM to formal customer-support German and show the difference
	$(BIN)/pema demo

test: setup ## the tests, without the network
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

nightly: setup ## the slow tests too
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

bench: setup ## the benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks

studies: setup ## run what is missing of the studies, on the data in DATA, and write their pages
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.studies --run "$(DATA)"

wheel: setup
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
