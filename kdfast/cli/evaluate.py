"""`kdfast evaluate`: models that are there already, on test rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer
import yaml

from kdfast.cli.shared import check_writable, fail, names
from kdfast.recipes import RECIPES, multi_task, multi_teacher, token_classification
from kdfast.recipes.base import Recipe
from kdfast.recipes.classifier import ClassifierRecipe
from kdfast.recipes.dynabert import size_of
from kdfast.recipes.heads import HeadRecipe
from kdfast.recipes.paths import CONFIG, METRICS, moved, run_settings


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Classifier, regressor, token classifier or model for question answering, a folder or Hub name; or a "
            "run's folder."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled rows, as of distill: a task of GLUE, another Hub name, a file or a folder. Default: the "
            "run's that the model lies in, else movie reviews.",
        ),
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(help="Column of the text, or two of pairs; of the words. Default: found by name.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: found by name.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="classification, regression or multi_label. Default: by the labels.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to measure beside it, a folder or Hub name. Default: a run's own.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens; longer rows are cut. Default: the run's, else the recipe's.", min=4)
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(help="Use no more, drawn with a fixed seed. Default: as the run.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward pass.", min=1)] = 64,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measures a model on the test rows of a task: quality, distance to a teacher, size, arithmetic and latency.

    A pruned model is measured beside what it was made of: --teacher.

    Of a run's folder (`kdfast distill hinton` or another of classifiers, `token-classification`, `question-answering`),
    all its models, on the run's data and against its teacher, if it is one. Classes must be the data's, in the same
    order.

    A regressor's quality is its correlation with the labels; KL and agreement are of classes alone. Token classifiers
    have F1 of names and accuracy of words, models for question answering SQuAD's F1 and exact match.
    """
    try:
        from rich.console import Console

        from kdfast.data.demo import AssetError
        from kdfast.data.files import shown_name, why_not_readable
        from kdfast.results import libraries, measure, tables
        from kdfast.runs import stages
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    libraries.quiet()
    options = _Options(data, text_columns, label_column, kind, test_rows, max_length, batch_size)
    try:
        if output is not None and output.is_dir():
            raise ValueError(f"output {output}: expected a JSON file, got a folder")
        if output is not None:
            check_writable(output.parent)
        if reason := why_not_readable(model):
            raise ValueError(f"model {model}: expected a folder that can be read, got {reason}")
        chosen = _chosen(model, teacher)
        measured = _of_heads if issubclass(chosen.kind, HeadRecipe) else _of_classifiers
        results, facts = measured(chosen, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except AssetError as error:
        fail(str(error), 1)
    name = shown_name(facts["data"])
    Console().print(tables.evaluation_table(results, name, facts["rows"], chosen.teacher))
    if output is not None:
        sources = {name: str(of) for name, of in chosen.sources.items()}
        output.parent.mkdir(parents=True, exist_ok=True)
        stages.write_json(
            output, {"task": facts, "versions": measure.versions(), "sources": sources, "models": results}
        )
        typer.echo(f"In {output}")


@dataclass(frozen=True)
class _Options:
    """What was given on the command line."""

    data: str | None
    text_columns: str | None
    label_column: str | None
    kind: str | None
    test_rows: int | None
    max_length: int | None
    batch_size: int


@dataclass(frozen=True)
class _Chosen:
    """The models to measure by their names, which of them is the teacher, and the run that they are of.

    Attributes:
        kind: of recipe, that makes such models.
        own: settings of the run that are read, if no options stand for them.
    """

    sources: dict[str, str | Path]
    teacher: str | None
    kind: type[Recipe]
    recipe: Any
    folder: Path
    own: tuple[str, ...]

    def tell_elsewhere(self, data: str | None) -> None:
        """Of the run's own data and teacher, where they are read."""
        stored = (run_settings(self.folder) if self.recipe else None) or {}
        read = {name: stored.get(name) for name in self.own if data is None or name != "data"}
        for line in moved(read, self.folder):
            typer.echo(line)


Measured = tuple[dict[str, dict[str, float]], dict[str, Any]]  # results, and what they are of


def _of_classifiers(chosen: _Chosen, options: _Options) -> Measured:
    from kdfast.results import measure, measured_rows

    columns = options.text_columns
    given: dict[str, Any] = {
        "text_columns": None if columns is None else names(columns),
        "label_column": options.label_column,
        "kind": options.kind,
        "test_rows": options.test_rows,
    }
    run = chosen.recipe
    if run is not None and options.data is None:
        given = {name: value for name, value in given.items() if value is not None}
        task = measured_rows.load(run)
        measured_rows.check(chosen.folder, task)
        if given:
            task = measured_rows.load(run, **given)
    else:  # other data, other columns
        task = measured_rows.read(options.data, **given)
    length = options.max_length or (64 if run is None else run.max_length)
    chosen.tell_elsewhere(options.data)
    for note in task.notes:
        typer.echo(note)
    results = measure.evaluate(
        chosen.sources,
        task,
        max_length=length,
        teacher=chosen.teacher,
        batch_size=options.batch_size,
        tell=typer.echo,
    )
    facts = {"data": task.name, "kind": task.kind, "metric": task.metric, "rows": len(task.test)}
    return results, facts | {"max_length": length}


def _of_heads(chosen: _Chosen, options: _Options) -> Measured:
    from kdfast.results import measured_rows
    from kdfast.runs import evaluate_heads

    settings: Any = chosen.recipe or chosen.kind()
    known = chosen.sources[chosen.teacher or next(iter(chosen.sources))]
    recipe: HeadRecipe = replace(settings, teacher=str(known))
    given = _given_to_heads(recipe, options)
    chosen.tell_elsewhere(options.data)
    run = evaluate_heads.with_teacher(replace(recipe, **given), options.batch_size)
    if chosen.recipe is not None and options.data is None:
        run.read_test(recipe)
        measured_rows.check_rows(chosen.folder, run.test, recipe.data)
    if chosen.recipe is None or given:
        run.read_test(replace(recipe, **given))
    results = evaluate_heads.evaluate(run, chosen.sources, chosen.teacher)
    facts = {"data": run.recipe.data, "kind": recipe.name, "metric": run.metric, "rows": len(run.test)}
    return results, facts | {"max_length": run.recipe.max_length}


def _given_to_heads(recipe: HeadRecipe, options: _Options) -> dict[str, Any]:
    """Settings of the recipe that are given; of other data the columns of the run's say nothing."""
    columns = {"text_columns": options.text_columns, "label_column": options.label_column}
    of_words = isinstance(recipe, token_classification.Recipe)
    for name, value in {"kind": options.kind, **({} if of_words else columns)}.items():
        if value is not None:
            raise ValueError(f"{name}: expected none for models of {recipe.name}, got {value}")
    given = {name: getattr(options, name) for name in ("data", "test_rows", "max_length")}
    given = {name: value for name, value in given.items() if value is not None}
    if of_words:
        named = {"word_column": options.text_columns, "label_column": options.label_column}
        given |= {name: value for name, value in named.items() if value is not None or options.data is not None}
    return given


def _chosen(model: str, teacher: str | None) -> _Chosen:
    folder = Path(model)
    if (folder / CONFIG).is_file():
        return _of_run(folder, teacher)
    name = folder.resolve().name if folder.is_dir() else model
    name = model if name == "teacher" else name
    sources: dict[str, str | Path] = {name: model}
    if teacher is not None:
        sources["teacher"] = teacher
    run = folder.resolve().parent
    inside_a_run = folder.is_dir() and (run / CONFIG).is_file()
    recipe = _recipe_of(run) if inside_a_run else None
    kind = _kind_of(name, model) if recipe is None else type(recipe)
    return _Chosen(sources, teacher and "teacher", kind, recipe, run, own=("data",))


def _of_run(folder: Path, teacher: str | None) -> _Chosen:
    recipe = _recipe_of(folder)
    if isinstance(recipe, multi_task.Recipe):
        raise ValueError(
            f"model {folder}: expected a run of one task, got one of several; one of its folders is "
            f"{folder / 'task_'}{next(iter(recipe.parts()))}"
        )
    if recipe is None:
        names = ", ".join(recipe.name for recipe in RECIPES if _measured(recipe))
        its = (run_settings(folder) or {}).get("recipe", "another recipe")
        raise ValueError(
            f"model {folder}: expected a run of classifiers ({names}), got one of {its}, whose table the run itself "
            "measures (metrics.json); kdfast compare sets runs side by side"
        )
    if teacher is not None:
        raise ValueError(
            f"teacher: expected none beside the run {folder}, which has its own, got {teacher}; one of its models, "
            f"such as {folder / 'student'}, has none"
        )
    if not (folder / METRICS).is_file():
        raise ValueError(
            f"model {folder}: expected a finished run, got one without metrics.json; the same kdfast distill continues "
            "it"
        )
    titles = json.loads((folder / METRICS).read_text())["task"]["titles"]
    # Other sizes of a DynaBERT are no folders, kdfast export makes them; nor is what a student was before.
    saved = {name: title for name, title in titles.items() if name == "student" or size_of(name) is None}
    sources: dict[str, str | Path] = {title: folder / name for name, title in saved.items() if name != "start"}
    known = titles["teacher"]
    if isinstance(recipe, multi_teacher.Recipe):
        del sources[known]  # all of them together, which is no model
        sources |= {titles[f"teacher_{k}"]: of for k, of in enumerate(recipe.teacher or ())}
        known = None
    elif recipe.teacher is not None:
        sources[known] = recipe.teacher
    return _Chosen(sources, known, type(recipe), recipe, folder, own=("data", "teacher"))


def _measured(recipe: type[Recipe]) -> TypeGuard[type[ClassifierRecipe] | type[HeadRecipe]]:
    return issubclass(recipe, ClassifierRecipe) or (issubclass(recipe, HeadRecipe) and recipe.evaluated)


def _recipe_of(run: Path) -> ClassifierRecipe | HeadRecipe | None:
    """The recipe of a run whose models can be evaluated."""
    settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    for recipe in (*RECIPES, multi_task.OfTask):
        if _measured(recipe) and settings.get("recipe") == recipe.name:
            return recipe(**recipe.read_yaml(run / CONFIG))
    return None


def _kind_of(name: str, model: str) -> type[Recipe]:
    """Of a model that lies in no run."""
    from kdfast.models.early_exit import saved_in
    from kdfast.runs import evaluate_heads

    branches = Path(model).is_dir() and saved_in(model)
    return (None if branches else evaluate_heads.recipe_of(name, model)) or ClassifierRecipe
