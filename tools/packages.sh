#!/usr/bin/env bash
# Makes the source distribution, and of that alone a wheel, both in dist/: offline, with the build tools and the torch of
# .venv. auditwheel names the oldest glibc that the wheel runs on; its size is checked, and it is used in a fresh environment.
#   LOCAL=+cu130           a local version for the wheel: what tells a build with CUDA (KDFAST_CUDA=ON) from the CPU's
#   TORCH="2.10.0 2.14.1"  the wheel is used with these releases too, from the package index, each in a fresh environment
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
most=$((5 * 1024 * 1024))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PWD/.venv/bin:$PATH PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 KDFAST_CUDA=${KDFAST_CUDA:-OFF}

mkdir -p dist
"$python" -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >"$work/sdist.log"
sdist=$(ls -t dist/kdfast-*.tar.gz | head -1)
tar -xzf "$sdist" -C "$work"
(
  cd "$work"/kdfast-*
  [ -z "${LOCAL:-}" ] || sed -i "s/^__version__ = \"\(.*\)\"/__version__ = \"\1$LOCAL\"/" kdfast/__init__.py
  "$python" -m pip wheel -q --no-build-isolation --no-deps -w "$work/wheel" .
)
wheel=$(ls "$work"/wheel/*.whl)
size=$(stat -c %s "$wheel")
[ "$KDFAST_CUDA" = ON ] || [ "$size" -lt "$most" ] || { echo "$wheel: $size bytes, at most $most" >&2 && exit 1; }

"$python" -m auditwheel repair -w dist --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libgomp*.so*' "$wheel"
wheel=$PWD/$(ls -t dist/*.whl | head -1)

# In an environment with the torch of .venv, or with the release that is named.
use() {
  local fresh=$work/fresh$1
  "$python" -m venv "$fresh"
  if [ "$1" ]; then
    env -u PIP_NO_INDEX "$fresh/bin/python" -m pip install -q "torch==$1" "$wheel[cli]"
  else
    "$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
      >"$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    "$fresh/bin/python" -m pip install -q --no-deps "$wheel"
  fi
  cd "$work"
  "$fresh/bin/python" - "$fresh" <<'END'
import sys

import torch

import kdfast

assert kdfast.__file__.startswith(sys.argv[1]), kdfast.__file__
student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
loss = kdfast.kl_div(student, teacher)
loss.backward()
expected = (student.softmax(-1) - teacher.softmax(-1)) / 4
torch.testing.assert_close(student.grad, expected.detach())
print(f"kdfast {kdfast.__version__} on torch {torch.__version__}: a loss of {loss.item():.4f}, and its gradient")
END
  "$fresh/bin/kdfast" doctor
  cd - >/dev/null
}
use ""
for release in ${TORCH:-}; do use "$release"; done
echo "$sdist, $(stat -c %s "$sdist") bytes; $wheel, $(stat -c %s "$wheel") bytes"
