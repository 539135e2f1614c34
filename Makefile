# Two commands matter: `make quickstart` and `make test`. Each works on a fresh clone that has Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= benchmarks/results
METHOD ?= glmd
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: setup quickstart test test-faults lint format docs site kernels bench-cpu bench-gpu clean

setup: .venv/installed

# torch first and by its exact version, so that nothing that depends on it chooses another.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastkd needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plots]'
	-$(BIN)/python -m fastkd.ops.backend_cpp    # without a compiler the torch backend serves
	touch $@

quickstart: setup
	$(BIN)/fastkd quickstart --method $(METHOD) $(ARGS)

test: setup lint kernels site
	$(BIN)/python -m pytest $(ARGS)

# Every fault's test; 2000 wrong inputs; 200 random trees of foreign files; processes killed at random instants, 100 of a GLMD run and
# 20 each of TED and CR-ILD.
test-faults: setup
	$(BIN)/python -m pytest tests/faults $(ARGS)
	$(BIN)/python -m tests.faults.fuzz --cases 2000
	$(BIN)/python -m tests.faults.test_32_ownership --trees 200
	$(BIN)/python -m tests.faults.kills --method glmd --kills 100
	$(BIN)/python -m tests.faults.kills --method ted --kills 20
	$(BIN)/python -m tests.faults.kills --method crild --kills 20

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Everything in README and docs that follows from code and from committed JSON.
docs: setup
	$(BIN)/python docs/generate.py

# The documentation as a site, in site/; a broken link or anchor, or a page that the navigation leaves out, is an error.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every Triton kernel for sm_80, sm_90 and sm_100, and with nvcc the CUDA kernel, without a GPU: registers, shared memory, spills (fatal).
kernels: setup
	$(BIN)/python -m fastkd.kernels.compile

# What fastkd claims on a CPU, beside every peer: about 40 minutes on two idle cores. Then `.venv/bin/fastkd bench report`.
bench-cpu: .venv/bench
	$(BIN)/fastkd bench --device cpu --output $(OUT) $(ARGS)

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps speculators==0.9.0    # asks for an older transformers; its losses need none
	touch $@

# The whole GPU proof in eight minutes and one JSON file, checks first, with nothing installed: $(PYTHON) needs torch, triton and numpy.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py --output $(OUT) $(ARGS)

clean:
	rm -rf .venv build site *.egg-info
