# Every target runs in the active virtual environment, except `all`, which makes its own.
PYTHON ?= python
.PHONY: setup format check test cov examples bench bench-align bench-loss bench-growth size fuzz mutants nightly all

setup:     ## what the other targets need
	$(PYTHON) -m pip install -c tests/constraints.txt -e ".[test]"

format:    ## rewrite the code in the house format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check:     ## lint, format, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:      ## the fast tests
	$(PYTHON) -m pytest

cov:       ## the fast tests, with the coverage gate
	$(PYTHON) -m pytest --cov

examples:  ## two real models, both ways: 350 MB once, minutes (new folders under runs/)
	$(PYTHON) examples/real_pair.py --out runs/smollm2-to-gemma
	$(PYTHON) examples/real_pair.py --out runs/gemma-to-smollm2 --swap

bench:     ## a whole step beside TRL, sampling and passes beside transformers: half an hour
	OMP_WAIT_POLICY=PASSIVE $(PYTHON) tests/benchmarks/bench_step.py

bench-align: ## what spans, chunks and matching cost: minutes
	OMP_NUM_THREADS=1 $(PYTHON) tests/benchmarks/bench_align.py

bench-loss: ## the loss beside TRL's, its memory, and what masks save: an hour
	OMP_WAIT_POLICY=PASSIVE $(PYTHON) tests/benchmarks/bench_loss.py --trl
	OMP_NUM_THREADS=1 $(PYTHON) tests/benchmarks/bench_memory.py
	OMP_WAIT_POLICY=PASSIVE $(PYTHON) tests/benchmarks/bench_masks.py

bench-growth: ## time and memory as a run grows, beside the model of both: ten minutes
	OMP_NUM_THREADS=1 $(PYTHON) tests/benchmarks/bench_growth.py

size:      ## code lines of each module, without blank lines and comments
	@for f in minigold/*.py; do printf '%5d %s\n' "$$(grep -cvE '^\s*(#.*)?$$' $$f)" "$$f"; done | sort -n

fuzz:      ## spoiled files for every loader: half an hour
	$(PYTHON) tests/fuzz_loaders.py --inputs 100000

mutants:   ## break the code on purpose: the tests must notice
	$(PYTHON) tests/mutants.py

nightly:   ## everything, with real models and 5,000 examples a property
	HYPOTHESIS_PROFILE=nightly $(PYTHON) -m pytest -m "" --cov
	$(MAKE) fuzz
	$(MAKE) mutants

all:       ## what continuous integration runs, in a new virtual environment
	bash .ci/run
