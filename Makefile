# Two commands do all set-up: `make demo` and `make test`. Both build and use .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GKD := $(BIN)/gkd
STAMP := $(VENV)/installed

.PHONY: help demo test check slow gpu readme clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer is needed; name it with PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: $(STAMP)  ## videos -> stores -> teachers -> students -> scores -> export: drawn here, on the CPU, in minutes
	gkd prepare demo --modality both
	gkd pretrain-attention demo
	gkd distill demo --set distill.method=none
	gkd distill demo
	gkd evaluate demo --model all
	gkd pretrain-attention demo --modality flow
	gkd distill demo --modality flow
	gkd evaluate demo --fusion
	gkd export demo --format safetensors --format onnx
	gkd prepare demo-detection
	gkd pretrain-attention demo-detection --backbone runs/demo/pretrain-attention-rgb
	gkd distill demo-detection
	gkd evaluate demo-detection
	gkd export demo-detection --format onnx

check: $(STAMP)  ## format, lint, types, import contract
	$(BIN)/ruff format --check gkdcli tests
	$(BIN)/ruff check gkdcli tests
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml

# two processes of one thread each: threads that wait for each other's cores are many times slower
test: export OMP_NUM_THREADS := 1
test: check  ## check, then everything a change must pass
	$(BIN)/python -m pytest -n 2 --dist loadscope tests

slow: $(STAMP)  ## long fault tests, full demos, studies
	$(BIN)/python -m pytest -m slow tests

gpu: $(STAMP)  ## what needs CUDA
	$(BIN)/python -m pytest -m gpu tests

readme: $(STAMP)  ## put real output of the demo into the README
	$(BIN)/python tests/refresh_readme.py

clean:  ## remove what the demo wrote
	rm -rf $(foreach folder,datasets stores runs exports,$(folder)/demo $(folder)/demo-detection)
