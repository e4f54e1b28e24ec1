#!/usr/bin/env bash
# The operator library for one kind of GPU, built where nvcc is and used where that GPU is: any torch >= 2.10 loads it.
#   tools/gpu_library.sh          builds gpu-library/libkdfast.so, unless it is up to date (no GPU needed)
#   tools/gpu_library.sh current  succeeds where that file is of these sources and this architecture
#   tools/gpu_library.sh stamp    what it is compared by
# Settings, all optional:
#   ARCHITECTURE  the GPU, as CMake names it (default 90a-real: Hopper)
#   JOBS          compilers at a time (default: as many as cores)
#   PYTHON        the interpreter whose torch, CMake, Ninja and pybind11 are used (default: .venv's if there is one)
set -euo pipefail
cd "$(dirname "$0")/.."
architecture=${ARCHITECTURE:-90a-real}
folder=gpu-library build=build/gpu-library

stamp() {
  echo "$architecture"
  find csrc CMakeLists.txt -type f | LC_ALL=C sort | xargs sha256sum
}
current() { [ -f $folder/libkdfast.so ] && [ "$(stamp)" = "$(cat $folder/stamp 2>/dev/null)" ]; }

case ${1:-build} in
  current) if current; then exit 0; else exit 1; fi ;;
  stamp) stamp && exit ;;
esac
if current; then exit; fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
python=$("$python" -c 'import sys; print(sys.executable)')
PATH=$(dirname "$python"):$PATH
rm -f $folder/stamp
stamped=$(stamp) # a source that changes meanwhile is not in the library
cmake -S . -B $build -G Ninja -DPython_EXECUTABLE="$python" -DKDFAST_CUDA=ON -DKDFAST_LIBRARY= \
  -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DKDFAST_TORCH="$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')"
cmake --build $build --target kdfast ${JOBS:+-j "$JOBS"}
mkdir -p $folder
cp $build/kdfast/libkdfast.so $folder/
echo "$stamped" >$folder/stamp
