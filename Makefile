# vmirror: everything is made from here; `make help` lists the targets.
#
# The first run installs what is missing (Debian packages as root, a virtual environment in
# .venv), so `make demo` and `make test` work on a fresh machine.

SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
FILTER_BUILD := build/filter_driver
STUB := build/bootstub/stub.img
PYTEST := $(PY) -m pytest

.PHONY: help packages deps build demo test check-fast lint acceptance bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

packages: ## install the Debian packages that are missing (root)
	@tools/setup/install-packages

$(VENV)/.made: pyproject.toml tools/setup/constraints.txt
	@command -v python3 >/dev/null || tools/setup/install-packages
	python3 -m venv $(VENV) || { tools/setup/install-packages && python3 -m venv $(VENV); }
	$(PY) -m pip install --quiet --disable-pip-version-check -c tools/setup/constraints.txt -e '.[dev]'
	@touch $@

deps: packages $(VENV)/.made ## packages and the virtual environment

build: deps ## build the filter, the supervisor and the boot stub
	@test -f $(FILTER_BUILD)/build.ninja || meson setup $(FILTER_BUILD) filter_driver -Dpython=$(abspath $(PY))
	ninja --quiet -C $(FILTER_BUILD)
	$(PY) bootstub/build.py --output $(STUB)

demo: build ## protect a running VM, kill it in mid-write, fail over, prove that nothing is missing
	$(PY) -m vmirror_lab.demo

lint: deps ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check-fast: build lint ## linters and unit tests: no root, no VM, under 20 s
	$(PYTEST) -q tests/unit

test: build lint ## everything, from nothing, under 40 minutes on 2 cores
	meson test -C $(FILTER_BUILD) --print-errorlogs
	$(PYTEST) tests

acceptance: build ## the full numbers of repetitions; hours; prints what docs/acceptance.md records
	VMIRROR_ACCEPTANCE=1 $(PYTEST) --timeout=7200 tests

bench: build ## measure; nothing else should run on the machine
	$(PY) -m vmirror_lab.bench --output docs/benchmarks.json

clean: ## remove what was built (not the cache of guests)
	rm -rf build $(VENV)
