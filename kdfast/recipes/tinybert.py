"""TinyBERT (Jiao et al., 2020, arXiv:1909.10351): all layers of the teacher, in three stages.

1. General: on text without labels, a student of the pre-trained encoder learns its embeddings, attention and hidden
   states:

       loss = Σ_m mean (A_s^m − A_t^g(m))² + Σ_m mean (W H_s^m + b − H_t^g(m))²

   A = QKᵀ/√d are the scores before softmax, of layers 1 to M; H the states of layers 0, the embeddings, to M;
   g(m) = m · N/M. W goes from the student's width to the teacher's.
2. Intermediate: the same, on the task's rows and many variants of them (`kdfast.data.augment`), of the fine-tuned
   teacher.
3. Prediction, on these rows too: −1/C Σ softmax(z_t/T) · log softmax(z_s/T). Labels are not used.

The student may be narrower, with as many heads: `student_config` hidden_size=312,intermediate_size=1200 with
`student_layers` of 4 is TinyBERT-4. Scores are never kept (`kdfast.qk_attention_mse`), so both models keep their fused
attention.

Where the paper and its code disagree or leave a choice, the default is the code's:

- `projection`: one W with bias for all states, also of equal widths; the paper has W_e of the embeddings and W_h of all
  others, without bias. It is new in the general stage and goes on in the next one.
- `per_class`, `t_squared`: the code's mean of the prediction's loss is over classes too, and without T².
- `regression`: numbers are learnt from the labels, the teacher is not used.
- `augment`: the code has 10 to 30 variants by task, the paper 20. `augment_prediction`: the paper's prediction stage of
  STS-B is on the original rows. `restore_pairs`: the code's second sentences come beside the last variant of the first,
  which is a flaw: not the default.
- `padding`: the code counts padding, and pads every row to the same length; it has scores of −100 or less count as 0,
  which are those of padding (its mask adds −10,000). Here padding is left out by default.
- `layers`: the paper also tried the teacher's last layers ("top") and its first ("bottom").
- Epochs of the intermediate stage: 10 in the code's README, 20 in the paper (50 for CoLA, 10 for large tasks).
- `Recipe.for_glue` has the code's variants and the paper's epochs and lengths by task.
- The code leaves the teacher's dropout on, puts a ReLU before both classifiers, keeps the best of many evaluations of
  the test rows, and drops the last batch of an epoch where it is smaller: not done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from kdfast.objective import Attention, Embedding, Hidden, Labels, Logits, Term, Terms, layer_map
from kdfast.recipes.augmented import AugmentedRecipe
from kdfast.recipes.base import setting
from kdfast.recipes.classifier import ClassifierRecipe, Stage, Texts

DEMONSTRATION, ELSEWHERE = 3, 10  # intermediate epochs on the movie reviews, where nothing else is said, and on others
# Variants are the code's, epochs and lengths the paper's.
GLUE: dict[str, dict[str, Any]] = {
    "cola": {"augment": 30, "intermediate_epochs": 50, "max_length": 64},
    "sst2": {"augment": 20, "intermediate_epochs": 20, "max_length": 64},
    "mrpc": {"augment": 30, "intermediate_epochs": 20, "max_length": 128},
    "stsb": {"augment": 30, "intermediate_epochs": 20, "max_length": 128},
    "rte": {"augment": 30, "intermediate_epochs": 20, "max_length": 128},
    "mnli": {"augment": 10, "intermediate_epochs": 10, "max_length": 128},
    "qqp": {"augment": 10, "intermediate_epochs": 10, "max_length": 128},
    "qnli": {"augment": 20, "intermediate_epochs": 10, "max_length": 128},
}


@dataclass(frozen=True, kw_only=True)
class Recipe(AugmentedRecipe):
    """All layers of the teacher, on text, then on variants of the rows: TinyBERT (Jiao et al. 2020).

    Squared differences of attention scores, embeddings and hidden states, from the pre-trained teacher on text without
    labels, then from the fine-tuned one on the rows and variants of them, in which words are exchanged; then
    cross-entropy with its softened logits. The student may be narrower than the teacher.
    """

    name = "tinybert"
    demonstration_variants = 2
    # Of so few rows, a teacher learns little at the rate of the prediction, which is its own too.
    quick: ClassVar[dict[str, Any]] = {
        **ClassifierRecipe.quick,
        "general_epochs": 1,
        "intermediate_epochs": 1,
        "augment": 1,
        "learning_rate": 1e-4,
    }

    general_text: str | None = setting(
        None, "Text file with empty lines between the texts, for the general stage. Default: the training rows."
    )
    general_epochs: int = setting(3, "Passes over that text; 0: none, as where the student is a general TinyBERT.")
    general_rate: float = setting(5e-5, "Peak of the linear schedule there.")
    intermediate_epochs: int | None = setting(
        None, "Passes over the rows, before the prediction. Default: 10, on the movie reviews 3."
    )
    intermediate_rate: float = setting(5e-5, "Constant, without warm-up.")
    layers: str = setting("uniform", "Teacher's layers: uniform, every (N/M)-th; top, its last ones; or bottom.")
    projection: str = setting(
        "shared",
        "shared by all states, with a bias; per_layer: one each; paper: one of the embeddings, one of the rest.",
    )
    attention_weight: float = setting(1.0, "Weight of the scores; 0 where the numbers of heads differ.")
    hidden_weight: float = setting(1.0, "Weight of embeddings and hidden states.")
    padding: bool = setting(False, "Count padding, as the code does.")
    temperature: float = setting(1.0, "Softens teacher and student alike in the prediction.")
    per_class: bool = setting(True, "Divide the prediction's loss by the number of classes too.")
    t_squared: bool = setting(False, "Multiply the prediction's loss by the temperature's square.")
    regression: str = setting("labels", "What numbers are learnt from: labels, or teacher.")
    augment_prediction: bool = setting(True, "The prediction stage has the variants too.")
    student_start: str = setting("base", "Whose layers students start from: the fine-tuned teacher's, or the base's.")
    freeze_embeddings: bool = setting(False, "Do not train embeddings.")
    learning_rate: float = setting(3e-5, "Peak of the linear schedule, in the prediction.")
    warmup: float = setting(0.1, "Share of the steps before the peak.")

    def __post_init__(self) -> None:
        self.at_least(0, "general_epochs", "attention_weight", "hidden_weight")
        self.at_least(1, "intermediate_epochs")
        self.inside(0, 1, "general_rate", "intermediate_rate")
        self.positive("temperature")
        self.one_of(("uniform", "top", "bottom"), "layers")
        self.one_of(("shared", "per_layer", "paper"), "projection")
        self.one_of(("labels", "teacher"), "regression")
        if not (self.attention_weight or self.hidden_weight):
            raise ValueError("attention_weight, hidden_weight: expected one above 0, got 0 and 0")
        if self.general_epochs and self.teacher is not None and self.base is None:
            raise ValueError(
                f"general_epochs: expected 0 beside teacher without base, the pre-trained encoder, got {self.general_epochs}"
            )
        super().__post_init__()

    @classmethod
    def for_glue(cls, task: str, **settings: Any) -> Recipe:
        """With what was used for a task of GLUE.

        Raises:
            KeyError: no such task.
        """
        return cls(data=task, **(GLUE[task] | settings))

    def stages(self, student_layers: int, teacher_layers: int, kind: str) -> list[Stage]:
        variants = self.augmentation()
        general = Stage(
            "general",
            "student, general",
            self._of_layers(student_layers, teacher_layers),
            teacher="base",
            rows=None if self.general_text is None else Texts(self.general_text),
            epochs=self.general_epochs,
            learning_rate=self.general_rate,
            measured=False,
        )
        intermediate = Stage(
            "intermediate",
            "student, intermediate",
            self._of_layers(student_layers, teacher_layers),
            teacher="live",
            start="general" if self.general_epochs else "student",
            rows=variants,
            epochs=self.intermediate_epochs or (DEMONSTRATION if self.data is None else ELSEWHERE),
            learning_rate=self.intermediate_rate,
            schedule="constant",
            measured=False,
        )
        prediction = Stage(
            "student",
            "student, TinyBERT",
            Terms(prediction=self._prediction(kind)),
            teacher="stored",
            start="intermediate",
            rows=variants if self.augment_prediction else None,
        )
        return [general] * bool(self.general_epochs) + [intermediate, prediction]

    def _of_layers(self, m: int, n: int) -> Terms:
        """What the general and the intermediate stage are trained on."""
        if self.layers == "uniform":
            pairs = layer_map("uniform", m, n, self.name)
        else:
            shift = n - m if self.layers == "top" else 0
            pairs = layer_map({j: j + shift for j in range(1, m + 1)}, m, n, self.name)
        options: dict[str, Any] = {"weight": self.hidden_weight, "masked": not self.padding}
        terms: dict[str, Term] = {"attention": Attention(pairs, weight=self.attention_weight, masked=not self.padding)}
        if self.projection == "paper":
            one = partial(_linear, bias=False)
            terms |= {
                "embedding": Embedding(projection=one, **options),
                "hidden": Hidden(pairs, projection=one, **options),
            }
        else:
            make: Callable[[int, int], Any] = _linear if self.projection == "shared" else partial(_linears, count=m + 1)
            terms["hidden"] = Hidden({0: 0, **pairs}, projection=make, **options)
        return Terms(**{name: term for name, term in terms.items() if term.weight})

    def _prediction(self, kind: str) -> Term:
        if kind == "regression" and self.regression == "labels":
            return Labels(kind)
        if kind != "classification":
            return Logits("logit_mse", temperature=self.temperature, t_squared=self.t_squared)
        return Logits(
            "soft_cross_entropy",
            temperature=self.temperature,
            t_squared=self.t_squared,
            per_class=self.per_class,
        )


def _linear(width: int, teacher_width: int, bias: bool = True) -> nn.Linear:
    """Initialised as the layers of a BERT are."""
    linear = nn.Linear(width, teacher_width, bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _linears(width: int, teacher_width: int, count: int) -> list[nn.Linear]:
    return [_linear(width, teacher_width) for _ in range(count)]
