"""`kdfast doctor`: what is built and installed, how fast this machine is, and what an operator costs on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli.shared import fail

if TYPE_CHECKING:
    from kdfast.bench.harness import Case

Row = tuple[str, str]
DEVICES = ("cpu", "cuda")


def doctor(
    need: Annotated[
        str,
        typer.Option(help="What must be there, such as `train,cuda`: extras, `cuda`, or variants such as `avx512`."),
    ] = "",
    op: Annotated[str | None, typer.Option(help="An operator to try, such as `linear_kd_loss`.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Its sizes in the order of `kdfast bench`, such as `64x152064`. Default: one of its benchmarks."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or on the CPU float64.")] = "float32",
    gradient: Annotated[bool, typer.Option(help="With the student's gradient, or the result alone.")] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the GPU where there is one that the operators run on.")
    ] = None,
) -> None:
    """Tells what is built and installed, how fast this machine is, and what to install for what is missing.

    With --op also what a call moves and computes at the least, the time that takes at the measured speeds, and the
    time of the call itself, checked against float64, with the kernels it goes through.

    The exit status is 0 where all is well, 1 where something is broken or something that was asked for is not there
    (--need, --device, the fast path of --op), with a line that says what helps.
    """
    from kdfast.doctor import built

    if device not in (None, *DEVICES):
        raise typer.BadParameter(f"device: expected cpu or cuda, got {device!r}")
    wanted = [name.strip() for name in need.split(",") if name.strip()]
    _check_names(wanted)
    lacking_of_cuda = built.lacking_of_cuda()
    absent = device == "cuda" and bool(lacking_of_cuda)
    device = device or ("cpu" if lacking_of_cuda else "cuda")
    if op is None and shape is not None:
        raise typer.BadParameter(f"op: expected the operator to which {shape} is a shape, got none")
    case = None if op is None else _case(op, shape, dtype, gradient, device)
    facts = list(built.facts())
    wrong = [f"{fact.name}: {fact.wrong}" for fact in facts if fact.wrong]
    _show("kdfast", [(fact.name, fact.text) for fact in facts])
    _show("optional parts", _parts(wanted))
    wrong += [line for name in wanted for line in _lacking(name)]
    if absent:
        wrong.append(f"device: {lacking_of_cuda}")
    elif not any(fact.wrong for fact in facts):
        wrong += _measured(case, dtype, device)
    if wrong:
        fail("\nkdfast: ".join(wrong), 1)


def _case(op: str, shape: str | None, dtype: str, gradient: bool, device: str) -> Case:
    from kdfast.doctor import cost

    try:
        sizes = None if shape is None else tuple(int(size) for size in shape.replace("×", "x").split("x"))
    except ValueError:
        raise typer.BadParameter(f"shape: expected sizes such as 64x152064, got {shape!r}") from None
    try:
        case = cost.case_of(op, sizes, dtype, gradient, device)
        cost.cost(case)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return case


def _measured(case: Case | None, dtype: str, device: str) -> list[str]:
    """Shows the machine's speeds, and those of a call; what is wrong with it."""
    from kdfast.doctor import cost, speeds

    found = speeds.measure(device, dict.fromkeys(("float32", "bfloat16", *([] if case is None else [dtype]))))
    rates = [(f"products, {name}", f"{rate / 1e9:.0f} GFLOP/s") for name, rate in found.products.items()]
    _show(f"measured on {device}", [("copy", f"{found.copy / 1e9:.1f} GB/s, read and written"), *rates])
    if case is None:
        return []
    least = cost.cost(case)
    try:
        tried = cost.attempt(case, device, found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except AssertionError as error:  # of `kdfast.bench.harness.check`
        return [f"op: expected a right result, got {error}"]
    rows = [("bytes", f"{least.bytes / 1e6:.4g} MB, each read or written once")]
    if least.flops is not None:
        rows.append(("arithmetic", f"{least.flops / 1e9:.4g} GFLOP"))
    rows.append(("floor", f"{least.floor(found):.3g} ms at the measured speeds"))
    part = "" if tried.shape == case.shape else f" at {cost.shown(tried.shape)}, whose floor is {tried.floor:.3g} ms"
    rows.append(("took", f"{tried.took:.3g} ms{part}: {tried.took / tried.floor:.1f} × the floor"))
    fast = cost.is_fast(case, tried)
    rows.append(("path", _path(tried.kernels, fast)))
    what = "with gradient" if case.gradient else "without gradient"
    _show(f"{case.operator} {cost.shown(case.shape)} {case.dtype}, {what}", rows)
    return [] if fast else [f"op: expected a path through kdfast's kernels on {device}, got plain torch"]


def _path(kernels: tuple[str, ...], fast: bool) -> str:
    if kernels:
        return f"fast: kdfast's kernels, {', '.join(kernels)}"
    return "fast: the vendor's products of the live part in place" if fast else "slow: plain torch, as no kernel fits"


def _check_names(wanted: Iterable[str]) -> None:
    from kdfast.doctor import built, extras

    known = [*extras.names(), "cuda", "portable", "avx2", "avx512", *built.UNITS]
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"need: expected some of {', '.join(known)}, got {name!r}")


def _parts(wanted: Iterable[str]) -> list[Row]:
    """What is installed, and what installs the rest."""
    from kdfast import _C
    from kdfast.doctor import extras

    rows = []
    for name in extras.names():
        if name in extras.OF_DEVELOPMENT and name not in wanted:
            continue
        missing, purpose = extras.lacking(name), extras.FOR.get(name, "")
        state = f"{extras.remedy(name)} (missing: {', '.join(missing)})" if missing else "there"
        rows.append((name, f"{state}: {purpose}" if purpose else state))
    if _C.cuda is None:
        rows.append(
            ("CUDA operators", "with nvcc, in the source folder: KDFAST_CUDA=ON pip install --no-build-isolation -e .")
        )
    return rows or [("none", "kdfast is used from its folder, not installed")]


def _lacking(name: str) -> list[str]:
    from kdfast.doctor import built, extras

    if name in extras.names():
        missing = extras.lacking(name)
        return [f"{name}: expected {one}; {extras.remedy(name)}" for one in missing]
    wrong = built.lacking_of_cuda() if name == "cuda" else built.lacking_of_variant(name)
    return [f"{name}: {wrong}"] if wrong else []


def _show(title: str, rows: Iterable[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: [train] would be a style
    console = Console(highlight=False)
    console.print(table)
    console.print()
