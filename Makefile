# The torch to install: a requirement, and pip options where needed, such as
# TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch

PYTHON := .venv/bin/python
DIST := dist
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
CALLERS_PATH := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# What runs `make gpu`: a Python that has torch with CUDA, pytest and pytest-benchmark.
GPU_PYTHON ?= python3

# MNIST for `make frontier`: an .npz with x_train, y_train, x_test, y_test, or, with the extra
# [data], `mnist`, which torchvision downloads.
MNIST ?= mnist.npz

# Benchmarks of whole training steps, of attacks and of Hessians; the others are of ops.
STEPS := bench/bench_step.py bench/bench_ranks.py bench/bench_examples.py
ATTACKS := bench/bench_attacks.py
HESSIANS := bench/bench_hessian.py

.PHONY: help demo test bench frontier gpu lint docs wheel sdist FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## train, regularize and attack a small network: one table, one plot
	$(PYTHON) -m robustkern demo

test: .venv/installed  ## run the tests
	$(PYTHON) -m pytest

bench: .venv/installed  ## time ops, training steps, attacks and Hessians; write bench/results and the tables of README and docs
	$(PYTHON) -m pytest $(STEPS) --results bench/results/cpu-step.json
	$(PYTHON) -m pytest $(ATTACKS) --results bench/results/cpu-attacks.json
	$(PYTHON) -m pytest $(HESSIANS) --results bench/results/cpu-hessian.json
	$(PYTHON) -m pytest bench $(patsubst %,--ignore %,$(STEPS) $(ATTACKS) $(HESSIANS)) --results bench/results/cpu-ops.json
	$(PYTHON) bench/readme.py

frontier: .venv/installed  ## train every method on MNIST: accuracy against cost
	$(PYTHON) bench/frontier.py mnist --data $(MNIST)
	$(PYTHON) bench/readme.py

gpu: export PATH := $(CALLERS_PATH)
gpu:  ## build, test and time on an NVIDIA GPU, in ten minutes; writes bench/results/<gpu>.json
	$(GPU_PYTHON) bench/gpu.py

lint: .venv/installed  ## check style, docstrings and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror $(CXX_FILES) $(wildcard bench/*.cpp tests/emulator/*)

docs: .venv/docs  ## build the documentation into build/docs; a broken link is an error
	$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

# Torch's libraries and CUDA's are the installed torch's. The tag is the oldest Linux that will do.
wheel: .venv/installed  ## build the wheel, for any Python and torch >= 2.10, into dist/
	rm -rf build/lib* build/wheel  # setuptools would pack what an earlier build left there
	$(PYTHON) -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m auditwheel repair --exclude libtorch.so --exclude 'libcudart.so.*' \
		--wheel-dir $(DIST) build/wheel/*.whl

sdist: .venv/installed  ## pack the sources, from which pip can build the wheel, into dist/
	$(PYTHON) setup.py --quiet sdist --dist-dir $(DIST)

# The environment, the package in it, and its libraries as csrc has them now.
.venv/installed: .venv/torch pyproject.toml setup.py $(CXX_FILES)
	$(PYTHON) -m pip install --quiet "setuptools>=77" ninja
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

.venv/docs: .venv/installed
	$(PYTHON) -m pip install --quiet "robustkern[docs]"  # it is there: only what it needs is installed
	touch $@

# Changes only when TORCH does. Torch comes first: the package takes the one that is there.
.venv/torch: FORCE
	@test -x $(PYTHON) || python3 -m venv .venv
	@echo '$(TORCH)' | cmp --quiet - $@ || \
		{ $(PYTHON) -m pip install $(subst >,\>,$(subst <,\<,$(TORCH))) numpy && echo '$(TORCH)' > $@; }
