"""What a distilled student is trained on: callables that return the weighted terms of its loss.

`Terms` puts an objective together from terms: `Logits`, `Spans`, `Labels`, `Hidden`, `Embedding`, `Cosine`, `CLS`,
`Attention`, `Relations` and `Branches`, each with a weight that is constant or follows a schedule.
`LanguageModel` is for language models.
"""

from kdfast.models.inputs import model_inputs
from kdfast.objective._protocol import Missing, Objective
from kdfast.objective.language_model import LanguageModel
from kdfast.objective.layer_maps import layer_map
from kdfast.objective.of_branches import Branches
from kdfast.objective.of_layers import CLS, Attention, Cosine, Embedding, Hidden, Relations
from kdfast.objective.of_logits import Labels, Logits, Spans
from kdfast.objective.schedules import ExponentialSchedule, LinearSchedule, StageSchedule
from kdfast.objective.term import Term, token_mask
from kdfast.objective.terms import Hinton, Terms

__all__ = [
    "CLS",
    "Attention",
    "Branches",
    "Cosine",
    "Embedding",
    "ExponentialSchedule",
    "Hidden",
    "Hinton",
    "Labels",
    "LanguageModel",
    "LinearSchedule",
    "Logits",
    "Missing",
    "Objective",
    "Relations",
    "Spans",
    "StageSchedule",
    "Term",
    "Terms",
    "layer_map",
    "model_inputs",
    "token_mask",
]
