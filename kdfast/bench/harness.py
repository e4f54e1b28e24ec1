"""The measuring harness: interleaved baselines, a measured roofline, one table.

Everything compared is timed in one process, in turn (machines are shared and their clocks move), and the median is
reported. A result is checked against the float64 reference before it is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fnmatch
import gc
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast import _C, __version__
from kdfast.bench import timing
from kdfast.bench.registry import OPERATORS, Operator
from kdfast.bench.registry.operator import Side, apply, cast, mapped, tensors


@dataclass(frozen=True)
class Case:
    """One row of the table. `gradient`: forward and backward through autograd, else the loss alone."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    gradient: bool

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.operator}-{shape}-{self.dtype}-{'grad' if self.gradient else 'loss'}"


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds. `roofline`: the time at the device's measured bandwidth, or at the speed of a large
    matrix product where arithmetic bounds the operator, over kdfast's, gradient memory already mapped (`mapped`) or
    fresh from the system (`kdfast`). `rate`: GB/s, or GFLOP/s. Peak memory in MB beyond the inputs."""

    case: Case
    kdfast: float
    mapped: float
    eager: float
    compiled: float | None
    rate: float
    roofline: float
    peak_memory: float
    eager_peak_memory: float


def cases(only: str = "*", device: str = "cpu", sweep: bool = False) -> Iterator[Case]:
    """The cases of every operator whose name matches the pattern `only`."""
    for operator in OPERATORS.values():
        shapes = operator.cuda_shapes if device == "cuda" else operator.cpu_shapes
        for shape, dtype in operator.sweep_shapes if sweep else shapes:
            for gradient in (True, False):
                case = Case(operator.name, shape, dtype, gradient)
                if fnmatch.fnmatch(case.name, only):
                    yield case


def interleaved(functions: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, called in turn until about `seconds` are spent on all of them."""
    times = timing.interleaved(functions, device, seconds=seconds)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Keeps freed memory mapped (glibc), so that a gradient costs no page faults: the kernel alone is left."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
    yield
    if mallopt is not None:
        mallopt(mmap_max, 65536)
        mallopt(trim_threshold, 128 * 1024)
        _trim()


def peak_memory(function: Callable[[], object], device: str) -> float:
    """MB that a call needs beyond what is there before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    _trim()  # what earlier calls freed would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    function()
    return (_resident("VmHWM") - before) / 1e6


def _trim() -> None:
    """Gives freed memory back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def make(case: Case, device: str) -> tuple[Side, Side]:
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = OPERATORS[case.operator].make(case.shape, {"generator": generator, "device": device})
    dtype = getattr(torch, case.dtype)
    return mapped(lambda x: x.to(dtype).requires_grad_(case.gradient), student), cast(teacher, dtype)


def check(operator: Operator, student: Side, teacher: Side) -> None:
    """A wrong operator is not timed: loss and gradient, of the first rows or sequences, against float64."""
    first = tensors(student)[0]
    rows, few = first.shape[0], 4 if first.dim() == 2 else 1
    student, teacher = (
        mapped(lambda x: x.detach()[: few if x.shape[0] == rows else None], side) for side in (student, teacher)
    )
    more = operator.arguments(student)
    results = []
    for function, double in ((operator.function, False), (operator.reference, True)):
        s, t = (cast(side, torch.float64) if double else mapped(Tensor.clone, side) for side in (student, teacher))
        s = mapped(Tensor.requires_grad_, s)
        loss = apply(function, s, t, **more)
        if operator.product:
            loss = loss.float().square().mean()
        gradients = torch.autograd.grad(loss, tensors(s))
        results.append((loss.detach().cpu().double(), torch.cat([g.cpu().double().flatten() for g in gradients])))
    (loss, gradient), (exact_loss, exact_gradient) = results
    error, of_loss = (
        float((gradient - exact_gradient).norm() / exact_gradient.norm()),
        abs(float(loss / exact_loss) - 1),
    )
    # A layer's result is rounded to its dtype; a loss is float32.
    if not error < 5e-3 or not of_loss < (5e-3 if operator.product else 1e-4):
        raise AssertionError(f"{operator.name}: {of_loss:.1e}, its gradient {error:.1e} off float64: not worth timing")


def caller(case: Case, student: Side, teacher: Side) -> Callable[[Callable[..., Tensor]], Callable[[], None]]:
    """Makes of a function of both sides the call that is timed: its result, and the gradients of the student."""
    operator = OPERATORS[case.operator]
    more = operator.arguments(student)
    upstream = torch.randn_like(apply(operator.reference, student, teacher, **more)) if operator.product else None

    def of(loss_of: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            loss = apply(loss_of, student, teacher, **more)
            if case.gradient:
                torch.autograd.grad(loss, tensors(student), upstream)

        return call

    return of


def ours(case: Case) -> Callable[..., Tensor]:
    """kdfast's function, with the reduction that eager code has."""
    operator = OPERATORS[case.operator]
    reduction = {} if operator.product else {"reduction": "batchmean"}
    return lambda *args, **kwargs: operator.function(*args, **reduction, **kwargs)


def run(case: Case, device: str, seconds: float = 2.0, compiled: bool = True) -> Result:
    """Measures one case; with `compiled` against `torch.compile` too, which compiles for many seconds."""
    operator = OPERATORS[case.operator]
    student, teacher = make(case, device)
    check(operator, student, teacher)
    call_of = caller(case, student, teacher)
    kdfasts, eager = call_of(ours(case)), call_of(operator.eager)
    # Before anything keeps memory mapped: high-water marks only show what is fresh.
    peaks = peak_memory(kdfasts, device), peak_memory(eager, device)
    candidates: dict[str, Callable[[], object]] = {"kdfast": kdfasts, "eager": eager}
    if compiled:
        # Each case is compiled for itself: past a number of variants it would silently run eager.
        torch.compiler.reset()
        candidates["compiled"] = call_of(torch.compile(operator.eager))
    times = interleaved(candidates, device, seconds)
    bound, work = ceiling(operator, student, teacher, case.gradient)
    with reused_memory() if device == "cpu" else contextlib.nullcontext():
        kernel = interleaved({"kdfast": kdfasts, "bound": bound}, device, seconds / 4)
    return Result(
        case=case,
        kdfast=times["kdfast"],
        mapped=kernel["kdfast"],
        eager=times["eager"],
        compiled=times.get("compiled"),
        rate=work.needed / kernel["kdfast"] / 1e6,
        roofline=kernel["bound"] * work.needed / work.of_bound / kernel["kdfast"],
        peak_memory=peaks[0],
        eager_peak_memory=peaks[1],
    )


def _bytes(side: Side, numbers: Callable[[Tensor], int] = Tensor.numel) -> int:
    return sum(numbers(x) * x.element_size() for x in tensors(side))


def needed_bytes(operator: Operator, student: Side, teacher: Side, gradient: bool) -> int:
    """What an operator that memory bounds must move: what it needs of both sides read once, the gradient written once."""
    read = _bytes(student, operator.reads) + _bytes(teacher, operator.reads)
    return read + _bytes(student) if gradient else read


@dataclass(frozen=True)
class Work:
    """Bytes or floating-point operations that a call needs, and those of what bounds it."""

    needed: float
    of_bound: float


def ceiling(operator: Operator, student: Side, teacher: Side, gradient: bool) -> tuple[Callable[[], object], Work]:
    """The device's speed on what bounds an operator: a large matrix product; or streaming, over these very tensors: two
    reads and a write into mapped memory, or one read."""
    first = tensors(student)[0].detach()
    if operator.flops is not None:
        a = torch.randn(2048, 2048, device=first.device, dtype=first.dtype if operator.product else torch.float32)
        return lambda: a @ a, Work(operator.flops(student, gradient), 2 * 2048**3)
    size, other = _bytes(student), _bytes(teacher)
    needed = needed_bytes(operator, student, teacher, gradient)
    s = torch.cat([x.detach().flatten() for x in tensors(student)])
    if gradient and other < size:  # a teacher of a few numbers
        out = torch.empty_like(s)
        return lambda: torch.neg(s, out=out), Work(needed, 2 * size)
    if gradient:
        t, out = torch.cat([x.detach().flatten() for x in tensors(teacher)]), torch.empty_like(s)
        return lambda: torch.sub(s, t, out=out), Work(needed, 3 * size)
    return lambda: s.view(torch.int16 if s.element_size() == 2 else torch.int32).amax(), Work(needed, size)


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "kdfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _C.compiler,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return facts | {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": torch.version.cuda,
        }
    return facts | {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "cpu_variant": _C.cpu_variant(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def processor() -> str:
    """The name of its model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


@dataclass(frozen=True)
class Saved:
    """Where results are, and how many of those that were there before are replaced, and how many others kept."""

    path: Path
    replaced: int
    kept: int


def save(results: list[Result], facts: dict[str, Any], folder: Path, stem: str = "operators") -> Saved:
    """Writes `<stem>-<device>-<date>.json`. What the file holds of other cases stays in it.

    Raises:
        ValueError: as `environment_with`.
    """
    path, cases = results_path(facts, folder, stem), {r.case for r in results}
    facts, before = environment_with(path, facts), load(path)[0] if path.exists() else []
    kept = [r for r in before if r.case not in cases]
    write([asdict(r) for r in kept + results], facts, path)
    return Saved(path, len(before) - len(kept), len(kept))


def environment_with(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its environment once results are added to it that were measured in another run.

    Raises:
        ValueError: the file is of another processor or of other versions, or none of `kdfast bench`.
    """
    if not path.exists():
        return facts
    try:
        there: dict[str, Any] = json.loads(path.read_text())["environment"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"output {path}: expected a file of kdfast bench, got another; choose another folder"
        ) from None
    own, theirs = ({**of, **of.get("peers", {})} for of in (facts, there))
    compared = sorted(own.keys() & theirs.keys() - {"date", "load_before", "peers"})
    if differing := [name for name in compared if own[name] != theirs[name]]:
        expected, got = (", ".join(f"{name} {of[name]}" for name in differing) for of in (own, theirs))
        raise ValueError(f"output {path}: expected results of {expected}, got those of {got}; choose another folder")
    both = {name: max(there[name], facts[name]) for name in ("load_before",) if name in there and name in facts}
    peers = {"peers": {**there["peers"], **facts["peers"]}} if "peers" in there and "peers" in facts else {}
    return facts | both | peers


def results_path(facts: dict[str, Any], folder: Path, stem: str) -> Path:
    """`<stem>-<device>-<date>.json`; of a CPU with the variant of the kernels too, as different ones may have one name."""
    name = " ".join(filter(None, (facts["device"], facts.get("cpu_variant"))))
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{stem}-{device}-{facts['date']}.json"


def write(results: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, "results": results}, indent=1) + "\n")
    return path


def load(path: Path) -> tuple[list[Result], dict[str, Any]]:
    data = json.loads(path.read_text())
    made = [Case(**{**r["case"], "shape": tuple(r["case"]["shape"])}) for r in data["results"]]
    return [Result(**{**r, "case": c}) for r, c in zip(data["results"], made, strict=True)], data["environment"]


HEADER = ("case", "ms", "× eager", "× comp.", "rate", "% roof", "MB (eager)")
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def table(results: list[Result]) -> list[tuple[str, ...]]:
    """The rows under `HEADER`."""
    return [
        (
            f"{r.case.operator} {'×'.join(map(str, r.case.shape))} {SHORT[r.case.dtype]} "
            f"{'grad' if r.case.gradient else 'loss'}",
            f"{r.kdfast:.2f}",
            f"{r.eager / r.kdfast:.1f}",
            f"{r.compiled / r.kdfast:.1f}" if r.compiled else "–",
            f"{r.rate:.1f} GB/s" if OPERATORS[r.case.operator].flops is None else f"{r.rate:.0f} GF/s",
            f"{100 * r.roofline:.0f}",
            f"{max(r.peak_memory, 0):.0f} ({max(r.eager_peak_memory, 0):.0f})",
        )
        for r in results
    ]


def markdown(results: list[Result]) -> str:
    rows = [HEADER, ("---", *("---:",) * (len(HEADER) - 1)), *table(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
