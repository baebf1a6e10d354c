# Each verb sets up what it needs, says what it does, and is safe to repeat.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
BIN := .venv/bin
# LOCK=/dev/null: the newest releases, as the drift alarm takes them.
LOCK ?= requirements.lock
# HASHES=1: only files whose hashes stand in the lock, as on GitHub; without it the lock's versions,
# so that another build of one of them will do, PyTorch's for CPUs above all.
HASHES ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install
PYTEST := $(BIN)/python -m pytest
# The tests that need no torch run beside the others: some find at once what is out of place, and
# some wait for a child of the grader, with nothing to do.
BESIDE := tests/fitcast/test_units.py tests/house/test_verbs.py \
	tests/instructor/test_sandbox.py tests/instructor/test_stalls.py
AXE := 4.14.1
# The stamp's name is a checksum of the pins: set-up runs again when they change, and only then.
READY := .venv/ready-$(shell (cat requirements.txt $(LOCK) pyproject.toml; echo "$(HASHES)") | cksum | tr ' ' -)

.PHONY: help lessons test test-all lab site execute stamp lock test-colab test-browser test-site lint bench package tag clean
lessons test test-all execute stamp lint bench: export HF_HUB_OFFLINE := 1
# Compiled once, whatever the shell says: each worker and kernel would compile it again.
lessons test test-all: export PYTHONDONTWRITEBYTECODE :=

help: ## show these verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 \t/' | expand -t 20

lessons: $(READY) ## execute every lesson into build/ and write the report; lessons/ stays as it is
	@echo "Executing the lessons into build/"
	@$(BIN)/python -m tools.report

test: $(READY) ## what a change can break, in 4 to 7 minutes; lessons compared strictly (ARGS="-k ledger" for some)
ifdef ARGS
	@$(PYTEST) -m "not slow" $(ARGS)
else
	@echo "Testing the packages, the lessons and the house (make test-all: what takes longer, too)"
	@$(PYTEST) -m "not slow" --quiet $(BESIDE) & beside=$$!; \
	$(PYTEST) -m "not slow" --numprocesses 2 --dist loadgroup --no-loadscope-reorder $(BESIDE:%=--ignore=%); \
	wait $$beside
endif

test-all: $(READY) ## every test: all recorded rows, kills and planted faults; prints the coverage
	@echo "Testing everything"
	@$(PYTEST) --numprocesses 2 --dist loadgroup --no-loadscope-reorder --cov --cov-report term:skip-covered $(ARGS)

lab: $(READY) ## open JupyterLab on the lessons
	@echo "Opening JupyterLab on lessons/ (stop it with Ctrl-C)"
	@$(BIN)/python -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lessons

site: $(READY)-site ## build the public site into build/site/, from the lessons as they were executed
	@echo "Building the site"
	@$(BIN)/python -m tools.make_site

execute: $(READY) ## author's verb: make the .ipynb from the .py and run it (LESSON=01 for one)
	@echo "Rebuilding the committed notebooks from their .py"
	@$(BIN)/python -m tools.execute $(LESSON)

stamp: $(READY) ## author's verb: badges, set-up cells, numbers outside the lessons, from one place
	@echo "Stamping"
	@$(BIN)/python -m tools.stamp
	@$(BIN)/python -m tools.cheat_sheet

lock: $(READY) ## author's verb: write requirements.lock for what pyproject.toml asks (UPGRADE=torch raises one)
	@echo "Resolving $(LOCK)"
	@$(PIP) --quiet uv
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --extra browser --extra site --universal \
		--python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make lock' \
		$(UPGRADE:%=--upgrade-package %) --output-file $(LOCK)

test-colab: $(READY) ## set-up cell and lessons on Colab's packages, in .venv-colab (LESSON=01 for one)
	@echo "Testing on Colab's packages"
	@$(BIN)/python -m tools.colab_leg $(LESSON)

test-browser: $(READY)-browser ## every lesson in JupyterLab, used in a browser (LESSON=01 for one)
	@echo "Testing in a browser; pictures go to build/browser/"
	@$(PYTEST) tests/browser $(if $(LESSON),--lesson $(LESSON)) $(ARGS)

test-site: $(READY)-site build/axe/axe.min.js ## the site in a browser: quiet pages, search, accessibility
	@echo "Testing the site in a browser; pictures go to build/site-pictures/"
	@$(PYTEST) tests/site $(ARGS)

# axe-core, which looks for what a screen reader cannot read; from npm, for this test alone.
build/axe/axe.min.js:
	@mkdir -p $(@D)
	@cd $(@D) && npm pack --silent axe-core@$(AXE) && tar --extract --strip-components 1 \
		--file axe-core-$(AXE).tgz package/axe.min.js

lint: $(READY) ## check style, format, who imports whom, and types
	@echo "Checking style, format, imports and types"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet . || { echo "$(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pyright

bench: $(READY) ## measure what the package promises
	@echo "Measuring"
	@$(BIN)/python tools/bench.py
	@$(BIN)/python tools/bench_step.py
	@test ! -d instructor || $(BIN)/python -m instructor.bench

package: $(READY)-site ## build wheel and sdist into dist/, check them, install and ask the wheel elsewhere
	@echo "Building the distribution"
	@$(BIN)/python -m tools.release --package

tag: $(READY) ## author's verb: version, changelog and tag in one commit (VERSION=0.2.0; DRY=1 only says it)
	@$(BIN)/python -m tools.release "$(VERSION)" $(if $(DRY),--dry-run)

# The instructor's verbs; the students' archive has none of them.
-include instructor/verbs.mk

clean: ## remove build/ and caches; .venv stays
	@echo "Removing build/ and caches"
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache .coverage*
	@find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-exec rm -rf {} +

$(READY)-browser: EXTRA := --editable '.[browser]'
$(READY)-site: EXTRA := --editable '.[browser,site]'
$(READY) $(READY)-browser $(READY)-site:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv (the first time: some minutes and about 1 GB)"
	@$(PYTHON) -m venv .venv
	$(if $(HASHES),@$(PIP) --quiet --only-binary :all: --require-hashes --requirement $(LOCK))
	@sed -nE 's/^([^ #]+==[^ ]+( ;[^\\]+)?) \\$$/\1/p' $(LOCK) > .venv/pins.txt
	@$(PIP) --constraint .venv/pins.txt $(if $(HASHES),--no-index) --quiet setuptools
	@$(PIP) --constraint .venv/pins.txt $(if $(HASHES),--no-index) --no-build-isolation --editable '.[dev]' $(EXTRA) | sed -u -E '/already satisfied|^(Installing collected|Successfully)/d'
	@rm -f $(filter-out $(READY)%,$(wildcard .venv/ready-*))
	@touch $@ $(READY)
