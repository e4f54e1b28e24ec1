"""`kdfast bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.shared import fail


def bench(
    only: Annotated[str, typer.Option(help="Pattern of case names, such as `kl_div-1x*`.")] = "*",
    seconds: Annotated[
        float, typer.Option(help="Time per case, beside compilation; all candidates take turns in it.", min=0.1)
    ] = 2.0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Every operator at widths from 2 to 262144, without torch.compile.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON, markdown table and plot.")] = None,
) -> None:
    """Measures the operators against eager PyTorch and torch.compile, on the GPU where there is one.

    Each result is checked against float64 before it is timed. "GB/s" and "% roof" are of the kernel alone, into memory
    that is already mapped: its least bytes over its time, and that against the bandwidth of a plain pass over the same
    tensors. "× eager" and "× comp." (torch.compile) compare what a user waits for;
    "MB" is peak memory beyond the inputs.
    """
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
        known = ", ".join(case.name for case in harness.cases(device=device, sweep=sweep))
        raise typer.BadParameter(f"only: expected a pattern of case names, got {only!r}; there are {known}")
    facts = harness.environment(device)
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
        path = harness.save(results, facts, output, "sweep" if sweep else "operators")
        every, _ = harness.load(path)
        path.with_suffix(".md").write_text(harness.markdown(every) + "\n")
        (plots.plot_sweep if sweep else plots.plot)(every, facts, path.with_suffix(".png"))
        console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")
