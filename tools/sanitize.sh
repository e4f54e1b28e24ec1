#!/usr/bin/env bash
# Tests the operators where errors of memory and of threads show:
#   tools/sanitize.sh address,undefined|thread [arguments for pytest]   in a CPU library that is built with these sanitizers
#   tools/sanitize.sh guard [arguments for pytest]   in the library as it is, its memory between pages that no one may touch
# By default the operators' tests and random calls (tests/fuzz). It needs the environment of `make environment`, and GCC.
set -euo pipefail
cd "$(dirname "$0")/.."

check=${1:?address,undefined, thread or guard}
shift
python=$PWD/.venv/bin/python compiler=${CXX:-c++}
build=build/sanitize-${check//,/-}
package=$PWD
mkdir -p "$build"
of_python() { "$python" -c "$1"; }
of_compiler() { "$compiler" -print-file-name="$1"; }

# Another copy of the package, with a library that has the compiler's checks.
build_with() {
  "$PWD/.venv/bin/cmake" -S . -B "$build" -G Ninja -DKDFAST_SANITIZE="$1" -DKDFAST_CUDA=OFF \
    -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$(of_python 'import pybind11; print(pybind11.get_cmake_dir())')" \
    -DKDFAST_TORCH="$(of_python 'import os, torch; print(os.path.dirname(torch.__file__))')" \
    -DKDFAST_VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kdfast/__init__.py)" >"$build.log"
  "$PWD/.venv/bin/cmake" --build "$build"
  package=$PWD/$build/site
  rm -rf "$package"
  mkdir -p "$package"
  cp -r kdfast "$package"
  cp "$build"/kdfast/*.so "$package/kdfast"
}

# Tests that measure memory or compile C++ of their own; and of torch's threads.
unfit="inductor or read_in_place or memory_budget_holds or keep_no_scores"

# What is not kdfast's is built without sanitizers. Leaks at the end are Python's. Threads are the library's own
# (csrc/host/sanitized_threads.cpp) beside one of torch's, whose barriers the thread sanitizer does not know.
case $check in
guard)
  "$compiler" -std=c++20 -O1 -g -shared -fPIC tools/guard.cpp -o "$build/guard.so"
  preloaded=$PWD/$build/guard.so
  ;;
thread)
  build_with "$check"
  preloaded="$(of_compiler libtsan.so) $(of_compiler libstdc++.so.6)"
  export OMP_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1
  export TOKENIZERS_PARALLELISM=false RAYON_NUM_THREADS=1  # threads of Rust are unknown to it
  unfit+=" or whatever_the_threads or threads_do_not_change"
  ;;
*)
  build_with "$check"
  preloaded="$(of_compiler libasan.so) $(of_compiler libstdc++.so.6)"
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
  ;;
esac

operators=(tests/test_{operators,threads,divergence,topk_values,ignored_labels,divisors,dynamic,family}.py
  tests/test_{layers,mixed_dtypes,linear,linear_entropy,linear_errors}.py
  tests/test_{matmul,column_sums,pruned_linear,pruned_packed,pruned_gradients,block_sparse,block_sparse_layer,transforms}.py
  tests/fuzz)
[ $# -gt 0 ] || set -- "${operators[@]}" -k "not ($unfit)"
LD_PRELOAD=$preloaded PYTHONPATH=$package "$PWD/.venv/bin/pytest" -p no:benchmark --capture=sys -q "$@"
