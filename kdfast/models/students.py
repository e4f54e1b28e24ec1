"""Students made of their teachers: some of the layers, a narrower model, or DistilBERT of BERT.

    student = students.from_layers(teacher, students.spread(12, 6))                       # Patient-KD, causal models
    student = students.from_layers(teacher, range(12), decoder_layers=[0, 6, 11])         # encoder-decoders
    student, copied, fresh = students.narrower(teacher, hidden_size=312, intermediate_size=1200, num_hidden_layers=4)
    student = students.distilbert(teacher)                                                # Sanh et al., 2019

Every student is a new model: all its parameters are trained, whatever is frozen in the teacher, on the teacher's
device; in evaluation mode, as after `from_pretrained`. No hook or `kdfast.hf.Reader` of the teacher comes along. Its
weights are float32, whatever the teacher's are (`dtype`): of small steps, weights of 16 bits lose most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.initialization import no_init_weights

from kdfast.models.student_parts import (
    SIDES,
    check_model,
    check_names,
    config_name,
    config_of,
    copy_weights,
    follow,
    has_decoder,
    layers_path,
    new_model,
    renamed,
    set_dropout,
)

__all__ = ["Narrowed", "distilbert", "from_layers", "narrower", "spread"]

Dtype = torch.dtype | None


def spread(teacher_layers: int, student_layers: int) -> list[int]:
    """`student_layers` of the numbers 0 to `teacher_layers` - 1, the first and the last among them and evenly apart:
    round(i · (N - 1) / (M - 1)), halves to the even number. 12 to 6: 0, 2, 4, 7, 9, 11, as in DistilBERT's code.

    Raises:
        ValueError: student_layers is not between 1 and teacher_layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"kdfast.students.spread: student_layers: expected 1 to {teacher_layers}, the teacher's, got "
            f"{student_layers}"
        )
    return [round(i * (teacher_layers - 1) / max(1, student_layers - 1)) for i in range(student_layers)]


def from_layers(
    teacher: Any,
    layers: Sequence[int],
    *,
    decoder_layers: Sequence[int] | None = None,
    dropout: float | None = None,
    dtype: Dtype = torch.float32,
) -> Any:
    """A new model of the teacher's class with copies of the given layers and of all that is no layer: embeddings,
    pooler, head. Tied weights stay tied.

    Of an encoder-decoder (T5, BART) these are some of both sides' layers: with all of the encoder's and a few of the
    decoder's this is the student of "shrink and fine-tune" (Shleifer & Rush, 2020, arXiv:2010.13002). What T5's first
    layer has for all of them, the biases of distances, stays with the first.

    ModernBERT has no attn_norm in its first layer: a layer that becomes the first loses its own, and the teacher's
    first gets a new one (weight 1) in any other place. Which layers attend locally comes along. ALBERT's layers share
    their weights: only their number counts.

    Args:
        teacher: of transformers, with one list of layers, or one of the encoder and one of the decoder.
        layers: numbers from 0, in the student's order; one may be there more than once, in copies of its own. Of an
            encoder-decoder: of the encoder's.
        decoder_layers: of the decoder's; None: those of the same numbers.
        dropout: every probability of dropout; None: as the teacher's. With 0 the student matches the same function, as
            the teacher's targets are made without; on the CPU, random numbers take a fifth of a step.
        dtype: of the student's floating-point weights; None: as in the teacher, one by one.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: no layers, or numbers that the teacher does not have; layers of a decoder that it does not have; a
            dropout outside [0, 1); a teacher whose parameters are not those that its class makes of its config.
    """
    op = "kdfast.students.from_layers"
    check_model(op, teacher)
    chosen: dict[str, Sequence[int]] = {"": layers}
    if has_decoder(teacher):
        chosen = dict(zip(SIDES, (layers, layers if decoder_layers is None else decoder_layers), strict=True))
    elif decoder_layers is not None:
        got = f"{list(decoder_layers)} beside {type(teacher).__name__}"
        raise ValueError(f"{op}: decoder_layers: expected none but of an encoder-decoder, got {got}")
    paths = {side: layers_path(op, teacher, side=side) for side in chosen}
    config = config_of(op, teacher, chosen, dropout)
    with no_init_weights():  # all of it is copied
        student = new_model(teacher, type(teacher), config)
    for side, path in paths.items():
        if path is not None and len(student.get_submodule(path.removesuffix("."))) != len(chosen[side]):
            raise ValueError(
                f"{op}: teacher: expected a config whose numbers of layers make its layers, got {type(config).__name__}"
            )
    _copy_all(op, teacher, student, renamed(paths, chosen, teacher.state_dict()), paths, dtype)
    return student


def _copy_all(
    op: str,
    teacher: Any,
    student: Any,
    name_of: Callable[[str], str],
    paths: Mapping[str, str | None],
    dtype: Dtype,
) -> None:
    """What a layer lacks in its new place may be new, if it is a norm; all else is the teacher's."""
    in_layers = tuple(path for path in paths.values() if path is not None)
    _, fresh = copy_weights(teacher, student, name_of, dtype)
    theirs, ours = teacher.state_dict(), student.state_dict()
    new = [
        name
        for name in fresh
        if name_of(name) not in theirs
        and name.startswith(in_layers)
        and isinstance(student.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
    ]
    for name in new:
        student.get_submodule(name.rpartition(".")[0]).reset_parameters()
    unlike = [name for name in fresh if name not in new]
    unlike += [name for name in theirs if name not in ours and not name.startswith(in_layers)]
    if unlike:
        raise ValueError(
            f"{op}: teacher: expected the parameters that {type(teacher).__name__} makes of its config, got others for "
            f"{', '.join(unlike)}"
        )


class Narrowed(NamedTuple):
    """model: the student. copied: names of its parameters that are the teacher's, of a vocabulary at least the common
    rows. fresh: of those that are initialised."""

    model: Any
    copied: list[str]
    fresh: list[str]


def narrower(
    teacher: Any,
    *,
    layers: Sequence[int] | None = None,
    dropout: float | None = None,
    dtype: Dtype = torch.float32,
    **config_changes: Any,
) -> Narrowed:
    """A new model of the teacher's class with a changed config. Parameters of the same shape are copied, the others
    initialised as the class does; a vocabulary of another length keeps the rows that both have.

    `head_dim` follows hidden_size and num_attention_heads where it is their quotient in the teacher, and
    `num_key_value_heads` follows num_attention_heads where they are the same in it.

    Args:
        teacher: of transformers, with one list of layers.
        layers: which of the teacher's the student's are copied from; None: `spread` over them.
        dropout, dtype: as in `from_layers`.
        config_changes: of the teacher's config, e.g. hidden_size=312, intermediate_size=1200, num_hidden_layers=4.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: names that its config does not have, values that do not fit each other or the class; layers as in
            `from_layers`.
    """
    op = "kdfast.students.narrower"
    path = layers_path(op, teacher)
    check_names(op, teacher.config, config_changes)
    count_name = config_name(teacher.config, "num_hidden_layers")
    changes = {config_name(teacher.config, name): value for name, value in config_changes.items()}
    count = changes.pop(count_name, teacher.config.num_hidden_layers if layers is None else len(layers))
    if layers is None:
        layers = spread(teacher.config.num_hidden_layers, count)
    elif len(layers) != count:
        raise ValueError(f"{op}: layers: expected {count}, num_hidden_layers, got {list(layers)}")
    config = config_of(op, teacher, {"": layers}, dropout)
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        follow(op, teacher.config, config, changes)
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(f"{op}: config_changes: expected values that its config takes, got {error}") from None
    student = new_model(teacher, type(teacher), config)
    name_of = renamed({"": path}, {"": layers}, teacher.state_dict())
    return Narrowed(student, *copy_weights(teacher, student, name_of, dtype))


# ---- DistilBERT ----
# class of the teacher: that of the student, and the student's parts beyond the base model by name, each with the
# teacher's
_HEADS: dict[str, tuple[str, dict[str, str]]] = {
    "BertModel": ("DistilBertModel", {}),
    "BertForMaskedLM": ("DistilBertForMaskedLM", {"vocab_projector": "cls.predictions.decoder"}),
    "BertForPreTraining": ("DistilBertForMaskedLM", {"vocab_projector": "cls.predictions.decoder"}),
    "BertForSequenceClassification": ("DistilBertForSequenceClassification", {}),
    "BertForTokenClassification": ("DistilBertForTokenClassification", {"classifier": "classifier"}),
    "BertForQuestionAnswering": ("DistilBertForQuestionAnswering", {"qa_outputs": "qa_outputs"}),
}
_TRANSFORM = {
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
}
_IN_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def distilbert(
    teacher: Any,
    layers: Sequence[int] | None = None,
    *,
    vocab_transform: bool = False,
    freeze_positions: bool = True,
    dropout: float | None = None,
    dtype: Dtype = torch.float32,
) -> Any:
    """The student of DistilBERT (Sanh et al., 2019, arXiv:1910.01108) as its released code makes it: a DistilBERT of
    BERT's sizes with half of its layers, without token types and pooler.
    For BERT-base 66.36 million parameters without a head.

    Copied are word and position embeddings, their LayerNorm, the layers, and the output's weight, which is tied, and
    bias; not the embedding of token type 0, which BERT adds to every word. Of a sequence classifier, whose head reads
    the pooler, the head is new.

    Args:
        teacher: BertForMaskedLM, BertForPreTraining, BertModel or a BERT for sequences, tokens or questions.
        layers: numbers from 0; None: half of them, by `spread`: 0, 2, 4, 7, 9, 11 of 12.
        vocab_transform: copy the transformation before the masked language model's output too, else it is new.
        freeze_positions: do not train the position embeddings. Of the model at hand: a saved one forgets it.
        dropout, dtype: as in `from_layers`.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: a teacher that is no BERT of these; vocab_transform without such a head; layers as in `from_layers`.
    """
    op = "kdfast.students.distilbert"
    layers_path(op, teacher)
    if type(teacher).__name__ not in _HEADS:
        raise ValueError(
            f"{op}: teacher: expected one of {', '.join(_HEADS)}, got {type(teacher).__name__}; from_layers makes "
            "students of other architectures, DistilRoBERTa among them"
        )
    name, heads = _HEADS[type(teacher).__name__]
    if vocab_transform:
        if name != "DistilBertForMaskedLM":
            raise ValueError(f"{op}: vocab_transform: expected a masked language model, got {type(teacher).__name__}")
        heads = heads | _TRANSFORM
    count = teacher.config.num_hidden_layers
    layers = spread(count, max(1, count // 2)) if layers is None else layers
    config = _distilbert_config(config_of(op, teacher, {"": layers}, None))
    set_dropout(op, config, dropout)
    student = new_model(teacher, getattr(transformers, name), config)
    copy_weights(
        teacher, student, _renamed_to_bert(layers, heads, "" if teacher.base_model is teacher else "bert."), dtype
    )
    student.get_position_embeddings().requires_grad_(not freeze_positions)
    return student


def _distilbert_config(bert: Any) -> Any:
    """DistilBERT's of BERT's."""
    classifier = {} if bert.classifier_dropout is None else {"seq_classif_dropout": bert.classifier_dropout}
    of_same_name = ("vocab_size", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "problem_type")
    config = transformers.DistilBertConfig(
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        activation=bert.hidden_act,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        id2label=bert.id2label,
        label2id=bert.label2id,
        **{name: getattr(bert, name) for name in (*of_same_name, "pad_token_id", "bos_token_id", "eos_token_id")},
        **classifier,
    )
    config._attn_implementation = bert._attn_implementation
    return config


def _renamed_to_bert(layers: Sequence[int], heads: dict[str, str], prefix: str) -> Callable[[str], str]:
    """DistilBERT's names of parameters to BERT's; to names that it does not have, where it has no such parameter."""

    def name_of(name: str) -> str:
        module, _, kind = name.removeprefix("distilbert.").rpartition(".")
        if module in heads:
            return f"{heads[module]}.{kind}"
        found = re.fullmatch(r"transformer\.layer\.(\d+)\.(.*)", module)
        if found is not None:
            module = f"encoder.layer.{layers[int(found[1])]}.{_IN_LAYER[found[2]]}"
        return f"{prefix}{module}.{kind}" if found is not None or module.startswith("embeddings.") else ""

    return name_of
