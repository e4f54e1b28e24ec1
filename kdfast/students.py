"""Students made of their teachers: some of the layers, a narrower model, or DistilBERT of BERT.

    student = students.from_layers(teacher, students.spread(12, 6))                       # Patient-KD, causal models
    student, copied, fresh = students.narrower(teacher, hidden_size=312, intermediate_size=1200, num_hidden_layers=4)
    student = students.distilbert(teacher)                                                # Sanh et al., 2019

Every student is a new model: all its parameters are trained, whatever is frozen in the teacher, on the teacher's device
and in its dtypes; in evaluation mode, as after `from_pretrained`. No hook or `kdfast.hf.Reader` of the teacher comes along.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

__all__ = ["Narrowed", "distilbert", "from_layers", "narrower", "spread"]

PER_LAYER = ("layer_types", "no_rope_layers")  # lists in configs: which attention, whether with rotary embeddings


def spread(teacher_layers: int, student_layers: int) -> list[int]:
    """`student_layers` of the numbers 0 to `teacher_layers` - 1, the first and the last among them and evenly apart:
    round(i · (N - 1) / (M - 1)), halves to the even number. 12 to 6: 0, 2, 4, 7, 9, 11, as in DistilBERT's code.

    Raises:
        ValueError: student_layers is not between 1 and teacher_layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"kdfast.students.spread: student_layers: expected 1 to {teacher_layers}, the teacher's, got {student_layers}"
        )
    return [round(i * (teacher_layers - 1) / max(1, student_layers - 1)) for i in range(student_layers)]


def from_layers(teacher: Any, layers: Sequence[int], *, dropout: float | None = None) -> Any:
    """A new model of the teacher's class with copies of the given layers and of all that is no layer: embeddings, pooler,
    head. Tied weights stay tied.

    ModernBERT has no attn_norm in its first layer: a layer that becomes the first loses its own, and the teacher's first
    gets a new one (weight 1) in any other place. Which layers attend locally comes along. ALBERT's layers share their
    weights: only their number counts.

    Args:
        teacher: of transformers, with one list of layers.
        layers: numbers from 0, in the student's order; one may be there more than once, in copies of its own.
        dropout: every probability of dropout; None: as the teacher's. With 0 the student matches the same function, as the
            teacher's targets are made without; on the CPU, random numbers take a fifth of a step.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: no layers, or numbers that the teacher does not have; a dropout outside [0, 1); a teacher whose
            parameters are not those that its class makes of its config.
    """
    op = "kdfast.students.from_layers"
    path = _layers_path(op, teacher)
    config = _config_of(op, teacher, layers, dropout)
    with no_init_weights():  # all of it is copied
        student = _new(teacher, type(teacher), config)
    name_of = _renamed(path, layers)
    _, fresh = _copy(teacher, student, name_of)
    theirs, ours = teacher.state_dict(), student.state_dict()
    new = [name for name in fresh if name_of(name) not in theirs and path is not None and name.startswith(path)]
    for name in new:
        student.get_submodule(name.rpartition(".")[0]).reset_parameters()
    unlike = [name for name in fresh if name not in new]
    unlike += [name for name in theirs if name not in ours and not (path is not None and name.startswith(path))]
    if unlike:
        raise ValueError(
            f"{op}: teacher: expected the parameters that {type(teacher).__name__} makes of its config, got others for "
            f"{', '.join(unlike)}"
        )
    return student


class Narrowed(NamedTuple):
    """model: the student. copied: names of its parameters that are the teacher's, of a vocabulary at least the common rows.
    fresh: of those that are initialised."""

    model: Any
    copied: list[str]
    fresh: list[str]


def narrower(
    teacher: Any, *, layers: Sequence[int] | None = None, dropout: float | None = None, **config_changes: Any
) -> Narrowed:
    """A new model of the teacher's class with a changed config. Parameters of the same shape are copied, the others
    initialised as the class does; a vocabulary of another length keeps the rows that both have.

    `head_dim` follows hidden_size and num_attention_heads where it is their quotient in the teacher, and
    `num_key_value_heads` follows num_attention_heads where they are the same in it.

    Args:
        teacher: of transformers, with one list of layers.
        layers: which of the teacher's the student's are copied from; None: `spread` over them.
        dropout: as in `from_layers`.
        config_changes: of the teacher's config, e.g. hidden_size=312, intermediate_size=1200, num_hidden_layers=4.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: names that its config does not have, values that do not fit each other or the class; layers as in
            `from_layers`.
    """
    op = "kdfast.students.narrower"
    path = _layers_path(op, teacher)
    _check_names(op, teacher.config, config_changes)
    count_name = _config_name(teacher.config, "num_hidden_layers")
    changes = {_config_name(teacher.config, name): value for name, value in config_changes.items()}
    count = changes.pop(count_name, teacher.config.num_hidden_layers if layers is None else len(layers))
    if layers is None:
        layers = spread(teacher.config.num_hidden_layers, count)
    elif len(layers) != count:
        raise ValueError(f"{op}: layers: expected {count}, num_hidden_layers, got {list(layers)}")
    config = _config_of(op, teacher, layers, dropout)
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        _follow(op, teacher.config, config, changes)
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(f"{op}: config_changes: {error}") from None
    student = _new(teacher, type(teacher), config)
    return Narrowed(student, *_copy(teacher, student, _renamed(path, layers)))


# ---- DistilBERT ----
# class of the teacher: that of the student, and the student's parts beyond the base model by name, each with the teacher's
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
) -> Any:
    """The student of DistilBERT (Sanh et al., 2019, arXiv:1910.01108) as its released code makes it: a DistilBERT of BERT's
    sizes with half of its layers, without token types and pooler. For BERT-base 66.36 million parameters without a head.

    Copied are word and position embeddings, their LayerNorm, the layers, and the output's weight, which is tied, and bias;
    not the embedding of token type 0, which BERT adds to every word. Of a sequence classifier, whose head reads the pooler,
    the head is new.

    Args:
        teacher: BertForMaskedLM, BertForPreTraining, BertModel or a BERT for sequences, tokens or questions.
        layers: numbers from 0; None: half of them, by `spread`: 0, 2, 4, 7, 9, 11 of 12.
        vocab_transform: copy the transformation before the masked language model's output too, else it is new.
        freeze_positions: do not train the position embeddings. Of the model at hand: a saved one forgets it.
        dropout: as in `from_layers`.

    Raises:
        TypeError: teacher is no model of transformers.
        ValueError: a teacher that is no BERT of these; vocab_transform without such a head; layers as in `from_layers`.
    """
    op = "kdfast.students.distilbert"
    _layers_path(op, teacher)
    if type(teacher).__name__ not in _HEADS:
        raise ValueError(
            f"{op}: teacher: expected one of {', '.join(_HEADS)}, got {type(teacher).__name__}; from_layers makes students "
            "of other architectures, DistilRoBERTa among them"
        )
    name, heads = _HEADS[type(teacher).__name__]
    if vocab_transform:
        if name != "DistilBertForMaskedLM":
            raise ValueError(f"{op}: vocab_transform: expected a masked language model, got {type(teacher).__name__}")
        heads = heads | _TRANSFORM
    count = teacher.config.num_hidden_layers
    layers = spread(count, max(1, count // 2)) if layers is None else layers
    config = _distilbert_config(_config_of(op, teacher, layers, None))
    _set_dropout(op, config, dropout)
    student = _new(teacher, getattr(transformers, name), config)
    _copy(teacher, student, _renamed_to_bert(layers, heads, "" if teacher.base_model is teacher else "bert."))
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


# ---- configs ----
def _config_name(config: Any, name: str) -> str:
    """The config's own name: some call num_hidden_layers n_layers."""
    return str(config.attribute_map.get(name, name))


def _config_of(op: str, teacher: Any, layers: Sequence[int], dropout: float | None) -> Any:
    """A copy of the teacher's config that fits these of its layers."""
    config = copy.deepcopy(teacher.config)
    before, after = config.num_hidden_layers, len(layers)
    if not after or any(layer not in range(before) for layer in layers):
        raise ValueError(f"{op}: layers: expected numbers from 0 to {before - 1}, got {list(layers)}")
    groups = getattr(config, "num_hidden_groups", 1)  # of ALBERT: neighbours that share their weights
    if [layer * groups // before for layer in layers] != [i * groups // after for i in range(after)]:
        raise ValueError(
            f"{op}: layers: expected as many of each of the {groups} groups that share weights, got {list(layers)}"
        )
    config.num_hidden_layers = after
    for name in PER_LAYER:
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in layers])
    _set_dropout(op, config, dropout)
    attention = config._attn_implementation
    if isinstance(attention, str):
        config._attn_implementation = attention.removeprefix("kdfast_")  # of a teacher that a Reader reads
    return config


def _set_dropout(op: str, config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout: expected 0 or more and less than 1, got {dropout}")
    for name in [name for name in config.to_dict() if "dropout" in name]:
        setattr(config, name, float(dropout))


def _check_names(op: str, config: Any, changes: dict[str, Any]) -> None:
    values = config.to_dict()
    known = {*values, *config.attribute_map, "num_labels"}
    wrong = [name for name in changes if name not in known]
    if wrong:
        sizes = [name for name, value in values.items() if type(value) is int and not name.endswith("_id")]
        raise ValueError(
            f"{op}: config_changes: expected names that {type(config).__name__} has, its sizes are "
            f"{', '.join(sizes)}; got {', '.join(wrong)}"
        )


def _follow(op: str, before: Any, config: Any, changes: dict[str, Any]) -> None:
    """Adapts what depends on the changed width and heads, and checks that these fit each other."""
    if getattr(before, "num_key_value_heads", None) == before.num_attention_heads:
        config.num_key_value_heads = changes.get("num_key_value_heads", config.num_attention_heads)
    width, heads = config.hidden_size, config.num_attention_heads
    own = False  # whether the size of heads is one of its own
    for name in ("head_dim", "d_head"):
        if getattr(before, name, None) is None:
            continue
        if name not in changes and getattr(before, name) == before.hidden_size // before.num_attention_heads:
            setattr(config, name, width // heads)
        else:
            own = True
    if not own and width % heads:
        raise ValueError(
            f"{op}: hidden_size: expected a multiple of the {heads} heads (num_attention_heads), got {width}"
        )
    size = getattr(config, "head_dim", None) or width // heads
    if getattr(config, "rope_parameters", None) and size % 2:
        raise ValueError(f"{op}: hidden_size: expected heads of even size for rotary embeddings, got {size}")
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % shared:
        raise ValueError(f"{op}: num_attention_heads: expected a multiple of num_key_value_heads={shared}, got {heads}")


# ---- models ----
def _layers_path(op: str, teacher: Any) -> str | None:
    """The name of the teacher's list of layers, with a dot at its end. None for ALBERT, whose layers are one."""
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"{op}: teacher: expected a transformers model, got {type(teacher).__name__}")
    if teacher.config.model_type == "albert":
        return None
    prefix = "" if teacher.base_model is teacher else f"{teacher.base_model_prefix}."
    count = getattr(teacher.config, "num_hidden_layers", 0)
    lists = [
        f"{prefix}{name}."
        for name, module in teacher.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"{op}: teacher: expected one list of its {count} layers, {type(teacher).__name__} has {outer}"
        )
    return outer[0]


def _renamed(path: str | None, layers: Sequence[int]) -> Callable[[str], str]:
    """The student's names of parameters to the teacher's: with the numbers of their layers there."""

    def name_of(name: str) -> str:
        if path is None or not name.startswith(path):
            return name
        mine, _, rest = name.removeprefix(path).partition(".")
        return f"{path}{layers[int(mine)]}.{rest}"

    return name_of


def _new(teacher: Any, kind: Any, config: Any) -> Any:
    """A model of the given class, on the teacher's device, without the parts that the teacher was made or left without."""
    with torch.device(teacher.device):
        student = kind(config)
    student.tie_weights()  # left undone where the weights are not initialised
    if kind is type(teacher):
        _leave_out(student, teacher)
        if getattr(teacher, "generation_config", None) is not None:
            student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _leave_out(student: nn.Module, teacher: nn.Module) -> None:
    """A pooler, say, that is None in the teacher is None in the student."""
    for name, part in list(student.named_children()):
        theirs = getattr(teacher, name, part)
        if theirs is None:
            setattr(student, name, None)
        elif theirs is not part and not isinstance(part, nn.ModuleList):
            _leave_out(part, theirs)


def _copy(teacher: Any, student: Any, name_of: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Copies the teacher's parameters and buffers, in their dtypes, where they are of the same shape or are rows of the
    vocabulary. Returns the student's names of those that are copied, at least in part, and of the others."""
    theirs = teacher.state_dict()
    of_vocabulary = [getattr(model.config, "vocab_size", None) for model in (teacher, student)]
    copied, fresh = [], []
    for name, mine in student.state_dict(keep_vars=True).items():
        its = theirs.get(name_of(name))
        if its is not None and its.shape == mine.shape:
            mine.data = its.detach().clone()  # not copy_: keeps its dtype
            copied.append(name)
            continue
        if mine.is_floating_point():
            mine.data = mine.data.to(teacher.dtype)
        rows = [] if its is None else [*its.shape[:1], *mine.shape[:1]]
        if its is not None and rows == of_vocabulary and its.shape[1:] == mine.shape[1:]:
            mine.data[: min(rows)] = its[: min(rows)]
            copied.append(name)
        else:
            fresh.append(name)
    return copied, fresh
