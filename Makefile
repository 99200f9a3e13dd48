# make train   a vision transformer on handwritten digits in BF16, MXFP4 and TetraJet, side by side
# make test    the whole test suite
# Both make .venv and install what they need. To use an environment of yours that has what README.md lists (no network needed):
# make test VENV=          (the python3 on the PATH), or make test VENV= PYTHON=/path/bin/python
# (VENV=/path names another folder for .venv, and pip then installs the pinned torch and the rest into it).
VENV ?= .venv
PYTHON ?= python3
# Where no GPU is, a pinned torch that has a CPU build; an unpinned one brings gigabytes of CUDA packages.
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch>=2.11,torch==2.13.0)

ifeq ($(VENV),)
PY := $(PYTHON)
PIP_INSTALL = $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
# One stamp for each environment that has installed from here.
INSTALLED := build/.installed-$(shell $(PYTHON) -c 'import sys, zlib; print(zlib.crc32(sys.prefix.encode()))')
TOOLS :=
else
PY := $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install --quiet "$(TORCH)" numpy && $(PY) -m pip install --quiet -e ".[test,lint]"
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/bin/
endif

# The CUDA kernels on the CPU, for the tests: docs/emulation.md.
EMULATED := build/emulated/libmxtrain_emulated.so
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)

.PHONY: install train test lint format bench sanitize clean
install: $(INSTALLED)

train: $(INSTALLED)
	$(PY) examples/train_vit.py --recipe bf16 mxfp4_baseline tetrajet --out runs/vit

test: $(EMULATED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(TOOLS)clang-format --dry-run -Werror

format: $(INSTALLED)
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(TOOLS)clang-format -i

bench: $(INSTALLED)
	$(PY) -m bench run

# On a GPU: the tests of the ops under both tools, one after the other. Graphs need the caching allocator that memcheck
# must do without. The GEMM's sweep by itself: tests/test_gemm_sweep.py has what racecheck needs there.
SANITIZED ?= tests/test_quantize.py tests/test_strips.py tests/test_pairs.py tests/test_requantize_tiles.py tests/test_gemm_fold.py \
  tests/test_split_k.py tests/test_context.py tests/int8 tests/sm120
sanitize: $(INSTALLED)
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	  --kernel-name kernel_substring=mxtrain $(PY) -m pytest -q -x -p no:cacheprovider -k "not graph" $(SANITIZED) || exit 1; done

$(INSTALLED): $(SOURCES)
ifneq ($(VENV),)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
endif
	$(PIP_INSTALL)
	$(PY) -c "import mxtrain"
	@mkdir -p $(dir $@) && touch $@

$(EMULATED): export MXTRAIN_EMULATED = 1
$(EMULATED): $(INSTALLED)
	$(PIP_INSTALL)
	@touch $@

clean:
	rm -rf build .venv runs mxtrain/*.so *.egg-info
