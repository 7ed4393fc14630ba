# What CI runs and what a developer runs are the same. `make check` is all of it, the other targets are its parts.

BIN := .venv/bin
CODE := agnews_dist tests
# One thread per process: the multi-process tests start several processes on the same cores.
export OMP_NUM_THREADS ?= 1

.PHONY: check lint format format-check types imports test unit ranks runs faults slurm mutants lock wheel clean

check:
	bash launch/test.sh

lint:
	$(BIN)/ruff check $(CODE)

format:
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

format-check:
	$(BIN)/ruff format --check $(CODE)

types:
	$(BIN)/basedpyright

imports:
	$(BIN)/lint-imports

# All tests but the mutants; then by what they cost: one process, processes that talk to each other, whole stories.
test:
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/slurm tests/faults tests/ranks \
	    tests/run tests/gpu tests/unit

unit:
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/unit

ranks:
	$(BIN)/python -m pytest tests/ranks

runs:
	$(BIN)/python -m pytest tests/run

faults:
	$(BIN)/python -m pytest tests/faults

# On a real Slurm of two nodes, which the tests bring up; needs slurm-wlm and munge.
slurm:
	$(BIN)/python -m pytest tests/slurm

# The package broken on purpose, once per contract: each break must turn its test red.
mutants:
	$(BIN)/python -m pytest -n 3 tests/mutants

# Keeps the versions that are locked as far as pyproject.toml allows; `make lock UPGRADE=--upgrade` takes the newest.
lock:
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --all-extras --no-annotate \
	    --custom-compile-command "make lock" $(UPGRADE) --output-file requirements.lock

wheel:
	$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache .import_linter_cache
