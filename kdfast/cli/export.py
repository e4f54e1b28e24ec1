"""`kdfast export`: one of the sizes of a DynaBERT run, as a model of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.shared import check_writable, fail
from kdfast.recipes import dynabert
from kdfast.recipes.paths import CONFIG, run_settings
from kdfast.results.disk import failure, told


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of `kdfast distill dynabert`.")],
    output: Annotated[Path, typer.Argument(help="Folder for the model, which is not there yet or empty.")],
    width: Annotated[float, typer.Option(help="Share of heads and neurons, one of the run's widths.")] = 1.0,
    depth: Annotated[float, typer.Option(help="Share of layers, one of the run's depths.")] = 1.0,
) -> None:
    """Writes one of the sizes of a DynaBERT run as a plain model with its tokenizer.

    AutoModelForSequenceClassification.from_pretrained loads it, after import kdfast where it is narrower than the whole.
    """
    if not os.path.isfile(output):  # which is told otherwise
        check_writable(output)
    try:
        recipe = _recipe(run)
        for name, share, known in (("width", width, recipe.widths), ("depth", depth, recipe.depths)):
            if share not in known:
                raise ValueError(
                    f"{name}: expected one of the run's, {', '.join(f'{x:g}' for x in known)}, got {share:g}"
                )
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output {output}: expected a folder that is new or empty, got one with files")
        try:
            from kdfast.runs.dynabert import save_size
        except ImportError as error:
            fail(f"{error}: pip install kdfast[train]", 1)
        parameters = save_size(recipe, run, output, width, depth)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        if failure(error, output) is None:
            raise
        fail(told(error), 1)
    typer.echo(f"In {output}: {parameters / 1e6:.1f} million parameters, {width:g} wide and {depth:g} deep")


def _recipe(run: Path) -> dynabert.Recipe:
    if not (run / CONFIG).is_file():
        hint = f"; the run is {run.resolve().parent}" if (run.resolve().parent / CONFIG).is_file() else ""
        raise ValueError(f"run {run}: expected the folder of a run, got one without {CONFIG}{hint}")
    if (name := (run_settings(run) or {}).get("recipe")) != dynabert.Recipe.name:
        raise ValueError(f"run {run}: expected a run of {dynabert.Recipe.name}, got one of {name}")
    recipe = dynabert.Recipe(**dynabert.Recipe.read_yaml(run / CONFIG))
    if not (run / "student" / "stage.json").is_file():
        raise ValueError(
            f"run {run}: expected a finished one, got one without its student; the same kdfast distill continues it"
        )
    return recipe
