# `make run` and `make test` do everything on a fresh machine: environment, dependencies, then the work.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test micro bench bench-quick

run: $(VENV)/ready
	$(BIN)/python experiment.py --out_dir reproduced/run_0 reproduced/run_1 --testbed=micro
	$(BIN)/python plot.py reproduced/run_0 reproduced/run_1

test: $(VENV)/ready
	$(BIN)/python -m pytest -q tests

micro: $(VENV)/ready
	$(BIN)/python -m micro_pythia.make

bench: $(VENV)/ready benchmarks/.venv/ready
	$(BIN)/python benchmarks/bench.py

bench-quick: $(VENV)/ready benchmarks/.venv/ready
	$(BIN)/python benchmarks/bench.py --quick

benchmarks/.venv/ready: benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
