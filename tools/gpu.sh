#!/usr/bin/env bash
# The evidence run: builds for the GPU at hand, then shows that kdfast is right and how fast it is, in some eight minutes.
# Downloads nothing: it uses the torch, CMake, Ninja, pybind11 and pytest of the interpreter, and the library of
# tools/gpu_library.sh where that is of these sources. Every stage has its own time; after each one the archive holds all
# that there is. Settings, all optional:
#   OUT     folder for evidence.tar.gz and summary.txt (default runs/gpu)
#   STAGES  some of: smoke tests benchmarks sanitizer linear peers (default: all, in this order)
#   ONLY    tests and benchmarks whose names contain it
#   WHEELS  folder with wheels of peers to compare with (liger-kernel)
#   PYTHON  the interpreter (default: .venv's if there is one, else python3)
# KDFAST_GPU_DRY=1 rehearses it without a GPU (kdfast/bench/evidence/record.py).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-runs/gpu} stages=${STAGES:-smoke tests benchmarks sanitizer linear peers} dry=${KDFAST_GPU_DRY:-}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
work=$(mktemp -d) wheels=$(mktemp -d)
trap 'rm -rf "$work" "$wheels"' EXIT
mkdir -p "$out"
export ONLY=${ONLY:-} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0

say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$work/summary.txt"; }
keep() { # all that there is so far, as one file that is whole at any moment
  cp "$work/summary.txt" "$out/summary.txt"
  tar -C "$work" -czf "$out/evidence.part" . && mv "$out/evidence.part" "$out/evidence.tar.gz"
}
stage() { # name, seconds, command: its log and what it leaves in $work are kept whatever becomes of it
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  [ "$dry" ] && limit=600 # a rehearsal may be on a busy machine
  timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  case $code in
    0) say "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) say "$name: OUT OF TIME after $((SECONDS - start)) s" ;;
    *) say "$name: FAILED ($code) after $((SECONDS - start)) s: $(grep -v '^[[:space:]]*$' "$work/$name.log" | tail -n 1 | cut -c1-300)" ;;
  esac
  [ $code = 0 ] || tail -n 25 "$work/$name.log"
  keep
  return $code
}
evidence() { stage "$1" "$2" "$python" -m kdfast.bench.evidence "$1" "$work"; }

build() {
  local capability limit=600
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "make gpu: $python has no torch that sees a GPU" >&2
    exit 2
  }
  # The plain sm_90 target lacks what Hopper's own instructions need.
  [ "$capability" = 90 ] && capability=90a
  export KDFAST_CUDA=ON KDFAST_CUDA_ARCHITECTURES=$capability-real
  if ARCHITECTURE=$KDFAST_CUDA_ARCHITECTURES tools/gpu_library.sh current; then
    export KDFAST_LIBRARY=$PWD/gpu-library/libkdfast.so
    limit=60
    say "gpu-library/libkdfast.so is of these sources: only _C is built"
  fi
  stage build "$limit" "$python" setup.py --quiet build_ext --inplace || exit 1
}
sanitizer() {
  local tool check=()
  for tool in memcheck synccheck racecheck; do
    mkdir -p "$work/$tool"
    [ "$dry" ] || check=(compute-sanitizer --tool "$tool" --kernel-regex kns=kdfast --target-processes all --error-exitcode 9)
    # Without torch's cache every tensor is an allocation: an access beyond one shows. racecheck's findings are to be read.
    stage "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" \
      "$python" -m kdfast.bench.evidence smoke "$work/$tool" || [ "$tool" = racecheck ] || status=1
  done
}
peers() {
  local wheel
  for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do "$python" -m zipfile -e "$wheel" "$wheels"; done
  PYTHONPATH=$PYTHONPATH:$wheels evidence peers 120
}

nvidia-smi >"$work/nvidia-smi.txt" 2>&1
[ "$dry" ] || build
for name in $stages; do
  case $name in
    smoke) evidence smoke 45 || { say "stopped: what smoke finds makes all else worthless" && keep && exit 1; } ;;
    tests) evidence tests 120 || status=1 ;;
    benchmarks) evidence benchmarks 90 || status=1 ;;
    sanitizer) sanitizer ;;
    linear) evidence linear 40 || status=1 ;;
    peers) peers || status=1 ;;
    *) echo "make gpu: STAGES: expected smoke, tests, benchmarks, sanitizer, linear or peers, got $name" >&2 && exit 2 ;;
  esac
done
nvidia-smi >"$work/nvidia-smi-after.txt" 2>&1
keep
tail -n 12 "$work"/benchmarks.log "$work"/linear.log 2>/dev/null
cat "$out/summary.txt"
exit $status
