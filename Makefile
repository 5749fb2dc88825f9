# Each target sets up .venv by itself; nothing but Python 3.11 or newer and make need be there.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

EXPERIMENTS := source difficulty length joint sparsity pruner budget draws

.PHONY: run paper test test-slow test-slurm test-vllm lint clean

# The main job: general text against the model's own hard, medium-long traces, on the model that ships.
run: .venv/installed
	$(BIN)/python run.py -m calib=corpus,ssgr pruner=sparsegpt

# The named experiments, WORKERS at a time on one store, then the page and its figures. After a kill, the same again goes on.
# Processes share the store, and each keeps its model loaded: jobs of their own would load it once a stage.
paper: .venv/installed
	mkdir -p outputs/paper
	echo $(EXPERIMENTS) | tr ' ' '\n' | OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I NAME sh -c \
	  'echo NAME: outputs/paper/NAME.log; $(BIN)/python run.py experiment=NAME hydra.sweep.dir=outputs/paper/NAME > outputs/paper/NAME.log 2>&1'; \
	failed=$$?; $(BIN)/python -m ssgr.report outputs/paper --html outputs/paper/report.html --figures outputs/paper/figures && exit $$failed

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=25 -m "not slow and not slurm"

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# On the SLURM cluster whose sbatch is on the path; without one they skip.
test-slurm: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=0 --durations-min=20 -m "slurm and not slow" tests/test_slurm.py

# vLLM cannot share an environment with the newest transformers, so its engine is tested in one of its own.
test-vllm: build/vllm/installed
	VLLM_CPU_KVCACHE_SPACE=1 build/vllm/bin/python -m pytest -p no:cacheprovider tests/test_engines.py -k vllm

build/vllm/installed: benchmarks/vllm.sh constraints.txt
	bash benchmarks/vllm.sh

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Torch first, by the exact version of constraints.txt, so that pip never weighs another build against it.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv *.egg-info outputs/runs outputs/sweeps outputs/paper outputs/store
