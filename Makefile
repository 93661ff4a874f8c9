# The doors. Each sets up .venv from nothing; PYTHON chooses the interpreter that it is made with.
#
#   make demo     text from the model that ships, every attention layer and every token through headway
#   make demo-transformers  the laws of bits of a transformers model, stock and with headway; MODEL=folder
#   make test     the tests, against the peers that run here
#   make check    lint, types, formatting of code and pages, freshness of the generated stub
#   make sanitize the tests that look for memory errors, undefined behaviour and races, under the compiler's sanitizers
#   make mutants  break one line after another, and see the tests notice; MUTANTS='--only tree' for a part
#   make bench    headway beside its peers, into docs/performance.md; BENCH='layers --only L=512' for a part
#   make docs     docs/api.md, from the signatures and docstrings
#   make vectors  the conformance vectors, from the reference; make conformance: who passes them, into docs/conformance.md
#   make versions build and test on every Python here from 3.10 on, with the newest of everything
#   make constraints  choose the newest of everything anew, into constraints.txt
#   make cross    the same bits on 64-bit Arm, under emulation

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Every door installs the versions that are written here; CONSTRAINTS= takes the newest instead.
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))
CORE := $(shell find src/core -type f) CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find src/core tests -name '*.h' -o -name '*.cpp')

# What is installed beside what pyproject.toml names. PyTorch is asked for by its version in any case: an open requirement
# would bring gigabytes of CUDA along.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
CHECK_TOOLS := ruff mypy pyright[nodejs] jedi clang-format
PEERS := $(shell grep '^torch==' constraints.txt) transformers mlx[cpu] mlx-lm jax onnx onnxruntime llguidance apache-tvm-ffi pydantic
LONE_PEERS := xgrammar # installed without what they need
BENCH_PEERS := openvino llama-cpp-python
BENCH_LONE_PEERS := gguf # writes files for llama.cpp
CONFORMANCE_PEERS := llama-cpp-python msgspec
CONFORMANCE_LONE_PEERS := sglang

.PHONY: demo demo-transformers test check sanitize mutants bench docs vectors conformance versions constraints cross stub format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	@$(BIN)/headway info
	@echo
	$(BIN)/headway generate "In the beginning" --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 7

demo-transformers: $(VENV)/peers
	$(BIN)/python examples/transformers_bits.py $(MODEL)

test: $(VENV)/test $(VENV)/peers
	$(BIN)/python -m pytest

check: $(VENV)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/wrap.py --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_typing.py
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python -m nanobind.stubgen -q -m headway._native -o $(VENV)/_native.pyi
	diff -u src/headway/_native.pyi $(VENV)/_native.pyi

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks $(BENCH) --write

# A build of its own, of the best table for this machine. The sanitizers' libraries of GCC must be loaded before Python,
# whose leaks are not ours. ThreadSanitizer watches the pool in a program without Python.
SANITIZED := SKBUILD_BUILD_DIR=build/sanitize VENV=$(VENV)-sanitize
SANITIZE_TESTS := tests/test_races.py $(patsubst %,tests/attention/test_%.py,attention layers cache) \
  $(patsubst %,tests/sampling/test_%.py,sample penalties logprobs speculative sampler)
PRELOAD = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
sanitize: $(VENV)/demo build/sanitize/hammer
	build/sanitize/hammer
	CMAKE_ARGS="-DHEADWAY_SANITIZE=address,undefined -DHEADWAY_OPTIMIZE=-O1 \
	  -DHEADWAY_TABLES=$$($(BIN)/python -c 'import headway; print(headway.info().isa)')" \
	  $(MAKE) $(SANITIZED) $(VENV)-sanitize/test
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(VENV)-sanitize/bin/python -m pytest $(SANITIZE_TESTS)

# Tests are named in tools/mutants.py, with each mutant.
mutants: $(VENV)/peers
	$(BIN)/python tools/mutants.py $(MUTANTS)

build/sanitize/hammer: tests/pool/hammer.cpp src/core/threads.cpp src/core/threads.h src/core/kernels.h
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -Wall -Wextra -fsanitize=thread $(filter %.cpp,$^) -pthread -o $@

docs: $(VENV)/test
	$(BIN)/python tools/make_api.py

vectors: $(VENV)/test
	$(BIN)/python tools/make_vectors.py

conformance: $(VENV)/peers
	for peer in $(CONFORMANCE_PEERS) $(CONFORMANCE_LONE_PEERS:%='--no-deps %'); do $(PIP) $$peer || echo "no $$peer here"; done
	$(BIN)/python tools/conformance.py

# Without the peers: not every one of them has a wheel for every Python.
versions:
	$(PYTHON) tools/pythons.py | { while read -r version path; do echo "Python $$version" && \
	  rm -rf .venv-newest-$$version build/newest-$$version && \
	  SKBUILD_BUILD_DIR=build/newest-$$version $(MAKE) VENV=.venv-newest-$$version PYTHON=$$path CONSTRAINTS= PEERS= LONE_PEERS= test \
	  </dev/null || exit 1; done; }

constraints:
	$(PYTHON) tools/constraints.py $(BUILD_TOOLS) $(CHECK_TOOLS) \
	  --peers '$(subst $() ,' ',$(strip $(PEERS) $(BENCH_PEERS) $(CONFORMANCE_PEERS)))' --alone $(LONE_PEERS) $(BENCH_LONE_PEERS) $(CONFORMANCE_LONE_PEERS)

cross:
	tests/cross/run

stub: $(VENV)/check
	$(BIN)/python -m nanobind.stubgen -q -m headway._native -o src/headway/_native.pyi
	$(BIN)/python tools/make_params.py

format: $(VENV)/check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/wrap.py
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv .venv-* build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The tools that build, in the environment itself: an isolated build would compile everything again at each change.
$(VENV)/tools: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(BUILD_TOOLS)
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
	for peer in $(patsubst %,'%',$(PEERS)) $(LONE_PEERS:%='--no-deps %'); do $(PIP) $$peer || { echo "no $$peer here: its tests skip"; test -z "$$CI"; }; done
	touch $@

$(VENV)/bench: $(VENV)/peers
	for peer in $(patsubst %,'%',$(BENCH_PEERS)) $(BENCH_LONE_PEERS:%='--no-deps %'); do $(PIP) $$peer || echo "no $$peer here: it is left out"; done
	touch $@

# The types of headway.integrations are checked against the libraries themselves.
$(VENV)/check: $(VENV)/peers
	$(PIP) $(CHECK_TOOLS)
	touch $@
