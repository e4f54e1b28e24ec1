#!/usr/bin/env bash
# Makes .venv with everything that kdfast, its tests and its linters need, and builds kdfast in it (editable). Does
# nothing where both are up to date. Settings, all optional:
#   PYTHON       the interpreter; by default that of an existing .venv, else python3. Another one makes .venv anew
#   KDFAST_CUDA  ON builds the CUDA operators where no GPU is (minutes; needs nvcc), OFF leaves them out anywhere
#   TORCH_INDEX  package index with CPU builds of torch, asked when the configured indexes have none
set -euo pipefail
cd "$(dirname "$0")/.."

torch_cpu=2.13.0+cpu
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
venv=.venv
constraints=$venv/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'kdfast %3d s: %s\n' "$SECONDS" "$*"; }
fail() { printf 'kdfast: %s\n' "$*" >&2 && exit 1; }
pip() { "$venv/bin/python" -m pip "$@"; }
same_interpreter() {
  local ask='import sys; print(sys.base_prefix, sys.version)'
  [ "$("$1" -c "$ask" 2>/dev/null)" = "$("$venv/bin/python" -c "$ask")" ]
}
# Prints the folders that an interpreter imports packages from, if a torch that kdfast works with is among them.
torch_folders() {
  "$1" -W ignore 2>/dev/null - <<'END'
import sys, torch
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    sys.exit(1)
print("\n".join(p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))))
END
}

check_interpreter() {
  local version
  version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) ||
    fail "$python does not run; install Python 3.10 or later (Debian: apt-get install python3-dev python3-venv)" \
      "or name another: make PYTHON=/path/to/python3"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is Python $version; install Python 3.10 or later, or name another: make PYTHON=/path/to/python3"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make environments (no ensurepip); install it (Debian: apt-get install python3-venv)"
}
check_compiler() {
  local compiler
  [ -f "$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    fail "$python has no Python.h; install Python's headers (Debian: apt-get install python3-dev)"
  for compiler in ${CXX:-c++ g++ clang++}; do
    if echo 'int main() {}' | "$compiler" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then return; fi
  done
  fail "no C++20 compiler found; install GCC 10 or later (Debian: apt-get install g++), or name one: CXX=/path/to/g++"
}

make_environment() {
  $venv/bin/python -m pip --version >/dev/null 2>&1 || $venv/bin/python -m ensurepip
  # The build tools come first, while no packages from outside are visible: their programs must be in .venv/bin.
  say "installing the build tools"
  # shellcheck disable=SC2046  # one word per requirement
  pip install -qq 'pip>=23' $(sed -n '/^requires = \[/s/[^"]*"\([^"]*\)"[],]*/\1 /gp' pyproject.toml)
  local folders
  if torch_folders $venv/bin/python >/dev/null; then
    :
  elif same_interpreter "$python" && folders=$(torch_folders "$python"); then
    say "using the torch of $python"
    echo "$folders" >"$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  elif [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then
    say "installing torch with CUDA (several GB)"
    pip install -qq 'torch>=2.10'
  else
    say "installing torch $torch_cpu (about a minute)"
    pip install -qq "torch==$torch_cpu" 2>/dev/null || pip install -qq --retries 1 --extra-index-url "$torch_index" "torch==$torch_cpu" ||
      fail "no torch $torch_cpu for $($venv/bin/python --version); take another interpreter (make PYTHON=/path/to/python3)," \
        "one that has torch >= 2.10 itself, or an index with this torch (make TORCH_INDEX=https://…)"
  fi
  # What is installed later must not replace this torch, least of all by gigabytes of CUDA packages.
  $venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >$constraints
}
python=${PYTHON:-python3}
if [ ! -x $venv/bin/python ] || { [ "${PYTHON:-}" ] && ! same_interpreter "$python"; }; then
  check_interpreter
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear $venv
fi

# What was made for these contents of these files is up to date.
environment=$(sha256sum pyproject.toml tools/environment.sh tests/integrations.txt)
sources="${KDFAST_CUDA:-AUTO} ${KDFAST_CUDA_ARCHITECTURES:-}
$(find csrc setup.py CMakeLists.txt pyproject.toml kdfast/__init__.py -type f | LC_ALL=C sort | xargs sha256sum)"
environment_current=$([ "$(cat $venv/environment.stamp 2>/dev/null)" = "$environment" ] && echo yes || true)

[ "$environment_current" ] || make_environment
if [ "$(cat $venv/build.stamp 2>/dev/null)" != "$sources" ] || [ ! -f kdfast/libkdfast.so ] ||
  ! ls kdfast/_C.*.so >/dev/null 2>&1; then
  check_compiler
  say "building the C++ operators (about a minute; after a change, seconds)"
  pip install -qq --no-build-isolation --no-deps -e .
  echo "$sources" >$venv/build.stamp
fi
if [ ! "$environment_current" ]; then
  say "installing what recipes, tests and linters use (about a minute)"
  pip install -qq -c $constraints 'kdfast[dev]'
  pip install -qq --no-deps -r tests/integrations.txt
  echo "$environment" >$venv/environment.stamp
  say "ready"
fi
