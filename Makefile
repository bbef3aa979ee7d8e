# `make run` and `make test` do everything on a fresh machine: environment, dependencies, then the work.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test micro faults

run: $(VENV)/ready
	$(BIN)/python experiment.py --out_dir reproduced/run_0 reproduced/run_1 --testbed=micro
	$(BIN)/python plot.py reproduced/run_0 reproduced/run_1

test: $(VENV)/ready
	$(BIN)/python -m pytest -q tests

faults: $(VENV)/ready
	$(BIN)/python -m benchmarks.faults

micro: $(VENV)/ready
	$(BIN)/python -m micro_pythia.make

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
