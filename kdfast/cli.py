"""The command line: distillation by recipes, its results, teacher caches, benchmarks.

Mistakes in a command give one line and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("kdfast: the command line needs typer, which is not installed: pip install kdfast[train]")

from kdfast import _interrupt
from kdfast._disk import told
from kdfast.cli_distill import add_recipes
from kdfast.cli_results import compare, evaluate
from kdfast.cli_shared import fail, layer_numbers

STOPPED = 130  # exit code of what Ctrl-C ended

app = typer.Typer(
    help="Distillation of transformers with fused C++ losses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # so that paragraphs are wrapped to the terminal
)
distill = typer.Typer(
    help="Train a small model on a large one by a published recipe.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(distill, name="distill")


def _show_version(wanted: bool) -> None:
    if wanted:
        from kdfast._version import __version__

        typer.echo(f"kdfast {__version__}")
        raise typer.Exit


@app.callback()
def _kdfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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
    tensors. "× eager" and "× comp." (torch.compile) compare what a user waits for; "MB" is peak memory beyond the inputs.
    """
    try:
        import torch
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        from kdfast import bench as harness
    except ImportError as error:
        fail(f"{error}: pip install kdfast[bench]", 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(harness.cases(only, device, sweep))
    if not cases:
        known = ", ".join(case.name for case in harness.cases(device=device, sweep=sweep))
        raise typer.BadParameter(f"no case matches {only!r}; there are {known}", param_hint="--only")
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
        (harness.plot_sweep if sweep else harness.plot)(every, facts, path.with_suffix(".png"))
        console.print(f"In {output}: {path.name}, {path.stem}.md, {path.stem}.png")


@app.command("cache-teacher")
def cache_teacher(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a transformers model.")],
    data: Annotated[
        str, typer.Argument(help="A .txt (a row per line), .jsonl, .json, .csv or .parquet file, or Hub name.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the cache.")],
    k: Annotated[int, typer.Option("--k", help="Entries per token.")] = 64,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    outputs: Annotated[
        str, typer.Option(help="topk of a language model, logits of a classifier, cls, hidden; several with commas.")
    ] = "topk",
    layers: Annotated[
        str | None, typer.Option(help="For hidden and cls, such as 0,6,12: 0 is the embeddings, N after N layers.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per row; longer ones are cut. Default: 1024, or the model's positions.", min=1),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Where the text is.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    shard_mb: Annotated[int, typer.Option(help="Megabytes per file, and in memory until it is written.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, of what is stored.")] = "float32",
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue the cache in the output folder, or remove it and start over."),
    ] = True,
) -> None:
    """Writes a teacher's outputs into a folder, to train from many times.

    topk are the k largest log-probabilities of every token at the temperature, with their indices; cls is the first token's
    hidden state, the last or those of the layers. Rows without text are left out. `kdfast.teacher_cache` reads the folder.

    Ctrl-C keeps the files that are finished. The same command continues after them; what is finished is not repeated.
    """
    command, cache_error = _import_cache_command()
    try:
        command.cache_teacher(
            model,
            data,
            output,
            text_column,
            max_length,
            [name.strip() for name in outputs.split(",")],
            k=k,
            temperature=temperature,
            layers=layer_numbers(layers) if layers else (),
            batch_size=batch_size,
            shard_bytes=shard_mb * 2**20,
            dtype=dtype,
            resume=resume,
        )
    except cache_error as error:
        fail(str(error), 2)
    except ImportError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("stopped; the same command continues after the last finished file", 130)


@app.command("check-cache")
def check_cache(folder: Annotated[Path, typer.Argument(help="Where cache-teacher put it.")]) -> None:
    """Reads a cache of cache-teacher, compares it with its sums, and tells what it holds. A damaged one: exit code 1."""
    command, cache_error = _import_cache_command()
    try:
        command.check_cache(folder)
    except cache_error as error:
        fail(str(error), 1)


def _import_cache_command() -> tuple[Any, Any]:
    try:
        from kdfast.teacher_cache import CacheError, _command
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    return _command, CacheError


add_recipes(distill)
app.command()(evaluate)
app.command()(compare)


def main() -> NoReturn:
    """Entry point: turns what users can meet into one line and an exit code, and lets bugs show their traceback."""
    # click's class, or typer's own copy of it: that depends on typer's version.
    usage_error: Any = typer.BadParameter.__mro__[1]
    _interrupt.end()
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = STOPPED
    except OSError as error:
        fail(told(error), 1)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else "kdfast"
        if not error.format_message():  # a command without its subcommand: the help was shown
            sys.exit(2)
        fail(f"{error.format_message()}  (help: {command} --help)", 2)
    if status == STOPPED:  # what typer makes of Ctrl-C
        fail("stopped", STOPPED)
    sys.exit(status)
