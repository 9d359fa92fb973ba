# OpenMiMo. `make help` lists the targets; each one first sets up the virtual environment that it needs.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Without an NVIDIA GPU the CPU build of PyTorch does, and is many times smaller. Where that index cannot be
# reached, pip's configured index decides. A PyTorch already in $(VENV) is kept.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FIRST_TORCH := $(PIP) install --retries 1 --timeout 10 $(addprefix --index-url ,$(TORCH_INDEX)) "$(TORCH)"
PYTEST := $(BIN)/python -m pytest -q
BENCHMARKS := $(filter-out benchmarks/common.py benchmarks/readme_table.py benchmarks/engine_proofs.py benchmarks/kills.py benchmarks/ranks.py benchmarks/grpo_step.py benchmarks/server_fuzz.py benchmarks/server_load.py benchmarks/server_speed.py,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test check lint parity slow sanitize browser clients proofs bench clean

help: ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.with-demo ## From nothing to three teachers and one student with all their skills
	$(BIN)/openmimo demo

test: $(VENV)/.with-dev ## The whole test suite but the slow tests
	$(PYTEST) -m "not slow"

check: lint ## Everything a change must pass: lint, types, import rules, unit tests
	$(PYTEST) -m "not slow" tests/unit

lint: $(VENV)/.with-dev ## Lint, format, types and import rules alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

parity: $(VENV)/.with-dev ## Logits and checkpoints compared with transformers
	$(PYTEST) -rA tests/parity

slow: $(VENV)/.with-dev ## The tests that take minutes
	$(PYTEST) -m slow

sanitize: $(VENV)/.with-dev ## The engine's tests under AddressSanitizer, UBSan and ThreadSanitizer
	$(PIP) install --quiet nanobind cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" csrc/sanitize.sh "$(abspath $(BIN))/python"

browser: $(VENV)/.with-dev $(VENV)/.with-browser ## The server's page in Chromium (Debian's package, or CHROMIUM=path)
	$(PYTEST) -rs tests/unit/server/test_server_page.py

clients: $(VENV)/.with-clients ## lm-eval, LiteLLM and LangChain against a live server
	$(PYTEST) -rs tests/unit/server/test_server_ecosystem.py

proofs: $(VENV)/.with-dev $(VENV)/.with-fuzz ## Promises in full size: engine, runs that are killed, the server under fire
	$(BIN)/python benchmarks/engine_proofs.py
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/server_fuzz.py
	$(BIN)/python benchmarks/server_load.py

bench: $(VENV)/.with-bench ## All benchmarks, one after the other: tables and JSON lines
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file; done

clean: ## Remove caches and build output; keeps the virtual environment and runs/
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The package, editable, with one set of extras. Runs again when pyproject.toml changes.
$(VENV)/.with-%: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --editable ".[$*]"
	@touch $@

# PyTorch goes first: with it in place the package's own requirement downloads no other build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(FIRST_TORCH) || $(PIP) install "$(TORCH)"
	@touch $@
