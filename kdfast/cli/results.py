"""`kdfast compare` and `kdfast report`: finished runs beside one another, in a table or on a page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.shared import check_writable, fail
from kdfast.results import compare as comparing
from kdfast.results.disk import saving


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, of one task.")],
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json, .md and .png.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Another of what was measured, such as f1. Default: the task's; perplexity.")
    ] = None,
) -> None:
    """Sets finished runs beside one another: a row per run and model, runs that differ in the seed alone in one row.

    Rows of several seeds have mean ± standard error. A student is compared with the same student trained on the labels
    alone, seed by seed, where one of the runs has that. A teacher that several runs have has one row.

    Runs are of one task and the same test rows. Runs of language models compare among those of the same recipe.
    """
    try:
        from rich.console import Console

        from kdfast.results import plots, tables
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    try:
        if output is not None and os.path.isfile(output):
            raise ValueError(f"output {output}: expected a folder, got a file")
        if output is not None:
            check_writable(output)
        comparison = comparing.compare(runs, metric)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    Console().print(tables.comparison_table(comparison))
    if output is not None:
        with saving(output):
            output.mkdir(parents=True, exist_ok=True)
            (output / "comparison.json").write_text(json.dumps(comparison.as_dict(), indent=1) + "\n")
            (output / "comparison.md").write_text(tables.comparison_markdown(comparison) + "\n")
        plots.plot_comparison(output / "comparison.png", comparison)
        typer.echo(f"In {output}: comparison.json, comparison.md, comparison.png")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folder of a finished run, or of several of one task; or a JSON file of kdfast bench."),
    ],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    metric: Annotated[
        str | None, typer.Option(help="Another of what was measured, such as f1. Default: the task's; perplexity.")
    ] = None,
) -> None:
    """Writes a page of HTML about finished runs: table, plots, settings. It needs no other file and no network.

    Several runs are set beside one another as by compare. Of a benchmark the plots are its speed beside eager PyTorch and
    torch.compile, and beside what memory and arithmetic bound; of bench --peers time and memory beside other libraries.
    """
    try:
        from kdfast.results import benchmark_page, page
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    check_writable(output.parent)
    try:
        if output.is_dir():
            raise ValueError(f"output {output}: expected an HTML file, got a folder")
        benchmark = next((path for path in runs if path.is_file()), None)
        if benchmark is None:
            text = page.page(comparing.compare(runs, metric))
        elif len(runs) > 1:
            raise ValueError(f"runs {benchmark}: expected {benchmark_page.EXPECTED}, got {len(runs)} of them")
        else:
            text = benchmark_page.page(benchmark)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with saving(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    typer.echo(f"In {output}")
