# CI runs `make check`, which is everything; the other targets are its parts.

BIN := .venv/bin
CODE := agnews_dist tests
# One thread per process: the multi-process tests start several processes on the same cores.
export OMP_NUM_THREADS ?= 1
# Containers often set this. The package would be compiled again in each process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: check quick lint format format-check types imports test unit ranks runs faults slurm mutants lock docs wheel clean

check:
	bash launch/test.sh

# Lint, format and the fast unit tests: half a minute on two idle cores.
quick: lint format-check
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests/unit

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

# All tests but the mutants. The targets below are its parts: one process, several ranks, whole runs, faults, Slurm.
test:
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder tests/slurm tests/faults tests/ranks \
	    tests/run tests/gpu tests/unit

unit:
	$(BIN)/python -m pytest -n 3 --dist loadfile tests/unit

ranks:
	$(BIN)/python -m pytest tests/ranks

runs:
	$(BIN)/python -m pytest tests/run

faults:
	$(BIN)/python -m pytest tests/faults

# The tests start a real two-node Slurm; it takes slurm-wlm and munge.
slurm:
	$(BIN)/python -m pytest tests/slurm

# Each patch breaks one contract of the package; the test of that contract must fail.
mutants:
	$(BIN)/python -m pytest -n 3 tests/mutants

# Keep locked versions that pyproject.toml allows; `make lock UPGRADE=--upgrade` takes the newest.
lock:
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --all-extras --no-annotate \
	    --custom-compile-command "make lock" $(UPGRADE) --output-file requirements.lock

# The files that follow from the schema of the settings, and the outputs of the tutorial.
docs:
	$(BIN)/agnews-dist schema > configs/settings.schema.json
	$(BIN)/agnews-dist schema --format markdown > docs/settings.md
	PYTHONPATH=tests $(BIN)/python -m support.tutorial

wheel:
	$(BIN)/python -m hatchling build -t wheel

clean:
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache .import_linter_cache
