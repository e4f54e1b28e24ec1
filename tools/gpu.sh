#!/usr/bin/env bash
# Builds for the GPU at hand, runs the CUDA tests, compute-sanitizer on a few of them and the benchmarks. Downloads
# nothing: it uses the torch, CMake, Ninja, pybind11 and pytest of the interpreter. Settings, all optional:
#   OUT     folder for logs, JSON, table and plot (default runs/gpu)
#   ONLY    a pattern: the tests and benchmarks whose names contain it
#   PYTHON  the interpreter (default: .venv's if there is one, else python3)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-runs/gpu} only=${ONLY:-}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# Under compute-sanitizer, which is slow: every kind of kernel, with rows that leave early and odd edges.
layers='(float32-float32 and (masked or causal or resplit) and (attention or qk or hidden or cosine))'
parts='(selected_linear and float32-float32)'
sanitized="(rows_that_are_not_read or (unaligned and 4999) or $layers or $parts)"
mkdir -p "$out"
status=0
stage() {
  local name=$1 start=$SECONDS
  shift
  "$@" >"$out/$name.log" 2>&1
  local code=$?
  [ $code = 5 ] && code=0 # pytest: no test matches ONLY
  [ $code = 0 ] || { status=1 && tail -n 40 "$out/$name.log"; }
  printf '%-12s %s in %d s\n' "$name" "$([ $code = 0 ] && echo done || echo "FAILED ($code), see $out/$name.log")" $((SECONDS - start))
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
  echo "make gpu: $python has no torch that sees a GPU" >&2
  exit 2
}
# The plain sm_90 target lacks what Hopper's own instructions need.
[ "$capability" = 90 ] && capability=90a
export KDFAST_CUDA=ON KDFAST_CUDA_ARCHITECTURES=$capability-real PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

stage build "$python" setup.py --quiet build_ext --inplace
[ $status = 0 ] || exit 1
stage tests "$python" -m pytest tests -m cuda -k "$only" --durations=10
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    stage "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest tests -m cuda -k "$sanitized${only:+ and $only}"
  done
fi
stage benchmarks "$python" -m kdfast bench --seconds 1 --only "*$only*" --output "$out"
[ "$only" ] || stage vocabulary "$python" benchmarks/large_vocabulary.py --seconds 1 --output "$out"
cat "$out/benchmarks.log"
exit $status
