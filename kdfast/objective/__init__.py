"""What a distilled student is trained on: callables that return the weighted terms of its loss.

`Terms` puts an objective together from terms: `Logits`, `Spans`, `Labels`, `Hidden`, `Embedding`, `Cosine`, `CLS`,
`Attention`, `Relations`, `Branches`, `SentenceMSE` and `MarginMSE`, each with a weight that is constant or follows a
schedule.
`DecoupledLogits` weigh the labelled class and the others apart, `TopLogits` leave out what the teacher finds unlikely.
`DynamicLogits` are `Logits` with a weight and a temperature of each row, `Ensemble` those of several teachers,
`Perturbed`, in `Adversarial`, those of inputs that the student is wrong about.
`ULD` and `GOLD` are for language models of two tokenizers.
`Tasks` has an objective for each of several tasks.
`LanguageModel` is for language models.
"""

from kdfast.models.inputs import model_inputs
from kdfast.objective._protocol import Missing, Objective
from kdfast.objective.adversarial import Adversarial, Perturbed
from kdfast.objective.cross_tokenizer import GOLD, ULD
from kdfast.objective.dynamic_logits import DynamicLogits
from kdfast.objective.ensemble import Ensemble
from kdfast.objective.language_model import LanguageModel
from kdfast.objective.layer_maps import layer_map
from kdfast.objective.of_branches import Branches
from kdfast.objective.of_layers import CLS, Attention, Cosine, Embedding, Hidden, Relations
from kdfast.objective.of_logits import Labels, Logits, Spans
from kdfast.objective.of_parts import DecoupledLogits, TopLogits
from kdfast.objective.of_sentences import MarginMSE, SentenceMSE
from kdfast.objective.of_tasks import Tasks
from kdfast.objective.schedules import ExponentialSchedule, LinearSchedule, StageSchedule
from kdfast.objective.term import Term, token_mask
from kdfast.objective.terms import Hinton, Terms

__all__ = [
    "CLS",
    "GOLD",
    "ULD",
    "Adversarial",
    "Attention",
    "Branches",
    "Cosine",
    "DecoupledLogits",
    "DynamicLogits",
    "Embedding",
    "Ensemble",
    "ExponentialSchedule",
    "Hidden",
    "Hinton",
    "Labels",
    "LanguageModel",
    "LinearSchedule",
    "Logits",
    "MarginMSE",
    "Missing",
    "Objective",
    "Perturbed",
    "Relations",
    "SentenceMSE",
    "Spans",
    "StageSchedule",
    "Tasks",
    "Term",
    "Terms",
    "TopLogits",
    "layer_map",
    "model_inputs",
    "token_mask",
]
