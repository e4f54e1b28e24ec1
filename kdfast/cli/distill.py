"""`kdfast distill RECIPE`: one command per recipe, its options made of the recipe's settings."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli.shared import fail, layer_numbers, numbers
from kdfast.recipes import RECIPES, prune
from kdfast.recipes.base import Recipe
from kdfast.recipes.heads import HeadRecipe
from kdfast.results.disk import failure, told

ENDS = """

Ends with a table and leaves the models, metrics.json, config.yaml and a plot in the output folder.{fetched}

Ctrl-C saves a checkpoint and stops. The same command continues; what is finished is not repeated."""
FETCHED = " The demonstration's\nmodels and data are fetched once into $KDFAST_CACHE (default ~/.cache/kdfast)."


QUICK = "-quick"  # what the name of a short run's folder ends in


def add_recipes(app: typer.Typer) -> None:
    for recipe in RECIPES:
        if recipe is not prune.Recipe:
            app.command(recipe.name)(_command(recipe))


def add_prune(app: typer.Typer) -> None:
    """`kdfast prune MODEL`, the recipe whose teacher is what it prunes."""
    app.command(prune.Recipe.name)(_command(prune.Recipe, model="teacher"))


def _command(recipe: type[Recipe], model: str | None = None) -> Callable[..., None]:
    """model: a setting that is given without a name."""
    settings, types_of = dataclasses.fields(recipe), typing.get_type_hints(recipe)

    def distill(
        output: Path | None, config: Path | None, print_config: bool, quick: bool, resume: bool, **given: Any
    ) -> None:
        try:
            values = {} if config is None else recipe.read_yaml(config)
            values |= recipe.quick if quick else {}
            given = {name: value for name, value in given.items() if value not in (None, [])}
            values |= given
            chosen = recipe(**{name: _parsed(name, types_of[name], value) for name, value in values.items()})
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(str(error)) from None
        if print_config:
            typer.echo(chosen.to_yaml(), nl=False)
            return
        folder = Path("runs") / (recipe.name + QUICK * quick) if output is None else output
        _run(chosen, folder, not resume, config, list(given))

    shared = {
        "output": (Path | None, typer.Option(help=f"Run folder. Default: runs/{recipe.name}."), None),
        "config": (Path | None, typer.Option(help="YAML file of settings; options here go before it."), None),
        "print_config": (bool, typer.Option("--print-config", help="Show all settings as YAML and stop."), False),
        "quick": (
            bool,
            typer.Option(
                "--quick", help=f"A short run: {_listed(recipe.quick)}; by default in runs/{recipe.name}{QUICK}."
            ),
            False,
        ),
        "resume": (
            bool,
            typer.Option(
                "--resume/--fresh", help="Continue the run in the output folder, or remove it and start over."
            ),
            True,
        ),
    }
    own = {
        field.name: (
            _option_type(types_of[field.name], field.metadata["repeated"]),
            _option(field, types_of[field.name]),
            None,
        )
        for field in settings
        if field.name != "seed"
    }
    own["seed"] = next((int | None, _option(field, int), None) for field in settings if field.name == "seed")
    first = {"output": shared.pop("output")}
    if model is not None:
        kind, option, default = own.pop(model)
        first[model] = kind, typer.Argument(help=option.help, metavar="MODEL", show_default=False), default
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, option, default) in (first | own | shared).items()
    ]
    distill.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    distill.__annotations__ = {}
    fetched = "" if issubclass(recipe, HeadRecipe) else FETCHED  # those have no demonstration
    distill.__doc__ = inspect.cleandoc(recipe.__doc__ or "") + ENDS.format(fetched=fetched)
    return distill


def _run(recipe: Recipe, output: Path, fresh: bool, config: Path | None, given: Collection[str]) -> None:
    """
    Args:
        config, given: what settings were read from, and those that were given beside.
    """
    # Here and not above: transformers takes seconds to import, and --help does not need it.
    try:
        from rich.console import Console

        from kdfast.data.demo import AssetError
        from kdfast.results import measured_rows
        from kdfast.runs import (
            run,
            stages,  # noqa: F401
        )
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    console = Console()
    try:
        if config is not None:
            for line in measured_rows.check_config(recipe, config, given):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        run(recipe, output, console, fresh)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except AssetError as error:
        fail(str(error), 1)
    except OSError as error:
        if failure(error, output) is None:
            raise
        fail(f"{told(error)}; the same command continues where this one was", 1)
    except KeyboardInterrupt:
        fail("stopped; the same command continues where this one was", 130)


def _option(field: dataclasses.Field[Any], kind: Any) -> Any:
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    # Not typer's own: the option's default is None, what was not given.
    told = "" if default is None else f" Default: {default}."
    metavar = "<0,2,4>" if int in typing.get_args(_without_none(kind)) else None
    return typer.Option(help=field.metadata["help"] + told, show_default=False, metavar=metavar)


def _option_type(kind: Any, repeated: bool) -> Any:
    """A field's type on the command line: lists are texts with commas, or options that are repeated, and None is what
    was not given."""
    kind = _without_none(kind)
    if repeated:
        return list[str] | None
    return (str if typing.get_origin(kind) is tuple else kind) | None


def _parsed(name: str, kind: Any, value: Any) -> Any:
    kind = _without_none(kind)
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or typing.get_origin(kind) is not tuple:
        return value
    if int in typing.get_args(kind):
        return layer_numbers(name, value)
    if float in typing.get_args(kind):
        return numbers(name, value)
    return tuple(part.strip() for part in value.split(","))


def _without_none(kind: Any) -> Any:
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next(part for part in parts if part is not types.NoneType)


def _listed(values: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
