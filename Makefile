# SPDX-License-Identifier: MIT
# Every target sets itself up in .venv.   PYTHON=python3.12 make test   takes another interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q --upgrade-strategy only-if-needed
ARGS ?=
SIMT := OFF
LEVELS := all
# nvcc takes longer than all else; without a device its kernels run nowhere (make cuda and wheels compile them anyway).
CUDA := $(if $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg),AUTO,OFF)

.PHONY: demo pretrained test test-avx2 bench gpu torture fuzz fuzz-files lint cuda sanitize build setup clean help

help:
	@echo "make demo    train a small system on real data to a quality, at most 25 minutes; writes runs/demo/report.html"
	@echo "make pretrained  train the small system that ships in the package anew (needs npm and a network; hours)"
	@echo "make test    build everything and run all tests"
	@echo "make test-avx2  the tests as on a processor with AVX2 and nothing newer"
	@echo "make bench   time every op beside its peers, under 20 minutes; writes benchmarks/results"
	@echo "make gpu     on a machine with an NVIDIA GPU: tests, sanitizers and benchmarks there, under ten minutes"
	@echo "make torture  kill -9, signals, damage, full disks, bad data: every run must end as if nothing had been"
	@echo "make fuzz    100,000 random right and wrong calls of all ops and AdamW16: right, or refused by name"
	@echo "make fuzz-files  damaged and hostile files and random command lines, ten minutes of processor time a target"
	@echo "make lint    ruff and clang-format"
	@echo "make cuda    compile all CUDA code for sm_80 and sm_90, without a spilled register (needs nvcc)"
	@echo "make sanitize  the CUDA kernels on the host executor under ASan and UBSan"

demo: LEVELS := native# those of this processor alone
demo: setup
	$(BIN)/dalle-fast demo $(ARGS)

# Seed, commit, log and numbers go into dalle_fast/pretrained/emoji beside the weights.
pretrained: setup
	$(BIN)/pip install --disable-pip-version-check -q 'resvg-py>=0.5'
	$(BIN)/dalle-fast pretrain $(ARGS)

bench: setup
	$(BIN)/python -m pytest benchmarks -q --timeout 600 --benchmark-disable-gc --benchmark-columns=min,median \
	  --benchmark-sort=name --results benchmarks/results $(ARGS)

# With the interpreter that has torch, without a network:   make gpu PYTHON=python3
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

torture: setup
	$(BIN)/python tests/torture.py $(ARGS)

fuzz: setup
	$(BIN)/python tests/fuzz_ops.py --jobs 2 $(ARGS)

fuzz-files: setup
	$(BIN)/python tests/fuzz_files $(ARGS)

test: SIMT := ON# the CUDA kernels on the host executor, csrc/simt/
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-avx2: setup
	.ci/avx2 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

# In the folder of the inner loop: what `make build` has compiled for the same architectures is not compiled again.
cuda: setup
	$(BIN)/cmake -S . -B build/inplace -DDF_CUDA=ON -DDF_CUDA_ARCHS="8.0;9.0+PTX" > build.log 2>&1 || (cat build.log && false)
	@rm -f build.log
	$(BIN)/cmake --build build/inplace
	$(BIN)/python .ci/check_spills build/inplace/cuda/*.ptxas

SANITIZERS := -fsanitize=address,undefined;-fno-sanitize-recover=all
sanitize: setup
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DDF_CUDA=OFF -DDF_SIMT=ON "-DDF_SIMT_FLAGS=$(SANITIZERS)" \
	  -DDF_OUTPUT_DIR=$(abspath build/sanitize/out)
	$(BIN)/cmake --build build/sanitize --target _C_simt
	DALLE_FAST_SIMT=$(abspath build/sanitize/out) ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_simt.py $(ARGS)

# The inner loop: rebuild what changed, in place.
build: $(VENV)/.installed
	@$(BIN)/cmake -S . -B build/inplace -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DDF_SIMT=$(SIMT) -DDF_CUDA=$(CUDA) \
	  -DDF_CPU_LEVELS=$(LEVELS) > build.log 2>&1 || (cat build.log && false)
	@grep "dalle_fast:" build.log; rm -f build.log
	@.ci/progress "Compiling for $(LEVELS) CPU levels, CUDA $(CUDA)" $(BIN)/cmake --build build/inplace

setup: build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || (echo "python3-venv is missing: apt-get install python3-venv" && false)

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/python
	@.ci/progress "Installing the build tools in $(VENV)" $(PIP) 'pip>=24' 'setuptools>=77' 'pybind11>=3.0' cmake ninja
	@DF_SKIP_BUILD=1 .ci/progress "Installing PyTorch and what else is needed (large: some minutes the first time)" \
	  $(PIP) --no-build-isolation -e '.[test,build,lint]'
	@touch $@

clean:
	rm -rf build dalle_fast/_C*.so
