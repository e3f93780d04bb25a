# make train and make test do everything from a fresh checkout: environment, installation, run.
PYTHON ?= python3
ARGS ?=
# One more than there are cores: some tests wait for others' processes.
JOBS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))

# .venv for python3, .venv-3.12 for python3.12, wherever that interpreter lies.
VENV := .venv$(addprefix -,$(filter-out 3,$(patsubst python%,%,$(notdir $(PYTHON)))))
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install train test docs lint format $(VENV)

help:  ## say what can be made
	@echo "make TARGET [PYTHON=python3.12] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)  ## make the environment .venv, and install race-jax and what it needs

# Large pages: fresh arrays cost fewer page faults (docs/benchmarks.md).
train: $(VENV)  ## train a language model on this machine's own text; ARGS="--config.model.num_layers=4"
	@echo "[train] scripts/train_lm.py --config configs/lm_default.py $(ARGS)"
	@GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) scripts/train_lm.py --config configs/lm_default.py $(ARGS)

test: $(VENV)  ## run every CPU test and doctest; ARGS="tests/test_state.py -x"
	@echo "[test] pytest, $$($(RUN) --version)"
	@JAX_PLATFORMS=cpu $(RUN) -m pytest -m "not gpu" -n $(JOBS) --maxprocesses 8 --dist worksteal $(ARGS)

docs: $(VENV)  ## build the documentation into build/docs, and check its links
	@echo "[docs] mkdocs build --strict"
	@$(RUN) -m mkdocs build --strict --quiet

lint: $(VENV)  ## check the style rules and the format
	@echo "[lint] ruff check, ruff format --check"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(VENV)  ## rewrite the files in the project's format
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

# The stamp holds what the environment was made from. It is emptied before the work and written
# after it, so an environment that was left half made is known and made anew.
STAMP := $(VENV)/made-from
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
BASE := import os, sys; print(os.path.realpath(sys._base_executable))

$(VENV):
	@fail() { echo "[setup] $$1" >&2; exit 1; }; \
	version=$$($(PYTHON) --version 2>&1) || fail \
	  "'$(PYTHON)' does not run: install Python 3.11 or newer, or name one, as in PYTHON=python3.12."; \
	$(PYTHON) -c '$(NEW_ENOUGH)' || fail \
	  "'$(PYTHON)' is $$version, and race-jax needs 3.11 or newer: name one, as in PYTHON=python3.12."; \
	base=$$($(PYTHON) -c '$(BASE)'); \
	origin="$$version, $$base, in $$(pwd)"; project=$$(cksum < pyproject.toml); \
	stamp=$$(cat $(STAMP) 2>/dev/null); \
	if [ "$$stamp" = "$$origin, $$project" ]; then exit 0; fi; \
	if [ -e $(VENV) ] && [ ! -e $(STAMP) ]; then fail \
	  "$(VENV) was not made by this Makefile: move it away, or remove it with rm -r $(VENV)."; fi; \
	case "$$stamp" in \
	  "$$origin, "*) echo "[setup] pyproject.toml has changed: updating $(VENV)"; : > $(STAMP);; \
	  *) echo "[setup] making $(VENV) with $$version ($$base)"; \
	    rm -rf $(VENV); mkdir $(VENV) && : > $(STAMP) && "$$base" -m venv $(VENV) || fail \
	      "$$version cannot make $(VENV): it needs its venv module (on Debian: apt install python3-venv).";; \
	esac; \
	echo "[setup] installing race-jax and what it needs: minutes the first time"; \
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]' || fail \
	  "pip could not install race-jax, for the reason above: put it right and run make again."; \
	echo "$$origin, $$project" > $(STAMP); \
	echo "[setup] $(VENV) is ready"
