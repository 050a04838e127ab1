# Every command a developer or an operator needs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: help setup demo up test test-long check reference format bench bench-spine bench-surface bench-engine bench-gpu bench-finetune bench-multitask bench-night peers chaos test-compose lock

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv with the pinned dependencies

$(STAMP): pyproject.toml client/pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch goes first and by its exact version, so that pip takes a local CPU wheel where there is one.
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e client -e '.[dev]'
	@touch $(STAMP)

demo: setup ## Run the main job end to end on the embedded servers, then stop everything
	$(BIN)/python -m examples.demo.run

up: setup ## Run the whole stack in the foreground
	$(BIN)/lamplighter up

test: setup ## Run every test that needs no GPU and no Docker
	$(BIN)/python -m pytest tests -q -m 'not gpu and not long' --durations=20

test-long: setup ## Further forms of tests: more models, balancings and shardings that must survive kills
	$(BIN)/python -m pytest tests -q -m 'long and not gpu' --durations=20

check: setup ## Format, lint, types, import contracts, function length, links, reference pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_functions.py services shared client migrations/env.py examples tools
	$(BIN)/python tools/check_links.py
	$(BIN)/python -m tools.reference --check

reference: setup ## Write docs/reference of what the code says
	$(BIN)/python -m tools.reference

format: setup ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

bench: setup ## Every benchmark, also after one that misses a bar; tables in build/bench/
	$(MAKE) --keep-going bench-spine bench-surface bench-engine bench-finetune bench-multitask bench-night

bench-spine: setup ## The rows of the spine: throughput, upload, engine share, embeddings, cache
	$(BIN)/python -m tests.benchmarks.bench_spine

bench-surface: setup ## Online calls, overload, fairness, schema
	$(BIN)/python -m tests.benchmarks.bench_surface

bench-engine: setup ## The generation engine beside what users have; `make peers` first
	$(BIN)/python -m tests.benchmarks.bench_engine

bench-gpu: setup ## Generation on a GPU beside transformers' continuous batching and the bandwidth limit
	$(BIN)/python -m tests.benchmarks.gpu.bench_generation

bench-finetune: setup ## Training beside transformers' Trainer: right, exact after kills, fast, served at once
	$(BIN)/python -m tests.benchmarks.bench_finetune

bench-multitask: setup ## Several tasks on one model: right, exact after kills, reference numbers, real text, speed
	$(BIN)/python -m tests.benchmarks.bench_multitask

bench-night: setup ## The policy over made-up fleets: nothing idle, fair shares, what a look at many jobs costs
	$(BIN)/python -m tests.benchmarks.bench_night

peers: setup ## Install what the engine is compared with (llama.cpp is compiled, some ten minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[bench]'

chaos: setup ## The long fault runs; table in build/bench/chaos.json
	$(BIN)/python -m tests.chaos.run --long

test-compose: setup ## Build docker-compose.yml, run it for real, and test against it
	LAMPLIGHTER_COMPOSE=1 $(BIN)/pytest tests/compose --timeout=1800

lock: ## Write requirements.lock from what .venv holds, without the builds' own suffixes (torch's +cpu)
	$(BIN)/pip freeze --exclude-editable | grep -v -E '^(-e|pip|setuptools)' | sed -E 's/\+[a-z0-9.]+$$//' > requirements.lock
