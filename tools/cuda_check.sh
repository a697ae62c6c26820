#!/usr/bin/env bash
# The CUDA part compiles, links and imports, and one wheel runs under both torches; no GPU is needed.
#   tools/cuda_check.sh PYTHON     PYTHON: the CPU torch's, with the package built in place (make cuda-check)
#   WORKERS                        how many processes share the tests; one for each core where it is not set
#   TORCH_CUDA                     what pip installs as CUDA torch; its CUDA major must be nvcc's
# Makes .venv-cuda (about 5 GB) and removes it; KEEP=1 keeps it.
set -euo pipefail
cpu_python=$(command -v "$1")
cpu_python=$(cd "$(dirname "$cpu_python")" && pwd)/$(basename "$cpu_python")
torch=${TORCH_CUDA:-torch==2.11.0}
if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then export CUDA_HOME=/usr/local/cuda; fi
if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then
  echo "SKIP cuda-check: no nvcc on PATH nor in CUDA_HOME, so there is nothing to compile CUDA code with"
  exit 0
fi

root=$PWD
work=$(mktemp -d)
cleanup() {
  rm -rf "$work"
  if [ "${KEEP:-0}" != 1 ]; then rm -rf "$root/.venv-cuda"; fi
}
trap cleanup EXIT

python3 -m venv .venv-cuda
cuda_python=$PWD/.venv-cuda/bin/python
"$cuda_python" -m pip install --quiet --upgrade setuptools ninja numpy pytest pytest-xdist hypothesis "$torch"

# The CUDA build uses a copy of the sources, so that the package built in place here is left alone; the CPU build
# reuses the object files of that package.
list_sources() {
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard
  else # an unpacked source archive
    find . \( -name '.venv*' -o -name build -o -name dist -o -name '*.egg-info' -o -name __pycache__ \) -prune \
      -o -type f ! -name '*.so' -print0
  fi
}
list_sources | xargs -0 cp --parents -t "$work"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0;9.0+PTX}"
for python in "$cuda_python" "$cpu_python"; do
  name=$("$python" -c "import torch; print(torch.__version__)")
  sources=$work
  if [ "$python" = "$cpu_python" ]; then
    sources=$root
    rm -rf build/lib.* build/bdist.*
  fi
  (cd "$sources" && "$python" -m pip wheel -v --no-build-isolation --no-deps -w "$work/dist/$name" . \
    >"$work/build.log" 2>&1) || { tail -n 60 "$work/build.log"; exit 1; }
  grep 'ulmfit_fast: building' "$work/build.log"
  if [ "$python" = "$cuda_python" ]; then
    "$python" "$work/tools/resource_report.py" "$work/build.log" benchmarks/results/cuda-resources.md
  fi
  mkdir "$work/$name"
  (cd "$work/$name" && "$python" -m zipfile -e ../dist/"$name"/*.whl . && cp -r ../tests .)
  if [ "$python" = "$cuda_python" ]; then
    "$python" "$work/tools/matrix_check.py" "$work/$name/ulmfit_fast/_C.abi3.so"
  fi
done

# Each wheel under each torch, from a directory without sources. The CUDA build under its own torch runs all tests of
# the ops and of compiled models; the two mixed pairs run those that depend on the library's ABI. The fourth pair is
# `make test`.
tests=$(for op in ulmfit_fast/ops/[a-z]*.py; do echo "tests/test_$(basename "$op")"; done)
tests="$tests tests/test_compile.py tests/test_model.py"
for built in "$work"/2.*; do
  for python in "$cuda_python" "$cpu_python"; do
    running=$("$python" -c "import torch; print(torch.__version__)")
    echo "built with torch $(basename "$built"), runs with $running:"
    cd "$built"
    PYTHONPATH=. "$python" -c "import ulmfit_fast; print(ulmfit_fast.info())"
    choice="against_reference or gradcheck or opcheck or test_bits or autocast"
    if [ "$(basename "$built")" = "$running" ]; then choice="not every_isa and not ulmfit_sizes"; fi
    if [ "$python" = "$cuda_python" ] && [ "$(basename "$built")" = "$running" ]; then
      # in words of torch's own where there is no GPU; where there is one, it runs
      PYTHONPATH=. "$python" -c "
import torch, ulmfit_fast
try:
    print(ulmfit_fast.dropout_mask(1, (4,), 0.5, device='cuda'))
except RuntimeError as error:
    assert not torch.cuda.is_available() and 'NVIDIA driver' in str(error), error
    print('a CUDA call without a GPU:', str(error).split('.')[0])
"
    fi
    if [ "$(basename "$built")" != "$running" ] || [ "$python" = "$cuda_python" ]; then
      # shellcheck disable=SC2086
      OMP_WAIT_POLICY=passive PYTHONPATH=. "$python" -m pytest -n "${WORKERS:-$(nproc)}" -p no:cacheprovider -k "$choice" $tests
    fi
    cd - >/dev/null
  done
done
