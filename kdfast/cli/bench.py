"""`kdfast bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli.shared import check_writable, fail


def bench(
    only: Annotated[str, typer.Option(help="Pattern of case names, such as `kl_div-1x*`.")] = "*",
    seconds: Annotated[
        float, typer.Option(help="Time per case, beside compilation; all candidates take turns in it.", min=0.1)
    ] = 2.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Every operator at widths from 2 to 262144, without torch.compile.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Losses that other libraries have too: kdfast beside these and plain torch.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="--peers with this library (liger-kernel, trl, torchtune), not all of them; several times."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, markdown table and plot.")] = None,
) -> None:
    """Measures the operators against eager PyTorch and torch.compile, on the GPU where there is one.

    Each result is checked against float64 before it is timed. "GB/s" and "% roof" are of the kernel alone, into memory
    that is already mapped: its least bytes over its time, and that against the bandwidth of a plain pass over the same
    tensors. "× eager" and "× comp." (torch.compile) compare what a user waits for;
    "MB" is peak memory beyond the inputs.

    With --peers each loss and its gradient are made of the same inputs by all that have it, in turn; "gradient error" is
    against float64, and libraries that are not installed are left out.
    """
    if sweep and (peers or peer):
        raise typer.BadParameter("sweep: expected --sweep or --peers, got both")
    if peers or peer:
        _peers(only, seconds, peer or [], output)
    else:
        _operators(only, seconds, sweep, output)


def _operators(only: str, seconds: float, sweep: bool, output: Path | None) -> None:
    try:
        import torch
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        from kdfast.bench import harness, plots
    except ImportError as error:
        fail(f"{error}: pip install kdfast[bench]", 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(harness.cases(only, device, sweep))
    if not cases:
        raise _no_case(only, [case.name for case in harness.cases(device=device, sweep=sweep)])
    facts, stem = harness.environment(device), "sweep" if sweep else "operators"
    _check_output(output, facts, stem)
    console = Console()
    progress = Console(stderr=True)
    measuring = track(cases, "measuring", console=progress)
    results = [harness.run(case, device, seconds, compiled=not sweep) for case in measuring]
    title = f"{facts['device']}, torch {facts['torch']}"
    table = Table(
        *harness.HEADER, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in table.columns[1:]:
        column.no_wrap = True
        column.justify = "right"
    for row in harness.table(results):
        table.add_row(*row)
    console.print(table)
    if output is not None:
        saved = harness.save(results, facts, output, stem)
        every, facts = harness.load(saved.path)
        saved.path.with_suffix(".md").write_text(harness.markdown(every) + "\n")
        (plots.plot_sweep if sweep else plots.plot)(every, facts, saved.path.with_suffix(".png"))
        _tell(console, saved)


def _no_case(only: str, names: Sequence[str]) -> typer.BadParameter:
    """With the cases of the operator that was meant, or a pattern for each operator."""
    of_one = [name for name in names if name.partition("-")[0] == only.partition("-")[0]]
    known = ", ".join(of_one or dict.fromkeys(f"{name.partition('-')[0]}-*" for name in names))
    return typer.BadParameter(f"only: expected a pattern of case names, got {only!r}; there are {known}")


def _check_output(output: Path | None, facts: dict[str, Any], stem: str) -> None:
    """Before anything is measured."""
    from kdfast.bench import harness

    if output is None:
        return
    check_writable(output)
    try:
        harness.environment_with(harness.results_path(facts, output, stem), facts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _tell(console: Any, saved: Any) -> None:
    path = saved.path
    console.print(f"In {path.parent}: {path.name}, {path.stem}.md, {path.stem}.png", soft_wrap=True)
    if saved.replaced or saved.kept:
        console.print(f"The file was there: {saved.replaced} of its results are replaced, {saved.kept} others kept.")


def _peers(only: str, seconds: float, names: Sequence[str], output: Path | None) -> None:
    try:
        import torch
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        from kdfast.bench import harness, plots
        from kdfast.bench.peers import comparisons, measure, ways
    except ImportError as error:
        fail(f"{error}: pip install kdfast[bench]", 1)
    unknown = next((name for name in names if name not in ways.LIBRARIES), None)
    if unknown is not None:
        raise typer.BadParameter(f"peer: expected {', '.join(ways.LIBRARIES)}, got {unknown!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = comparisons.cases(device, only)
    if not cases:
        raise _no_case(only, [case.name for case in comparisons.cases(device)])
    found = ways.find(names or list(ways.LIBRARIES), device)
    facts = harness.environment(device) | {"peers": found.versions}
    _check_output(output, facts, "peers")
    console, progress = Console(), Console(stderr=True)
    if found.missing:
        missing = "; ".join(f"{name} ({why})" for name, why in found.missing.items())
        progress.print(f"Left out, as it cannot be imported: {missing}", soft_wrap=True)
    rows: list[measure.Row] = []
    for case in track(cases, "measuring", console=progress):
        rows += measure.measure(case, measure.ways_of(case.comparison, found.ways), device, seconds)
    console.print(f"{facts['device']}, torch {facts['torch']}")
    for title, of_case in measure.by_case(rows).items():
        table = Table(*measure.HEADER, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in measure.cells(of_case, lambda text: f"[bold]{text}[/]"):
            table.add_row(*row)
        console.print(table)
    for line in measure.said(rows):
        console.print(line, markup=False)
    if output is not None:
        saved = measure.save(rows, facts, output)
        every, facts = measure.load(saved.path)
        saved.path.with_suffix(".md").write_text(measure.markdown(every) + "\n")
        plots.plot_peers(every, facts, saved.path.with_suffix(".png"))
        _tell(console, saved)
