"""Published distillation systems, each a short file of settings and stages. How they are run is another room:
kdfast/runs. May import: objective, models, data, ops."""

from kdfast.recipes import causal_lm, distilbert, fastbert, hinton, minilm, patient_kd, tinybert
from kdfast.recipes.base import Recipe

RECIPES: tuple[type[Recipe], ...] = (
    hinton.Recipe,
    patient_kd.Recipe,
    minilm.Recipe,
    tinybert.Recipe,
    fastbert.Recipe,
    distilbert.Recipe,
    causal_lm.Recipe,
)
