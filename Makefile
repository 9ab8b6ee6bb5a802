# Needs python3 (>= 3.11), make and git; everything else goes into .venv.

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.memfit-stamp
TODAY := $(shell date +%F)

# Log levels only: torch's profiler and allocator write notices to stderr that say nothing to a user of memfit.
# Threads that wait do not spin, else a busy machine slows to a crawl.
export OMP_WAIT_POLICY ?= PASSIVE
export KINETO_LOG_LEVEL ?= 6
export TORCH_CPP_LOG_LEVEL ?= ERROR

.DEFAULT_GOAL := help
.PHONY: help .venv demo test check check-cuda bench bench-gpu rivals measures docs families faults heads lightning operators ranks restarts rescue matrix trainer tutorial zoo clean

help:  ## Show the targets
	@grep -hE '^[.a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv: $(STAMP)  ## Create the virtual environment; does nothing while the pins are unchanged

$(STAMP): requirements.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)  ## Train within a memory limit and compare with the plain step
	$(PY) examples/demo.py

check: $(STAMP)  ## Format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy --strict

# A process for each core, each with one thread: the numbers in the tests do not depend on it, the time does.
test: check  ## The checks, then every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

check-cuda: $(STAMP)  ## On a machine with a CUDA device: its tests, then promised against measured memory
	$(PY) -m pytest -m cuda
	$(PY) benchmarks/check_cuda.py --out benchmarks/results/$(TODAY)_cuda_gpt2_medium.json

bench: $(STAMP)  ## memfit against every peer, and what its Python costs: about half an hour
	OMP_NUM_THREADS=1 $(PY) benchmarks/peers.py --out benchmarks/results/$(TODAY)_cpu_peers.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/overhead.py --out benchmarks/results/$(TODAY)_cpu_overhead.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/step_overhead.py --out benchmarks/results/$(TODAY)_cpu_step_overhead.json
	$(PY) benchmarks/render.py

bench-gpu: $(STAMP)  ## The same peers on a CUDA device
	$(PY) benchmarks/peers.py --device cuda --out benchmarks/results/$(TODAY)_cuda_peers.json

rivals: $(STAMP)  ## The compiler's memory budget, and rival packages as the registry has them; needs the registry
	OMP_NUM_THREADS=1 $(PY) benchmarks/peers_compiler.py --out benchmarks/results/$(TODAY)_cpu_peers_compiler.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/peers_registry.py --out benchmarks/results/$(TODAY)_cpu_peers_registry.json

measures: $(STAMP) families  ## Measure the other figures of README and docs: hours
	OMP_NUM_THREADS=1 $(PY) benchmarks/recompute.py --out benchmarks/results/$(TODAY)_cpu_recompute.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/large.py --out benchmarks/results/$(TODAY)_cpu_large.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/accumulation.py --out benchmarks/results/$(TODAY)_cpu_accumulation.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/audit_cost.py --out benchmarks/results/$(TODAY)_cpu_audit_cost.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/traps.py --out benchmarks/results/$(TODAY)_cpu_traps.json
	OMP_NUM_THREADS=1 $(PY) benchmarks/gaps.py --out benchmarks/results/$(TODAY)_cpu_gaps.json
	$(PY) benchmarks/render.py

zoo: $(STAMP)  ## Every model at three budgets, against the plain step and the allocator: about 30 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/zoo.py --out benchmarks/results/$(TODAY)_cpu_zoo.json
	$(PY) benchmarks/render.py

operators: $(STAMP)  ## Every operator of PyTorch in a step that recomputes all it can: about 2 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/operator_database.py --out benchmarks/results/$(TODAY)_cpu_operator_database.json
	$(PY) benchmarks/render.py

families: $(STAMP)  ## Whole steps of many transformers families: predicted against measured peak
	OMP_NUM_THREADS=1 $(PY) benchmarks/families.py --out benchmarks/results/$(TODAY)_cpu_families.json

rescue: $(STAMP)  ## Trainings that run out of memory at random moments, compared with undisturbed ones
	OMP_NUM_THREADS=1 $(PY) benchmarks/rescue.py --out benchmarks/results/$(TODAY)_cpu_rescue.json

faults: $(STAMP)  ## Kills, full disks, lost memory, hostile files, long trainings: half an hour
	OMP_NUM_THREADS=1 $(PY) benchmarks/faults.py --out benchmarks/results/$(TODAY)_cpu_faults.json

heads: $(STAMP)  ## Exact accumulation for every tiny head of transformers: about 15 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/heads.py --out benchmarks/results/$(TODAY)_cpu_heads.json

matrix:  ## The oldest and the newest torch and transformers, each pair in an environment of its own
	$(PYTHON) benchmarks/versions.py

trainer: $(STAMP)  ## The Hugging Face Trainer with memfit against the plain one: about 5 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/trainer.py --out benchmarks/results/$(TODAY)_cpu_trainer.json

lightning: $(STAMP)  ## Lightning with memfit against the plain Trainer: about 3 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/lightning_trainer.py --out benchmarks/results/$(TODAY)_cpu_lightning.json

ranks: $(STAMP)  ## DDP and FSDP2 on 2 and 4 processes against one: about 4 minutes
	OMP_NUM_THREADS=1 $(PY) benchmarks/ranks.py --out benchmarks/results/$(TODAY)_cpu_ranks.json

restarts: $(STAMP)  ## A process is killed under torchrun, which starts all of them again
	OMP_NUM_THREADS=1 $(PY) -m pytest -m restarts

docs: $(STAMP)  ## Build the documentation into build/docs; needs no network
	.venv/bin/sphinx-build -W -n -q -b html docs build/docs
	@echo "open build/docs/index.html"

tutorial: $(STAMP)  ## Run the commands of the tutorial and compare what they print
	OMP_NUM_THREADS=1 $(PY) -m pytest -m tutorial

clean:  ## Remove the environment and what the tools left behind
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
