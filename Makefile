# The doors. Each sets up .venv from nothing; PYTHON chooses the interpreter that it is made with.
#
#   make demo     text from the model that ships, every attention layer and every token through headway
#   make test     the tests, against the peers that run here
#   make check    lint, types, formatting, freshness of the generated stub
#   make bench    headway beside its peers, into docs/performance.md; BENCH='layers --only L=512' for a part
#   make vectors  the conformance vectors, from the reference; make conformance: who passes them, into docs/conformance.md
#   make versions build and test on the oldest and the newest Python
#   make cross    the same bits on 64-bit Arm, under emulation

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CORE := $(shell find src/core -type f) CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find src/core tests -name '*.h' -o -name '*.cpp')

# The CPU build of PyTorch is asked for by its version: an open requirement would bring gigabytes of CUDA along.
PEERS := torch==2.13.0 transformers>=5,<6 mlx[cpu]>=0.29 mlx-lm>=0.28
BENCH_PEERS := onnx>=1.18 onnxruntime>=1.23 openvino>=2025.0 jax>=0.6 llama-cpp-python>=0.3.16

.PHONY: demo test check bench vectors conformance versions cross stub format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	@$(BIN)/headway info
	@echo
	$(BIN)/headway generate "In the beginning" --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 7

test: $(VENV)/test $(VENV)/peers
	$(BIN)/python -m pytest

check: $(VENV)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python -m nanobind.stubgen -q -m headway._native -o $(VENV)/_native.pyi
	diff -u src/headway/_native.pyi $(VENV)/_native.pyi

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks $(BENCH) --write

vectors: $(VENV)/test
	$(BIN)/python tools/make_vectors.py

conformance: $(VENV)/peers
	for peer in llama-cpp-python msgspec '--no-deps sglang'; do $(PIP) $$peer || echo "no $$peer here"; done
	$(BIN)/python tools/conformance.py

versions:
	$(MAKE) VENV=.venv-3.10 PYTHON=python3.10 PEERS= test
	$(MAKE) VENV=.venv-3.13 PYTHON=python3.13 PEERS= test

cross:
	tests/cross/run

stub: $(VENV)/check
	$(BIN)/python -m nanobind.stubgen -q -m headway._native -o src/headway/_native.pyi

format: $(VENV)/check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv .venv-* build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The tools that build, in the environment itself: an isolated build would compile everything again at each change.
$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'scikit-build-core>=0.11' 'nanobind==3.1.0' 'cmake>=3.18' ninja
	touch $@

# Builds the extension and installs the package in editable form; again whenever the core changes.
$(VENV)/demo: $(VENV)/tools $(CORE)
	$(PIP) --no-build-isolation -e '.[lm]'
	touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

# Peers are oracles: where one cannot be had (no wheel for this platform), its tests skip and say so.
$(VENV)/peers: $(VENV)/test
	for peer in $(patsubst %,'%',$(PEERS)); do $(PIP) "$$peer" || { echo "no $$peer here: its tests skip"; test -z "$$CI"; }; done
	touch $@

$(VENV)/bench: $(VENV)/peers
	for peer in $(patsubst %,'%',$(BENCH_PEERS)); do $(PIP) "$$peer" || echo "no $$peer here: it is left out"; done
	touch $@

$(VENV)/check: $(VENV)/test
	$(PIP) 'ruff==0.17.6' 'mypy==2.4.1' 'clang-format==23.1.5'
	touch $@
