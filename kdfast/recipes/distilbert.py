"""DistilBERT (Sanh et al., 2019, arXiv:1910.01108): a masked language model into half of its layers,
on text without labels.

1. The student has half of the teacher's layers, its word and position embeddings and its output, which is tied to the
   words. For a BERT that is a DistilBERT, without token types and pooler; others stay what they are (DistilRoBERTa).
2. Of each batch, 15 % of the tokens are to be predicted, drawn anew every epoch with probability ∝ count^-0.7: rare
   words more often. 80 % of them are masked, 10 % stay, 10 % are any token.
   Teacher and student get the same masked text.
3. The student is trained on

       5 · T² · KL(softmax(z_t/T) ‖ softmax(z_s/T))     tokens that are no padding        (`ce`)
     + 2 · CE(z_s, token)                               tokens to be predicted            (`mlm`)
     + 1 · (1 - cos(h_s, h_t))                          last states, no padding           (`cos`)

   with AdamW (0.9, 0.98, eps 1e-6), no weight decay, 5 % warm-up and linear decay, gradients clipped at 5.
4. Teacher and student, before and after, are measured on held-out rows with fixed masks, for which all tokens are
   alike, as BERT's own are.

Where the paper and its code disagree or leave a choice, the default is the released code's:

- The weights 5, 2, 1 are those of one README command; .33 each of the other; the paper has none, nor T.
- Paper and articles print the first loss as Σ t · log s, which would be maximised. Here it is KL, with the same
  gradient as the cross-entropy -Σ t · log s.
- `restrict_ce_to_mask`: the first loss of the tokens to be predicted alone; the code's default is all tokens.
- `mse_weight`: (z_s - z_t)² summed over the vocabulary, mean over the first loss's tokens;
  off in the code and not in the paper.
- "One layer out of two" is 0, 2, 4, 7, 9, 11 of 12 in the code: evenly apart, the first and the last among them.
- `vocab_transform`: the output's transformation is new unless it is asked for.
- `freeze_positions`: the code trains with sinusoidal positions, which are not updated, and exports the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kdfast.objective import Cosine, Labels, Logits, Terms
from kdfast.recipes import base
from kdfast.recipes.base import setting


@dataclass(frozen=True, kw_only=True)
class Recipe(base.Recipe):
    """A masked language model into half of its layers, on text without labels: DistilBERT (Sanh et al. 2019).

    5 · T² · KL(teacher ‖ student) of all tokens + 2 · CE(student, masked tokens) + 1 · (1 - cos) of the last hidden
    states, with dynamic masking that prefers rare words. The student is to be fine-tuned like any pre-trained model.

    Without a teacher of yours, a small encoder first becomes a masked language model on the same text.
    """

    name = "distilbert"
    quick: ClassVar[dict[str, Any]] = {"teacher_steps": 40, "steps": 40, "train_rows": 8000, "test_rows": 100}
    measured_on = ("data", "max_length", "test_rows", "mask_probability", "mask_smoothing")

    data: str | None = setting(
        None,
        "Text file with empty lines between the texts, at least 10. Default: 117,659 definitions and examples of "
        "WordNet.",
    )
    teacher: str | None = setting(
        None, "Masked language model, a folder or Hub name. Default: MiniLM, 6 layers, 384 wide, trained to be one."
    )
    teacher_steps: int = setting(300, "Updates of that default teacher.")
    student_layers: tuple[int, ...] | None = setting(
        None, "Teacher layers that the student starts from, from 0. Default: half, the first and the last among them."
    )
    vocab_transform: bool = setting(False, "Copy the transformation before BERT's output too, else it is new.")
    freeze_positions: bool = setting(True, "Do not train the position embeddings.")
    dropout: float = setting(0.1, "Of the student.")
    ce_weight: float = setting(5.0, "Weight of KL to the teacher.")
    mlm_weight: float = setting(2.0, "Weight of the masked tokens' cross-entropy.")
    cosine_weight: float = setting(1.0, "Weight of the last hidden states' cosine distance.")
    mse_weight: float = setting(0.0, "Weight of the logits' squared difference.")
    temperature: float = setting(2.0, "Softens teacher and student alike in KL.")
    restrict_ce_to_mask: bool = setting(False, "KL and squared difference of the masked tokens alone.")
    mask_probability: float = setting(0.15, "Share of the tokens to be predicted.")
    mask_smoothing: float = setting(0.7, "Tokens are drawn by count^-smoothing: 0 all alike, more prefers rare words.")
    epochs: int = setting(3, "Passes over the training rows.")
    steps: int | None = setting(
        None, "Updates of the student, instead of passes. Default: 300 on WordNet, else the passes."
    )
    learning_rate: float = setting(5e-4, "Peak of the linear schedule.")
    warmup: float = setting(0.05, "Share of the steps before the peak.")
    weight_decay: float = setting(0.0, "Of AdamW.")
    max_grad_norm: float = setting(5.0, "Longer gradients are cut to this.")
    batch_size: int = setting(16, "Rows per forward pass; 5 per GPU in the original.")
    accumulation: int = setting(1, "Forward passes per update; 50 in the original.")
    max_length: int = setting(64, "Tokens; longer texts are cut into several rows.")
    train_rows: int | None = setting(None, "Use no more, drawn with a fixed seed.")
    test_rows: int = setting(300, "Hold out no more, and no more than a tenth, drawn with a fixed seed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "teacher_steps", "epochs", "steps", "batch_size", "accumulation", "train_rows", "test_rows")
        self.at_least(12, "max_length")  # shorter rows are dropped
        self.at_least(0, "ce_weight", "mlm_weight", "cosine_weight", "mse_weight", "weight_decay", "mask_smoothing")
        self.positive("temperature", "max_grad_norm", "mask_probability")
        self.between(0, 1, "mask_probability", "warmup")
        self.inside(0, 1, "learning_rate")
        self.layer_numbers("student_layers")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 or more and less than 1, got {self.dropout}")
        if not (self.ce_weight or self.mlm_weight or self.cosine_weight or self.mse_weight):
            raise ValueError("ce_weight, mlm_weight, cosine_weight, mse_weight: expected a positive one, got 0 for all")

    def objective(self, vocabulary: int) -> Terms:
        """The objective, with logits of so many tokens."""
        tokens = "labels" if self.restrict_ce_to_mask else "all"
        terms = {
            "ce": Logits(tokens=tokens, temperature=self.temperature, weight=self.ce_weight),
            "mlm": Labels("tokens", weight=self.mlm_weight),
            "cos": Cosine(weight=self.cosine_weight),
            # The operator's mean over the vocabulary is a sum here.
            "mse": Logits("logit_mse", tokens=tokens, weight=self.mse_weight * vocabulary),
        }
        return Terms(**{name: term for name, term in terms.items() if term.weight})
