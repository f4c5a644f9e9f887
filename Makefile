# `make` lists the targets. Each installs what it needs into .venv first, once for every state of pyproject.toml.
#   make test VENV=/opt/venvs/scale-dit     another place for the environment
#   make demo PIP_ARGS="--index-url ..."    another package index, such as one with CPU builds of torch

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
# One thread a worker: torch's own threads would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline $(RUN) -m pytest
WORKERS := -n logical --maxprocesses 4 --dist worksteal
SOURCES := src kernels tests experiments
# One folder for each run of the demo.
DEMO := logs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
BEGIN := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-all test-gpu lint format photos figures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## create .venv and install the project with everything that development needs

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: give a newer one with PYTHON=..."; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(PIP_ARGS) -e '.[dev,features]'
	touch $@

demo: $(INSTALLED)  ## train the LoRA further, make pictures at 4x the native size, compare with baselines (minutes, no GPU)
	$(RUN) src/train.py experiment=demo base=tiny hydra.run.dir=$(DEMO)/train
	$(RUN) src/generate.py base=tiny lora.path=$(DEMO)/train/lora output=$(DEMO)/pictures \
		hydra.run.dir=$(DEMO)/pictures prompt='a large red circle left of a small blue star, on a brick wall'
	$(RUN) src/eval.py base=tiny lora.path=$(DEMO)/train/lora n=3 steps=10 'metrics=[scenes,detail]' \
		'+baseline=[dense,no_lora,bicubic]' hydra.run.dir=$(DEMO)/evaluation
	@echo "The demo took $$(( ($$(date +%s) - $(BEGIN)) / 60 )) minutes. Its LoRA, pictures and table: $(DEMO)"

test: $(INSTALLED)  ## every test that needs no GPU
	$(PYTEST) $(WORKERS) -m "not gpu" $(PYTEST_ARGS)

test-fast: $(INSTALLED)  ## tests of at most ten seconds
	$(PYTEST) $(WORKERS) -m "not gpu and not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED)  ## every test; those that need a GPU skip themselves without one
	$(PYTEST) $(WORKERS) $(PYTEST_ARGS)

test-gpu: $(INSTALLED)  ## tests that need an NVIDIA GPU, one at a time
	$(PYTEST) -m gpu $(PYTEST_ARGS)

lint: $(INSTALLED)  ## style, format and types
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

format: $(INSTALLED)  ## rewrite the code in the project's format
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

photos: $(INSTALLED)  ## real photographs with free licences, out of Debian packages, into data/photos
	$(RUN) -m scale_dit.data.free_photos --output data/photos

figures: $(INSTALLED)  ## measure every quoted figure anew that needs no GPU (hours on a CPU) and rewrite the documents
	bash experiments/all.sh $(RUN)

clean:  ## remove what tools left behind; runs, pictures and the environment stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info
	find src kernels tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
