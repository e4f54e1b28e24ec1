"""Published distillation systems, each a short file of settings and stages. How they are run is another room:
kdfast/runs. May import: objective, models, data, ops."""

from kdfast.recipes import (
    adversarial,
    causal_lm,
    distilbert,
    dynabert,
    dynamic,
    fastbert,
    hinton,
    minilm,
    multi_task,
    multi_teacher,
    patient_kd,
    prune,
    question_answering,
    self_distillation,
    seq2seq,
    tinybert,
    token_classification,
)
from kdfast.recipes.base import Recipe

RECIPES: tuple[type[Recipe], ...] = (
    hinton.Recipe,
    patient_kd.Recipe,
    minilm.Recipe,
    tinybert.Recipe,
    dynabert.Recipe,
    fastbert.Recipe,
    dynamic.Recipe,
    multi_teacher.Recipe,
    adversarial.Recipe,
    self_distillation.Recipe,
    multi_task.Recipe,
    prune.Recipe,
    distilbert.Recipe,
    causal_lm.Recipe,
    seq2seq.Recipe,
    token_classification.Recipe,
    question_answering.Recipe,
)
