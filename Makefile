# `make demo` and `make test` set themselves up; nothing is done twice.
PYTHON ?= python3
VENV := .venv
EXTRAS := dev
PY := $(VENV)/bin/python
READY := $(VENV)/ready
# Debian splits the part of venv that brings pip into a package of its own.
BARE_VENV := { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }

.PHONY: setup demo test examples conformance fuzz lint bench docs site

setup: $(READY)

$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || $(BARE_VENV)
	$(PY) -m pip install --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

demo: setup  ## fine-tune MiniLM on movie reviews; SENTENCE="..." adds one of your own
	$(PY) -m demo $(if $(SENTENCE),"$(SENTENCE)")

WORKERS := 2
test: setup  ## the whole suite, in two processes; WORKERS=8 for more
	$(PY) -m pytest -n $(WORKERS) --dist loadfile

# An environment of their own: Flower holds packages at older versions than the command line needs.
examples:  ## every trainer, and more than one process; ARGS="trl_sft rl_sync" for some of them
	$(MAKE) setup VENV=.venv-examples EXTRAS=examples,cluster
	.venv-examples/bin/python -m benchmarks.examples $(ARGS)

conformance: setup  ## PEFT's own tests on DVoRA; ARGS="test_config.py -k pickle" for a part, ARGS=--record for the figures
	$(PY) -m conformance $(ARGS)

fuzz: setup  ## the long runs: histories of surgery and of state, every damaged adapter folder, 140 kills of commands
	$(PY) -m pytest --fuzz tests/histories tests/tuner/surgery tests/tuner/state/test_fuzzed_folders.py tests/hardening

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup  ## write benchmarks/results/*.json
	$(PY) -m benchmarks.exactness
	$(PY) -m benchmarks.support
	$(PY) -m benchmarks.speed
	$(PY) -m benchmarks.speed.plots
	$(PY) -m demo --record

docs: setup  ## write the README's tables from the committed results
	$(PY) -m benchmarks.readme

site: setup  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
