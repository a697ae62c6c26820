# make demo, make test, make bench: everything from nothing, in ./.venv. What each variable does:
#   TORCH=torch==2.13.0   what pip installs as torch
#   USE_ACTIVE=1          use the active environment, which has torch, instead of ./.venv
#   PYTHON=python3        the interpreter that makes ./.venv
#   QUICK=1               make bench: small sizes, two rounds
#   WORKERS=2             how many processes share the tests
#   PTX=90, FULL=1        make ptx-on-cpu: of which architecture; all persistent kernels, not bfloat16's alone
PYTHON ?= python3
TORCH ?= torch==2.13.0
ifdef USE_ACTIVE
PY := $(PYTHON)
BIN :=
STAMPS := build/active
TORCH_STAMP := $(STAMPS)/torch
else
PY := .venv/bin/python
BIN := .venv/bin/
STAMPS := .venv
TORCH_STAMP := $(STAMPS)/with-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' -)
endif

# what a build reads: when one of these changes, the next target rebuilds what depends on it
SOURCES := $(shell find csrc -type f) setup.py tools/build_plan.py pyproject.toml
CMAKE_BIN = $(shell dirname "$$(command -v cmake || echo $(CURDIR)/.venv/bin/cmake)")

WORKERS := $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# by the Python $(1), the tests dealt out by the rule $(2); waiting threads sleep, or those of one process would
# spin on the cores of another
PYTEST = OMP_WAIT_POLICY=passive $(1) -m pytest -n $(WORKERS) --dist $(2)

.PHONY: demo test bench lint cpp-test asan isas-on-cpu run-isas-on-cpu cuda-on-cpu ptx-on-cpu cuda-check readme wheel clean

demo: $(STAMPS)/built
	$(PY) -m ulmfit_fast.cli demo

test: $(STAMPS)/built $(STAMPS)/fastai
	$(call PYTEST,$(PY),loadfile)

# the speed programs and their report, into benchmarks/results; QUICK=1: small sizes, minutes;
# the quality of the stages takes hours: benchmarks/README.md
bench: $(STAMPS)/built
	$(PY) -m benchmarks.lstm $(if $(QUICK),--quick)
	$(PY) -m benchmarks.linear_cross_entropy $(if $(QUICK),--quick)
	$(PY) -m benchmarks.dropout_mask $(if $(QUICK),--quick)
	$(PY) -m benchmarks.train_step $(if $(QUICK),--quick)
	$(PY) -m benchmarks.way_back $(if $(QUICK),--quick)
	$(PY) -m benchmarks.report

lint: $(STAMPS)/lint-tools
	$(PY) -m ruff check .
	$(PY) -m mypy
	find csrc tests/cpp benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' \
	  | xargs $(BIN)clang-format --dry-run -Werror

# the torch-free kernels alone, under ctest; asan: the same with the address and undefined-behaviour sanitizers
cpp-test: build/cmake-tool
	$(CMAKE_BIN)/cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	$(CMAKE_BIN)/cmake --build build/cmake -j "$$(nproc)"
	cd build/cmake && $(CMAKE_BIN)/ctest --output-on-failure -j "$$(nproc)"

asan: build/cmake-tool
	$(CMAKE_BIN)/cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=Debug -DULMFIT_FAST_SANITIZE=ON
	$(CMAKE_BIN)/cmake --build build/asan -j "$$(nproc)"
	cd build/asan && $(CMAKE_BIN)/ctest --output-on-failure -j "$$(nproc)"

# the kernels for the instruction sets that this CPU lacks, through the tests of the ops that reach them: AMX's tile
# registers in memory and, without AVX-512's bf16 instructions, all of AVX-512's made of AVX2's (lightly optimised, as
# that compiles for minutes otherwise)
isas-on-cpu: $(STAMPS)/built
	@case $$(cd / && $(FULL_PY) -c 'import ulmfit_fast; print(*ulmfit_fast.info().isas)') in \
	  *amx*) echo "SKIP $@: this CPU has them all, make test uses them" ;; \
	  *avx512bf16*) $(MAKE) run-$@ ;; \
	  *avx2*) $(MAKE) run-$@ NO_AVX512=1 ;; \
	  *) echo "SKIP $@: this CPU lacks AVX2" ;; esac
run-isas-on-cpu:
	rm -rf build/isas-on-cpu/csrc build/isas-on-cpu/tests && mkdir -p build/isas-on-cpu
	cp -rp csrc ulmfit_fast tests tools setup.py pyproject.toml README.md LICENSE build/isas-on-cpu
ifdef NO_AVX512
	cd build/isas-on-cpu && sed -i 's/"avx512f[^"]*"/"avx2,fma,f16c"/' csrc/kernels/cpu/isa_*.cpp
	cd build/isas-on-cpu && sed -i 's/"-O3"/"-O1"/' setup.py
endif
	cd build/isas-on-cpu && ULMFIT_FAST_CUDA=0 \
	  CFLAGS="-DULMFIT_AMX_ON_CPU -I$$PWD/tests/cpp $(if $(NO_AVX512),-include avx512_on_cpu.h)" \
	  $(FULL_PY) setup.py -q build_ext --inplace >build.log 2>&1 || { tail -n 60 build.log; exit 1; }
	cd build/isas-on-cpu && ULMFIT_FAST_ISA=amx PYTHONPATH=. $(call PYTEST,$(FULL_PY),worksteal) \
	  -p no:cacheprovider $(OP_TESTS) tests/test_lstm_sparse.py tests/test_kernels.py tests/test_nn.py tests/test_precision.py \
	  -k "not compile and not opcheck and not newer_setting and not no_more_than_a_chunk"

# the CUDA ops without a GPU: built for CPU tensors, their kernels run one thread block after the other (those of
# the persistent recurrence in turn), and put through the tests of the ops; what reads threads, instruction sets or
# positions in a message is the CPU's
FULL_PY = $(shell $(PY) -c "import sys; print(sys.executable)")
OP_TESTS := $(foreach op,$(notdir $(wildcard ulmfit_fast/ops/[a-z]*.py)),tests/test_$(op)) tests/test_lstm_persistent.py
define build_on_cpu  # into the directory $(1), with the options $(2) of cmake
	$(CMAKE_BIN)/cmake -S . -B $(1) -DULMFIT_FAST_CUDA_ON_CPU=ON -DPython_EXECUTABLE="$(FULL_PY)" \
	  -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')" $(2)
	$(CMAKE_BIN)/cmake --build $(1) -j "$$(nproc)"
	rm -rf $(1)/site && mkdir $(1)/site && cp -r ulmfit_fast tests pyproject.toml $(1)/site
	rm -f $(1)/site/ulmfit_fast/*.so && cp $(1)/_C.abi3.so $(1)/site/ulmfit_fast
endef
TEST_ON_CPU = PYTHONPATH=. $(call PYTEST,$(FULL_PY),worksteal) -p no:cacheprovider --cuda-on-cpu
cuda-on-cpu: $(STAMPS)/built build/cmake-tool
	$(call build_on_cpu,build/$@)
	cd build/$@/site && $(TEST_ON_CPU) $(OP_TESTS)
	cd build/$@/site && ULMFIT_FAST_RECURRENCE=auto $(TEST_ON_CPU) tests/test_lstm.py

# the same by the PTX that nvcc makes of the kernels, for PTX=80 or 90; of the persistent ones those of bfloat16,
# as they take long to compile, or with FULL=1 all
PTX := 90
NVCC := $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
ifeq ($(NVCC),)
ptx-on-cpu:
	@echo "SKIP ptx-on-cpu: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda, so there is no PTX"
else
ptx-on-cpu: $(STAMPS)/built build/cmake-tool
	$(call build_on_cpu,build/$@-$(PTX),-DULMFIT_FAST_PTX_ON_CPU=$(PTX) -DNVCC=$(NVCC) \
	  -DULMFIT_FAST_PTX_PERSISTENT=$(if $(FULL),,nv_bfloat16))
	cd build/$@-$(PTX)/site && $(TEST_ON_CPU) $(OP_TESTS) \
	  $(if $(FULL),,-k 'not persistent or bfloat16')
endif

# builds, links and imports the CUDA part, with no GPU needed; runs the CPU tests with that torch
cuda-check: $(STAMPS)/built
	WORKERS=$(WORKERS) tools/cuda_check.sh $(PY)

# the tables of benchmarks/results into README.md and benchmarks/README.md
readme: $(STAMPS)/built
	$(PY) tools/readme_numbers.py

wheel: $(TORCH_STAMP)
	rm -rf build/lib.* build/bdist.*
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist .venv .venv-cuda *.egg-info ulmfit_fast/*.so ulmfit_fast/_build_info.py

ifdef USE_ACTIVE
$(TORCH_STAMP):
	@$(PY) -c "import torch" || { echo "USE_ACTIVE=1, but $(PY) has no torch: type pip install torch"; exit 1; }
	mkdir -p $(STAMPS) && touch $@
else
$(TORCH_STAMP):
	$(PYTHON) -m venv .venv
	rm -f .venv/with-*
	$(PY) -m pip install --quiet --upgrade setuptools ninja "$(TORCH)"
	touch $@
endif

$(STAMPS)/built: $(TORCH_STAMP) $(SOURCES)
	@mkdir -p build
	$(PY) -m pip install -v --no-build-isolation -e '.[train,test]' >build/build.log 2>&1 \
	  || { tail -n 60 build/build.log; exit 1; }
	@grep 'ulmfit_fast: building' build/build.log
	@touch $@

# naming torch's version keeps the torch that is there; without fastai its tests skip, and say so
$(STAMPS)/fastai: $(TORCH_STAMP) tests/requirements-fastai.txt
	$(PY) -m pip install --quiet -r tests/requirements-fastai.txt \
	  "torch==$$($(PY) -c 'import torch; print(torch.__version__)')" \
	  && touch $@ || echo "fastai cannot be installed here: its tests will skip"

# pinned: other versions want other formatting
$(STAMPS)/lint-tools: $(TORCH_STAMP) Makefile
	$(PY) -m pip install --quiet ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

build/cmake-tool:
	@command -v cmake >/dev/null || { $(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet cmake; }
	@mkdir -p build && touch $@
