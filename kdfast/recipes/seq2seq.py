"""Distillation of an encoder-decoder (T5, BART) on pairs of texts: summaries, translations.

1. The student is made of the teacher's layers that the settings name, by default all of the encoder's and half of the
   decoder's, which run once per token that is written ("shrink and fine-tune", Shleifer & Rush, 2020, arXiv:2010.13002).
2. It is trained on alpha · T² · D(student, teacher) + (1 - alpha) · CE over the targets' tokens (the word level of Kim &
   Rush, 2016, arXiv:1606.07947); with `targets` "teacher" the training rows' targets are what the teacher writes (the
   sequence level there).
3. Teacher and student, before and after, are measured on test rows, whose targets are the data's.

Logits of the whole vocabulary are never there for more than a chunk of tokens (`kdfast.linear_kd_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdfast.objective import LanguageModel
from kdfast.recipes.base import setting
from kdfast.recipes.heads import HeadRecipe
from kdfast.recipes.tokens import TokenRecipe


@dataclass(frozen=True, kw_only=True)
class Recipe(TokenRecipe, HeadRecipe):
    """An encoder-decoder (T5, BART) into some of its layers, or a smaller one, on summaries or translations.

    Rows have a source and a target. Soft targets of the teacher for each of the target's tokens, beside the tokens
    themselves; the targets may also be what the teacher writes (sequence-level distillation, Kim & Rush 2016).
    """

    name = "seq2seq"
    evaluated = False

    data: str | None = setting(
        None, "Required. Pairs of texts: a JSON, CSV or Parquet file, a folder (train*, test*), or a Hub name."
    )
    teacher: str | None = setting(None, "Required. Encoder-decoder for these pairs, a folder or Hub name.")
    student_layers: tuple[int, ...] | None = setting(
        None,
        "Without student: layers of the teacher's encoder that the student keeps, from 0 (of its decoder: "
        "--decoder-layers). Default: all.",
    )
    decoder_layers: tuple[int, ...] | None = setting(
        None,
        "Without student: layers of the teacher's decoder that the student keeps, from 0. Default: half, the first and "
        "the last among them.",
    )
    alpha: float = setting(
        0.9, "Weight of the teacher; the targets get 1 - alpha. --targets teacher --alpha 0: the sequence level alone."
    )
    baseline: bool = setting(False, "Train the same student on the data's targets alone as well.")
    source_column: str | None = setting(
        None, "Column of the sources, or a language of a column translation. Default: found by name."
    )
    target_column: str | None = setting(
        None, "Column of the targets, or a language of a column translation. Default: found by name."
    )
    prefix: str | None = setting(None, 'What comes before every source, as "summarize: " for T5. Default: nothing.')
    targets: str = setting("data", "Of the training rows: data, or teacher, what the teacher writes of the sources.")
    beams: int = setting(5, "Of the beam search by which the teacher writes targets.")
    batch_size: int = setting(8, "Rows per step.")
    max_length: int = setting(512, "Tokens of a source; longer ones are cut.")
    max_target_length: int = setting(128, "Tokens of a target; longer ones are cut.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "beams")
        self.at_least(2, "max_target_length")
        self.one_of(("data", "teacher"), "targets")
        self.layer_numbers("decoder_layers")
        self.none_beside("student", "decoder_layers")

    def labels_only(self, vocabulary: int | None = None) -> LanguageModel:
        return replace(self.objective(vocabulary), alpha=0.0)
