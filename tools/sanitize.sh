#!/usr/bin/env bash
# Tests the operators of a CPU library that is built with one of the compiler's sanitizers:
#   tools/sanitize.sh address,undefined|thread [arguments for pytest]
# by default random calls of every operator (tests/fuzz). It needs the environment of `make environment`, and GCC.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=${1:?address,undefined or thread}
shift
python=$PWD/.venv/bin/python
build=build/sanitize-${sanitizers//,/-}
package=$PWD/$build/site
of_python() { "$python" -c "$1"; }

"$PWD/.venv/bin/cmake" -S . -B "$build" -G Ninja -DKDFAST_SANITIZE="$sanitizers" -DKDFAST_CUDA=OFF \
  -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$(of_python 'import pybind11; print(pybind11.get_cmake_dir())')" \
  -DKDFAST_TORCH="$(of_python 'import os, torch; print(os.path.dirname(torch.__file__))')" \
  -DKDFAST_VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kdfast/__init__.py)" >"$build.log"
"$PWD/.venv/bin/cmake" --build "$build"
rm -rf "$package"
mkdir -p "$package"
cp -r kdfast "$package"
cp "$build"/kdfast/*.so "$package/kdfast"

# What is not theirs is built without sanitizers: leaks at the end are Python's, and OpenMP's barriers of GCC are unknown
# to the thread sanitizer, which then needs one thread of torch's and the library's own threads alone.
case $sanitizers in
*thread*) runtime=libtsan.so ;;
*address*) runtime=libasan.so ;;
*) runtime=libubsan.so ;;
esac
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
LD_PRELOAD="$(${CXX:-c++} -print-file-name=$runtime) $(${CXX:-c++} -print-file-name=libstdc++.so.6)"
PYTHONPATH=$package "$PWD/.venv/bin/pytest" -p no:benchmark -q "${@:-tests/fuzz}"
