# `make demo` and `make test` do all their own set-up; they need Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types systems bench clean

NATIVE := CMakeLists.txt $(wildcard src/saccade/native/*.cpp src/saccade/native/*.h)

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/saccade compare --out demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

systems: $(VENV)/.installed
	$(BIN)/python benchmarks/systems.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/pairwise.py
	$(BIN)/python benchmarks/patterns.py
	$(BIN)/python benchmarks/cpu_native.py

clean:
	rm -rf $(VENV) build demo src/saccade/native/*.so
