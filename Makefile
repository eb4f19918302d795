# Two commands set everything up on a bare machine: `make sample` and `make test`.
# CI and newcomers get the versions in constraints.txt; the package itself accepts ranges.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu csrc/tests/*.h csrc/tests/*.cpp)

.PHONY: sample test lint format ahead-of-time sass gpu doctor oracles clean

sample: $(VENV)/.installed  ## a video from the embedded model: an mp4 and a contact sheet
	$(RUN) -m opensora sample --prompt "a red circle moving left" --seed 7 --output outputs/sample.mp4

test: $(VENV)/.installed  ## everything that needs no GPU
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format . && $(VENV)/bin/clang-format -i $(SOURCES)

ahead-of-time: $(VENV)/.installed  ## every Triton kernel for four GPUs, without one: registers, spills, shared memory
	$(RUN) -m tests.ahead_of_time --jobs 2 --output bench/results/ahead-of-time.md

sass: $(VENV)/.installed  ## every CUDA kernel's machine code, without a GPU: registers, spills, Hopper's instructions
	$(RUN) -m tests.sass --output bench/results/cuda-extension.md

# On a machine with one NVIDIA GPU and its own python3, PyTorch and Triton: no network, nothing is installed.
gpu:  ## tests, benches and tuning on a GPU, in nine minutes, into OUT=folder; wheels it lacks from WHEELS=folder
	$(PYTHON) -m bench gpu --output $(or $(OUT),outputs/gpu) $(if $(WHEELS),--wheels $(WHEELS))

doctor: $(VENV)/.installed  ## what is installed, and which backend runs each operator
	$(RUN) -m opensora_kernels

oracles: $(VENV)/.installed  ## the recorded answers of the original systems, in ORACLES=folder
	$(RUN) -m tests.oracles $(or $(ORACLES),tests/oracles/data)

# torch first and alone: its version is exact, so that no resolver replaces it by a build with gigabytes of CUDA packages
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[models,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist outputs *.egg-info opensora_kernels/*.so
