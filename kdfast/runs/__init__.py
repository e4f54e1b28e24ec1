"""How a recipe is run in its folder, stopped and resumed. May import: recipes, results, train and what those may."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kdfast import recipes
from kdfast.recipes.base import Recipe
from kdfast.recipes.classifier import ClassifierRecipe


def run(recipe: Recipe, folder: Path, console: Any, fresh: bool = False) -> dict[str, Any]:
    """Does what is not done yet in a run's folder; returns the metrics of its models.

    Args:
        recipe: one of kdfast's, or of your own: a `ClassifierRecipe` with stages, say.
        folder: where everything is kept.
        console: of `rich`; receives the table.
        fresh: remove an earlier run in that folder, once this one has begun, instead of continuing it.

    Raises:
        TypeError: a recipe of a kind that nothing here runs.
        ValueError: the folder holds a run with other settings, or something that is not a run; data or models cannot be
            used.
        kdfast.data.demo.AssetError: model or data cannot be fetched.
        kdfast.runs.stages.StageInterrupted: stopped by a signal, with the state saved.
    """
    # Imported late: each of these imports transformers, which takes seconds.
    from kdfast.runs import stages

    kind: Any
    if isinstance(recipe, recipes.fastbert.Recipe):
        from kdfast.runs.fastbert import FastBERTRun as kind
    elif isinstance(recipe, recipes.dynabert.Recipe):
        from kdfast.runs.dynabert import DynaBERTRun as kind
    elif isinstance(recipe, recipes.prune.Recipe):
        from kdfast.runs.prune import PruneRun as kind
    elif isinstance(recipe, recipes.multi_teacher.Recipe):
        from kdfast.runs.multi_teacher import MultiTeacherRun as kind
    elif isinstance(recipe, recipes.multi_task.Recipe):
        from kdfast.runs.multi_task import MultiTaskRun as kind
    elif isinstance(recipe, recipes.self_distillation.Recipe):
        from kdfast.runs.self_distillation import SelfDistillationRun as kind
    elif isinstance(recipe, ClassifierRecipe):
        from kdfast.runs.classifier import ClassifierRun as kind
    elif isinstance(recipe, recipes.distilbert.Recipe):
        from kdfast.runs.distilbert import DistilBERTRun as kind
    elif isinstance(recipe, recipes.causal_lm.Recipe):
        from kdfast.runs.causal_lm import CausalLMRun as kind
    elif isinstance(recipe, recipes.seq2seq.Recipe):
        from kdfast.runs.seq2seq import Seq2SeqRun as kind
    elif isinstance(recipe, recipes.token_classification.Recipe):
        from kdfast.runs.token_classification import TokenClassificationRun as kind
    elif isinstance(recipe, recipes.question_answering.Recipe):
        from kdfast.runs.question_answering import QuestionAnsweringRun as kind
    else:
        expected = "a ClassifierRecipe, or a recipe of another kind"
        raise TypeError(f"kdfast.runs.run: recipe: expected {expected}, got {type(recipe).__name__}")
    with stages.anew(folder, recipe.as_dict()) if fresh else nullcontext():
        metrics: dict[str, Any] = kind(recipe, folder, console).execute()
    return metrics
