"""`kdfast evaluate` and `kdfast compare`: models and runs that are there already,
measured and set beside one another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from kdfast.cli.shared import fail
from kdfast.recipes import RECIPES, multi_task, multi_teacher
from kdfast.recipes.classifier import ClassifierRecipe
from kdfast.recipes.dynabert import size_of
from kdfast.recipes.paths import CONFIG, moved, run_settings
from kdfast.results import compare as comparing
from kdfast.results.disk import saving


def evaluate(
    model: Annotated[str, typer.Argument(help="Classifier or regressor, a folder or Hub name; or a run's folder.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled text, as of distill: a task of GLUE, another Hub name, a file or a folder. Default: the "
            "run's that the model lies in, else movie reviews.",
        ),
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(help="Column of the text, or two of pairs. Default: found by name.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: found by name.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="classification, regression or multi_label. Default: by the labels.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Classifier to measure beside it, a folder or Hub name. Default: a run's own.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens; longer rows are cut. Default: the run's, else 64.", min=4)
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(help="Use no more, drawn with a fixed seed. Default: as the run.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward pass.", min=1)] = 64,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measures a classifier on the test rows of a task: quality, distance to a teacher, size, arithmetic and latency.

    A pruned model is measured beside what it was made of: --teacher.

    Of a run's folder (`kdfast distill hinton` or another of classifiers), all its models, on the run's data and against
    its teacher, if it is one. Classes must be the data's, in the same order.

    A regressor's quality is its correlation with the labels; KL and agreement are of classes alone.
    """
    try:
        import datasets
        import transformers
        from rich.console import Console

        from kdfast.data.demo import AssetError
        from kdfast.data.files import shown_name
        from kdfast.results import measure, measured_rows, tables
        from kdfast.runs import stages
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        if output is not None and output.is_dir():
            raise ValueError(f"output {output}: expected a JSON file, got a folder")
        chosen = _chosen(model, teacher)
        given: dict[str, Any] = {
            "text_columns": None if text_columns is None else [name.strip() for name in text_columns.split(",")],
            "label_column": label_column,
            "kind": kind,
            "test_rows": test_rows,
        }
        run = chosen.recipe
        if run is not None and data is None:
            given = {name: value for name, value in given.items() if value is not None}
            task = measured_rows.load(run)
            measured_rows.check(chosen.folder, task)
            if given:
                task = measured_rows.load(run, **given)
        else:  # other data, other columns
            task = measured_rows.read(data, **given)
        length = max_length or (64 if run is None else run.max_length)
        console = Console()
        for note in (*chosen.elsewhere(data), *task.notes):
            typer.echo(note)
        results = measure.evaluate(
            chosen.sources,
            task,
            max_length=length,
            teacher=chosen.teacher,
            batch_size=batch_size,
            tell=typer.echo,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except AssetError as error:
        fail(str(error), 1)
    rows = len(task.test)
    console.print(tables.evaluation_table(results, shown_name(task.name), rows, chosen.teacher))
    if output is not None:
        facts = {"data": task.name, "kind": task.kind, "metric": task.metric, "rows": rows, "max_length": length}
        sources = {name: str(of) for name, of in chosen.sources.items()}
        output.parent.mkdir(parents=True, exist_ok=True)
        stages.write_json(
            output, {"task": facts, "versions": measure.versions(), "sources": sources, "models": results}
        )
        typer.echo(f"In {output}")


@dataclass(frozen=True)
class _Chosen:
    """The models to measure by their names, which of them is the teacher, and the run that they are of.

    Attributes:
        own: settings of the run that are read, if no options stand for them.
    """

    sources: dict[str, str | Path]
    teacher: str | None
    recipe: ClassifierRecipe | None
    folder: Path
    own: tuple[str, ...]

    def elsewhere(self, data: str | None) -> list[str]:
        """What to tell of the run's own data and teacher, where they are read."""
        stored = (run_settings(self.folder) if self.recipe else None) or {}
        read = {name: stored.get(name) for name in self.own if data is None or name != "data"}
        return moved(read, self.folder)


def _chosen(model: str, teacher: str | None) -> _Chosen:
    folder = Path(model)
    if not (folder / CONFIG).is_file():
        name = folder.resolve().name if folder.is_dir() else model
        sources: dict[str, str | Path] = {model if name == "teacher" else name: model}
        if teacher is not None:
            sources["teacher"] = teacher
        inside_a_run = folder.is_dir() and (folder.resolve().parent / CONFIG).is_file()
        run = folder.resolve().parent
        recipe = _recipe_of(run) if inside_a_run else None
        return _Chosen(sources, teacher and "teacher", recipe, run, own=("data",))
    recipe = _recipe_of(folder)
    if isinstance(recipe, multi_task.Recipe):
        raise ValueError(
            f"model {model}: expected a run of one task, got one of several; one of its folders is "
            f"{folder / 'task_'}{next(iter(recipe.parts()))}"
        )
    if recipe is None:
        raise ValueError(
            f"model {model}: expected a run of classifiers ({_classifier_recipes()}), got one of another recipe"
        )
    if teacher is not None:
        raise ValueError(
            f"teacher: expected none beside the run {model}, which has its own, got {teacher}; one of its models, "
            f"such as {folder / 'student'}, has none"
        )
    if not (folder / "metrics.json").is_file():
        raise ValueError(
            f"model {model}: expected a finished run, got one without metrics.json; the same kdfast distill continues "
            "it"
        )
    titles = json.loads((folder / "metrics.json").read_text())["task"]["titles"]
    # Other sizes of a DynaBERT are no folders: kdfast export makes them.
    sources = {title: folder / name for name, title in titles.items() if name == "student" or size_of(name) is None}
    if isinstance(recipe, multi_teacher.Recipe):
        del sources[titles["teacher"]]  # all of them together, which is no model
        sources |= {titles[f"teacher_{k}"]: of for k, of in enumerate(recipe.teacher or ())}
        return _Chosen(sources, None, recipe, folder, own=("data", "teacher"))
    if recipe.teacher is not None:
        sources[titles["teacher"]] = recipe.teacher
    return _Chosen(sources, titles["teacher"], recipe, folder, own=("data", "teacher"))


def _recipe_of(run: Path) -> ClassifierRecipe | None:
    """The recipe of a run, if it is one of classifiers."""
    settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    for recipe in (*RECIPES, multi_task.OfTask):
        if issubclass(recipe, ClassifierRecipe) and settings.get("recipe") == recipe.name:
            return recipe(**recipe.read_yaml(run / CONFIG))
    return None


def _classifier_recipes() -> str:
    return ", ".join(recipe.name for recipe in RECIPES if issubclass(recipe, ClassifierRecipe))


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
        if output is not None and output.exists() and not output.is_dir():
            raise ValueError(f"output {output}: expected a folder, got a file")
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
    torch.compile, and beside what memory and arithmetic bound.
    """
    try:
        from kdfast.results import page
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    try:
        if output.is_dir():
            raise ValueError(f"output {output}: expected an HTML file, got a folder")
        benchmark = next((path for path in runs if path.is_file()), None)
        text = page.page(comparing.compare(runs, metric)) if benchmark is None else _of_benchmark(benchmark, len(runs))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with saving(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    typer.echo(f"In {output}")


def _of_benchmark(path: Path, files: int) -> str:
    from kdfast.bench import harness, plots
    from kdfast.results import page

    expected = "one file of kdfast bench, such as operators-….json, or folders of runs"
    if files > 1:
        raise ValueError(f"runs {path}: expected {expected}, got {files} of them")
    try:
        results, facts = harness.load(path)
        table = harness.table(results)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        got = "another file, or one of --peers, whose table is beside it"
        raise ValueError(f"runs {path}: expected {expected}, got {got}") from None
    return page.render(
        title=f"kdfast bench: {facts['device']}",
        first=harness.HEADER[0],
        headings=harness.HEADER[1:],
        rows=[(name, cells) for name, *cells in table],
        legend="ms, × eager and × comp. (torch.compile): what a user waits for. Rate and % of the roof: the kernel alone. "
        "MB: peak memory beyond the inputs.",
        drawings=[
            (heading, page.svg(lambda to, draw=draw: draw(results, facts, to)))  # type: ignore[misc]
            for heading, draw in (("Speed", plots.plot), ("Roofline", plots.plot_roofline))
        ],
        narrow=True,
        runs=[("environment", facts, f"torch {facts['torch']}, {facts['date']}")],
    )
