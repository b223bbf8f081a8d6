# Video Lab runner. `make help` lists the targets.
#
# PYTHON         the interpreter that makes the environment            (python3)
# EXTRA          extras to install: test; gpu or gpu,svdq on a GPU machine (the installed ones, else test)
# TORCH_BACKEND  build of torch: auto, cpu, cu130, …, index            (by the driver; see tools/install.py)
# GPU_VENV       folder of `make gpu-env` for the GPU image's packages     (.venv-gpu)
# GPU_TESTS      tests of `make test-gpu-env`                              (tests/gpu_env, tests of kernels)
# WORKERS        number of parallel test processes                     (one per core, at most four)
# FLAKY_RUNS     number of runs of `make flaky`                        (50)
# FLAKY_TESTS    tests of `make flaky`                                 (tests of threads, signals and storage)
# GPU_CHECK      flags of `make gpu-check`, see docs/gpu-check.md      (none)
# IMAGE          name of the image                                     (video-lab)
# IMAGE_EXTRA    kind of image: gpu, gpu,svdq or cpu                   (gpu)

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),test)
TORCH_BACKEND ?=
WORKERS ?= logical
FLAKY_RUNS ?= 50
FLAKY_TESTS ?= tests/batch tests/storage tests/integration/test_kills.py
GPU_CHECK ?=
IMAGE ?= video-lab
IMAGE_EXTRA ?= gpu

comma := ,
extras_of = $(if $(filter gpu,$(subst $(comma), ,$(1))),$(1)$(comma)demo$(comma)compare,$(1))
STAMP := $(VENV)/.installed-$(EXTRA)
BIN := $(VENV)/bin
GPU_VENV ?= .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_TESTS ?= tests/gpu_env tests/quantization/kernels tests/generation/runtime tests/generation/wan_animate/test_compiled.py
MODELS := .cache/demo-models
MEDIA := .cache/demo-media
SHELL_FILES := .ci/run tools/image.sh $(wildcard examples/*/*.sh examples/*/*.sbatch)
BENCHES = $(filter-out bench/_% bench/%_gpu.py,$(wildcard bench/*.py))
GPU_BENCHES = $(wildcard bench/*_gpu.py) bench/engine.py

define run_each
@mkdir -p out/bench
@set -e; for script in $(1); do echo "== $$script"; $(BIN)/python $$script --json out/bench/$$(basename $$script .py).json; done
@$(if $(strip $(1)),,echo "no such benchmarks in bench/")
endef

.DEFAULT_GOAL := help
.PHONY: help setup gpu-env test-gpu-env demo test soak flaky lint image bench bench-gpu gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with everything in it; EXTRA=gpu for a GPU machine without the test tools

# An environment has one choice of extras; another choice replaces the stamp.
$(STAMP): pyproject.toml tools/install.py tools/pip_settings.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python tools/install.py --editable --extras "$(call extras_of,$(EXTRA))" --backend "$(TORCH_BACKEND)"
	touch $@

gpu-env: $(GPU_STAMP) ## make .venv-gpu with the GPU image's packages and the test tools; needs 6 GB, no GPU

$(GPU_STAMP): pyproject.toml tools/install.py tools/pip_settings.py
	test -x $(GPU_BIN)/python || $(PYTHON) -m venv $(GPU_VENV)
	rm -f $@
	$(GPU_BIN)/python tools/install.py --editable --extras gpu,demo,compare,test-tools --backend "$(or $(TORCH_BACKEND),index)"
	touch $@

test-gpu-env: $(STAMP) $(GPU_STAMP) ## run the tests that need the GPU image's packages, in .venv-gpu; GPU_TESTS="tests/quantization …" for others
	$(GPU_BIN)/python -m pytest -m "not soak" -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(GPU_TESTS)

demo: $(STAMP) ## render the demo manifest with tiny models, no GPU needed: out/demo
	$(BIN)/video-lab weights demo --models $(MODELS) --media $(MEDIA)
	$(BIN)/video-lab run manifests/demo.yaml --out out/demo --models $(MODELS) --sheet out/demo/contact-sheet.png

test: $(STAMP) ## run the tests; VIDEO_LAB_SYSTEM_TESTS=1 adds Ray, whole benchmarks and, if installed, the image, Slurm, a browser
	$(BIN)/python -m pytest -m "not soak" -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

soak: $(STAMP) ## run the long tests; also build the GPU image if possible (20 GB of disk)
	$(BIN)/python -m pytest -m soak --timeout 0

flaky: $(STAMP) ## run the tests of threads, signals and storage FLAKY_RUNS times (50), until one fails
	@for run in $$(seq $(FLAKY_RUNS)); do \
	  $(BIN)/python -m pytest -q -m "not soak" -n $(WORKERS) --maxprocesses 4 --dist loadfile --durations 1 $(FLAKY_TESTS) || \
	    { echo "run $$run of $(FLAKY_RUNS) failed; $$((run - 1)) passed before it"; exit 1; }; \
	done; echo "$(FLAKY_RUNS) of $(FLAKY_RUNS) runs passed"

lint: $(STAMP) ## check style, types, shell scripts and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/hadolint Dockerfile

image: ## build the container image with docker, or with buildah if there is no docker; IMAGE_EXTRA=cpu for the CPU image
	@if docker info >/dev/null 2>&1; then \
	  set -x; docker build --tag $(IMAGE) --build-arg EXTRA=$(IMAGE_EXTRA) --build-arg TORCH_BACKEND=$(TORCH_BACKEND) .; \
	else \
	  set -x; tools/image.sh build $(IMAGE) --build-arg EXTRA=$(IMAGE_EXTRA) --build-arg TORCH_BACKEND=$(TORCH_BACKEND); \
	fi

bench: $(STAMP) ## run the benchmarks that need no GPU; print tables, write JSON to out/bench
	$(call run_each,$(BENCHES))

bench-gpu: $(STAMP) ## run the benchmarks that need a GPU
	$(call run_each,$(GPU_BENCHES))

gpu-check: $(STAMP) ## test a GPU in eight minutes: choices, a real block, the autoencoder, the engine, the README's claims; GPU_CHECK=flags
	$(BIN)/python tools/gpu_check.py $(GPU_CHECK)

clean: ## remove outputs, demo models and caches, but not the environments
	rm -rf out build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(GPU_VENV)/*' -prune -exec rm -rf {} +
