# Each target sets up .venv by itself; nothing but Python 3.11 or newer and make need be there.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: run test test-slow test-slurm test-vllm lint clean

# The main job: general text against the model's own hard, medium-long traces, on the model that ships.
run: .venv/installed
	$(BIN)/python run.py -m calib=corpus,ssgr pruner=sparsegpt

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow and not slurm"

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slurm"

# On the SLURM cluster whose sbatch is on the path; without one they skip.
test-slurm: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slurm tests/test_slurm.py

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
	rm -rf .venv *.egg-info outputs/runs outputs/sweeps outputs/store
