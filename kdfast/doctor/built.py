"""What is built, and what of it runs on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch

import kdfast
from kdfast import _C
from kdfast.bench import harness
from kdfast.ops import _native

VARIANT = "KDFAST_CPU_VARIANT"
# What multiplies bfloat16 numbers as they are, by variant; in the others they are widened to float32.
UNITS = {
    "avx512_bf16": "AVX512-BF16",
    "avx512_bf16_fma": "none in use: AVX512-BF16 would be slower here than float32, to which bfloat16 is widened",
    "amx": "AMX, AVX512-BF16",
}
LEAST_CAPABILITY = (8, 0)


class Fact(NamedTuple):
    """A line of the report. `wrong`: what is wrong with it and what helps, where something is."""

    name: str
    text: str
    wrong: str = ""


def facts() -> Iterator[Fact]:
    """The lines on the library, the processor and the GPU."""
    yield _library()
    yield Fact("torch", f"{torch.__version__}, Python {platform.python_version()}")
    yield _processor()
    yield from _variant()
    yield Fact("CUDA operators", "not built" if _C.cuda is None else _built_for())
    yield _gpu()


def _library() -> Fact:
    text = f"{_C.version}, compiled by {_C.compiler} for torch {_C.torch} and every later one"
    if _C.version == kdfast.__version__:
        return Fact("library", text)
    return Fact("library", text, f"expected that of kdfast {kdfast.__version__}, got {_C.version}; {_native.BUILD}")


def _processor() -> Fact:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = f"; busy with other work, load {load:.1f}: what is measured is less than it could be" if load > 1 else ""
    text = f"{harness.processor()}, {cores} cores, torch takes {torch.get_num_threads()} threads{busy}"
    return Fact("processor", text)


def _variant() -> Iterator[Fact]:
    known, forced = _C.cpu_variants(), os.environ.get(VARIANT)
    if forced is not None and forced not in known:
        expected = f"expected one of {', '.join(known)}, got {forced!r}; unset it"
        yield Fact("CPU variant", f"{VARIANT}={forced}, which does not run here", expected)
        return
    variant = _C.cpu_variant()
    why = "the best of this processor" if forced is None else f"as {VARIANT} says"
    yield Fact("CPU variant", f"{variant}, {why} ({', '.join(known)})")
    yield Fact("matrix units", UNITS.get(variant, "none in use: bfloat16 is widened to float32"))


def _built_for() -> str:
    assert _C.cuda is not None
    return f"CUDA {_C.cuda['toolkit']}, architectures {_C.cuda['architectures']}"


def _gpu() -> Fact:
    lacking = lacking_of_cuda()
    if not torch.cuda.is_available():
        return Fact("GPU", "none that torch sees")
    properties = torch.cuda.get_device_properties(0)
    text = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors"
    # A library without CUDA is complete: what was built is what is there.
    return Fact("GPU", text, lacking if _C.cuda is not None else "")


def lacking_of_cuda() -> str:
    """What keeps the operators from this machine's GPU, and what helps; "" where nothing does."""
    if not torch.cuda.is_available():
        of_torch = "" if torch.version.cuda else f"; torch {torch.__version__} is without CUDA"
        return f"expected a GPU that torch sees, got none{of_torch}"
    if _C.cuda is None:
        return f"expected CUDA operators, got a library without; with nvcc: KDFAST_CUDA=ON {_native.BUILD}"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"expected a GPU of compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    try:
        _C.cuda_kernels()
    except RuntimeError as error:
        return f"expected kernels that load on this GPU, got {error}; KDFAST_CUDA=ON {_native.BUILD}"
    return ""


def lacking_of_variant(name: str) -> str:
    """What keeps a CPU variant from running; "" where it runs or could."""
    known = _C.cpu_variants()
    return "" if name in known else f"expected a processor that has it, got one of {', '.join(known)}"
