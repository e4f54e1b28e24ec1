"""The command line: distillation by recipes, its results, teacher caches, benchmarks.

Mistakes in a command give one line and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    sys.exit("kdfast: the command line needs typer, which is not installed: pip install kdfast[train]")

from kdfast.cli import interrupt
from kdfast.cli.augment import augment
from kdfast.cli.bench import bench
from kdfast.cli.cache import cache_teacher, check_cache
from kdfast.cli.distill import add_prune, add_recipes
from kdfast.cli.doctor import doctor
from kdfast.cli.evaluate import evaluate
from kdfast.cli.export import export
from kdfast.cli.results import compare, report
from kdfast.cli.shared import fail
from kdfast.results.disk import of_the_user, told

STOPPED = 130  # exit code of what Ctrl-C ended
# Where torchao and bitsandbytes are installed other libraries import them; they tell of parts that they would be faster
# with, and torch of torchao's use of torch.
TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")

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
        from kdfast import __version__

        typer.echo(f"kdfast {__version__}")
        raise typer.Exit


@app.callback()
def _kdfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


add_recipes(distill)
add_prune(app)
for command in (evaluate, compare, report, export, augment, cache_teacher, check_cache, bench, doctor):
    app.command()(command)


def main() -> NoReturn:
    """Entry point: turns what users can meet into one line and an exit code, and lets bugs show their traceback."""
    # click's class, or typer's own copy of it: that depends on typer's version.
    usage_error: Any = typer.BadParameter.__mro__[1]
    interrupt.end()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = STOPPED
    except OSError as error:
        if not of_the_user(error, sys.argv[1:]):
            raise
        fail(told(error), 1)
    except usage_error as error:
        command = error.ctx.command_path if error.ctx else "kdfast"
        if not error.format_message():  # a command without its subcommand: the help was shown
            sys.exit(2)
        fail(f"{error.format_message()}  (help: {command} --help)", 2)
    if status == STOPPED:  # what typer makes of Ctrl-C
        fail("stopped", STOPPED)
    sys.exit(status)
