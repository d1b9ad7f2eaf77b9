PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip --quiet --disable-pip-version-check
TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := -m pytest -n auto

.PHONY: setup demo test test-oldest test-latest test-package lint types docs check nightly nightly-vllm attack bench studies pages lock package clean

setup: .venv/installed ## create .venv with the locked packages and this checkout of pema

.venv/installed: pyproject.toml $(wildcard requirements/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	requirements/install $(BIN)/python
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: setup ## a language model learns a house style: table, samples, and the report with all texts in build/
	mkdir -p build
	$(BIN)/pema demo --report build/demo.html --output build/demo.json

test: setup ## the tests, without the network
	$(TESTS) $(BIN)/python $(PYTEST)

test-oldest: setup ## the tests with the lowest versions that pyproject.toml allows (PYTHON=python3.12 for another Python)
	requirements/test oldest $(PYTHON)

test-latest: setup ## the tests with the newest versions (PRE=1: pre-releases too)
	requirements/test latest $(PYTHON)

test-package: package ## the tests of the source distribution with the wheel built from it, outside the checkout
	requirements/test-package $(PYTHON)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry src

docs: setup ## the site, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

types: setup
	$(BIN)/mypy

check: lint types docs test

nightly: setup ## the slow tests too, and the attacks
	$(TESTS) $(BIN)/python $(PYTEST) -m "" --hypothesis-profile=new -o faulthandler_timeout=3600
	$(TESTS) $(BIN)/python -m reproduction.attack

nightly-vllm: setup ## vLLM's own servers on the CPU, in .venv-vllm (3.5 GB), against the recordings and transformers
	requirements/test-vllm $(PYTHON)

attack: setup ## attack server, client and files over the loopback, and write the table of SECURITY.md
	$(TESTS) $(BIN)/python -m reproduction.attack --write after
	$(BIN)/python -m reproduction

bench: setup ## the benchmarks; results go to reproduction/results/benchmarks.jsonl
	$(BIN)/python -m reproduction.benchmarks

studies: setup ## run the studies and write their pages
	OMP_NUM_THREADS=1 $(BIN)/python -m reproduction.studies

pages: setup ## write every number, table and plot of README and docs from the committed results
	$(BIN)/python -m reproduction

lock: setup ## resolve the tested set of packages again
	$(BIN)/python requirements/lock.py

package: setup ## the source distribution, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf .venv .venv-* dist build .pytest_cache .ruff_cache .mypy_cache .hypothesis
