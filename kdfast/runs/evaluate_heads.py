"""Models with a head for each token that are there already, on the test rows that a recipe's settings lead to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig

from kdfast.models.loading import language_model, named, pretrained
from kdfast.recipes import question_answering, seq2seq, token_classification
from kdfast.recipes.heads import HeadRecipe
from kdfast.results.measure import Candidate, Metrics, costs
from kdfast.runs.heads import HeadRun
from kdfast.runs.question_answering import QuestionAnsweringRun
from kdfast.runs.token_classification import TokenClassificationRun

RUNS: dict[type[HeadRecipe], type[HeadRun]] = {
    token_classification.Recipe: TokenClassificationRun,
    question_answering.Recipe: QuestionAnsweringRun,
}
CLASSES: dict[str, type[HeadRecipe]] = {
    "ForTokenClassification": token_classification.Recipe,
    "ForQuestionAnswering": question_answering.Recipe,
}


def recipe_of(argument: str, source: str | Path) -> type[HeadRecipe] | None:
    """The recipe of such models, by the class that a model's config names; None of all others.

    Raises:
        ValueError: there is no model, or one that writes a text for another.
    """
    saved_as = pretrained(AutoConfig, argument, source).architectures or []
    for one in saved_as:
        what, recipe = language_model(one) or ("", "")
        if recipe == seq2seq.Recipe.name:
            raise ValueError(
                f"{named(argument, source)}: expected a classifier, regressor, token classifier or model for question "
                f"answering, got {what} ({one}), which only its run measures: kdfast distill {recipe}"
            )
    return next((recipe for name, recipe in CLASSES.items() if any(one.endswith(name) for one in saved_as)), None)


def with_teacher(recipe: HeadRecipe, batch_size: int) -> HeadRun:
    """What `evaluate` takes once it has test rows (`read_test`): the recipe's teacher, without a folder.

    Raises:
        ValueError: as `kdfast.runs.run` where the teacher cannot be used.
    """
    run = RUNS[type(recipe)](recipe, Path(), Console())
    run.rows_of_a_pass = batch_size
    run.read_teacher(quantised=True)
    return run


def evaluate(run: HeadRun, sources: Mapping[str, str | Path], teacher: str | None) -> dict[str, Metrics]:
    """What the table of a run has of its models, and what they cost, as `kdfast.results.measure.evaluate` has it.

    Args:
        sources: folders or Hub names, by what the models are called in the result.
        teacher: which of the names is the run's teacher; None: the one model there is has none.

    Raises:
        ValueError: a model that cannot be loaded, of another task, or with other tokens or classes than the teacher.
    """
    known = teacher or next(iter(sources))
    models = {name: run.teacher if name == known else run.load_beside(name, of) for name, of in sources.items()}
    others = {name: model for name, model in models.items() if name != known}
    found = run.quality({"teacher": run.teacher, **others})
    found[known] = found.pop("teacher")
    if teacher is None:
        del found[known]["kl_to_teacher"]  # to itself
    cost = costs({n: Candidate(n, models[n], of, run.tokenizer, run.test) for n, of in sources.items()})
    return {name: found[name] | cost[name] for name in sources}
