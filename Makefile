# Each verb sets up what it needs, says what it does, and is safe to repeat.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# LOCK=.github/locked.txt: only files with the hashes that stand there, as on GitHub.
LOCK ?=
# The tests that need no torch: they start at once, and find what is out of place.
HOUSE := tests/house/test_architecture.py tests/fitcast/test_units.py
# The stamp's name is a checksum of the pins: set-up runs again when they change, and only then.
READY := .venv/ready-$(shell cat requirements.txt $(CONSTRAINTS) $(LOCK) pyproject.toml | cksum | tr ' ' -)

.PHONY: help lessons test lab execute stamp test-colab test-browser lint bench clean
lessons test execute stamp lint bench: export HF_HUB_OFFLINE := 1

help: ## show these verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 \t/' | expand -t 20

lessons: $(READY) ## execute every lesson into build/ and write the report; lessons/ stays as it is
	@echo "Executing the lessons into build/"
	@$(BIN)/python -m tools.report

test: $(READY) ## run every test: package, notebooks (strict), house (ARGS="-k ledger" for some)
	@echo "Testing the package, the notebooks and the house"
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest --quiet $(HOUSE)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		$(HOUSE:%=--ignore=%)
endif

lab: $(READY) ## open JupyterLab on the lessons
	@echo "Opening JupyterLab on lessons/ (stop it with Ctrl-C)"
	@$(BIN)/python -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/lessons

execute: $(READY) ## author's verb: make the .ipynb from the .py and run it (LESSON=01 for one)
	@echo "Rebuilding the committed notebooks from their .py"
	@$(BIN)/python -m tools.execute $(LESSON)

stamp: $(READY) ## author's verb: badges, set-up cells, numbers outside the lessons, from one place
	@echo "Stamping"
	@$(BIN)/python -m tools.stamp
	@$(BIN)/python -m tools.cheat_sheet
	@$(BIN)/python -m tools.beyond_one_gpu

test-colab: $(READY) ## set-up cell and lessons on Colab's packages, in .venv-colab (LESSON=01 for one)
	@echo "Testing on Colab's packages"
	@$(BIN)/python -m tools.colab_leg $(LESSON)

test-browser: $(READY)-browser ## every lesson in JupyterLab, used in a browser (LESSON=01 for one)
	@echo "Testing in a browser; pictures go to build/browser/"
	@$(BIN)/python -m pytest tests/browser $(if $(LESSON),--lesson $(LESSON)) $(ARGS)

lint: $(READY) ## check style with ruff
	@echo "Checking style"
	@$(BIN)/python -m ruff check .

bench: $(READY) ## measure what the package promises
	@echo "Measuring"
	@$(BIN)/python tools/bench.py
	@$(BIN)/python tools/bench_step.py
	@test ! -d instructor || $(BIN)/python -m instructor.bench

# The instructor's verbs; the students' archive has none of them.
-include instructor/verbs.mk

clean: ## remove build/ and caches; .venv stays
	@echo "Removing build/ and caches"
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	@find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-exec rm -rf {} +

$(READY)-browser: BROWSER := --editable '.[browser]'
$(READY) $(READY)-browser:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv (the first time: some minutes and about 1 GB)"
	@$(PYTHON) -m venv .venv
	$(if $(LOCK),@$(PIP) --quiet --only-binary :all: --require-hashes --requirement $(LOCK))
	@$(PIP) --constraint $(CONSTRAINTS) $(if $(LOCK),--no-index) --quiet setuptools
	@$(PIP) --constraint $(CONSTRAINTS) $(if $(LOCK),--no-index) --no-build-isolation --editable '.[dev]' $(BROWSER) | sed -u -E '/already satisfied|^(Installing collected|Successfully)/d'
	@rm -f .venv/ready-*
	@touch $@ $(READY)
