"""What `kdfast.students` makes students with: their configs, and the teacher's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Lists in configs: which attention, whether with rotary embeddings, how far each of LED's encoder's sees.
PER_LAYER = ("layer_types", "no_rope_layers", "attention_window")
SIDES = ("encoder", "decoder")  # of an encoder-decoder
# What configs call the number of layers: of a model, of either side.
COUNTS = {
    "": ("num_hidden_layers",),
    "encoder": ("num_encoder_layers", "encoder_layers", "num_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
}
OF_FIRST = "relative_attention_bias.weight"  # of T5, whose first layer has it for all of a side

Layers = Mapping[str, Sequence[int]]  # those of each side; of other models under ""


# ---- configs ----
def config_name(config: Any, name: str) -> str:
    """The config's own name: some call num_hidden_layers n_layers."""
    return str(config.attribute_map.get(name, name))


def config_of(op: str, teacher: Any, layers: Layers, dropout: float | None) -> Any:
    """A copy of the teacher's config that fits these of its layers."""
    config = copy.deepcopy(teacher.config)
    vars(config).pop(
        "quantization_config", None
    )  # of a pruned teacher: shapes of its layers, which are not the student's
    for side, chosen in layers.items():
        _check_layers(op, config, side, chosen)
        setattr(config, count_name(config, side), len(chosen))
    of_each = layers[""] if "" in layers else layers["encoder"]
    for name in PER_LAYER:
        every = vars(config).get(name)  # not Mamba's, which its config makes of the number of layers
        if isinstance(every, list):
            setattr(config, name, [every[layer] for layer in of_each])
    set_dropout(op, config, dropout)
    attention = config._attn_implementation
    if isinstance(attention, str):
        config._attn_implementation = attention.removeprefix("kdfast_")  # of a teacher that a Reader reads
    return config


def count_name(config: Any, side: str = "") -> str:
    """What the config calls the number of a side's layers."""
    return next((name for name in COUNTS[side] if hasattr(config, name)), COUNTS[side][0])


def _check_layers(op: str, config: Any, side: str, layers: Sequence[int]) -> None:
    argument = "decoder_layers" if side == "decoder" else "layers"
    before, after = getattr(config, count_name(config, side)), len(layers)
    if not after or any(layer not in range(before) for layer in layers):
        raise ValueError(f"{op}: {argument}: expected numbers from 0 to {before - 1}, got {list(layers)}")
    groups = getattr(config, "num_hidden_groups", 1)  # of ALBERT: neighbours that share their weights
    if [layer * groups // before for layer in layers] != [i * groups // after for i in range(after)]:
        raise ValueError(
            f"{op}: {argument}: expected as many of each of the {groups} groups that share weights, got {list(layers)}"
        )


def set_dropout(op: str, config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout: expected 0 or more and less than 1, got {dropout}")
    for name in [name for name in config.to_dict() if "dropout" in name]:
        setattr(config, name, float(dropout))


def check_names(op: str, config: Any, changes: dict[str, Any]) -> None:
    values = config.to_dict()
    known = {*values, *config.attribute_map, "num_labels"}
    wrong = [name for name in changes if name not in known]
    if wrong:
        sizes = [name for name, value in values.items() if type(value) is int and not name.endswith("_id")]
        raise ValueError(
            f"{op}: config_changes: expected names that {type(config).__name__} has, its sizes are "
            f"{', '.join(sizes)}; got {', '.join(wrong)}"
        )


def follow(op: str, before: Any, config: Any, changes: dict[str, Any]) -> None:
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
def check_model(op: str, teacher: Any, argument: str = "teacher") -> None:
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"{op}: {argument}: expected a transformers model, got {type(teacher).__name__}")


def has_decoder(model: Any) -> bool:
    """Whether its layers are of an encoder and of a decoder."""
    two = getattr(model.config, "is_encoder_decoder", False)  # also of the encoder of such a model alone
    return bool(two) and all(hasattr(model.base_model, side) for side in SIDES)


def layers_path(op: str, teacher: Any, argument: str = "teacher", side: str = "") -> str | None:
    """The name of the model's list of layers, or of a side's, with a dot at its end. None for ALBERT, whose layers are
    one."""
    check_model(op, teacher, argument)
    if teacher.config.model_type == "albert":
        return None
    prefix = "" if teacher.base_model is teacher else f"{teacher.base_model_prefix}."
    prefix += f"{side}." if side else ""
    count = getattr(teacher.config, count_name(teacher.config, side), 0)
    lists = [
        f"{prefix}{name}."
        for name, module in teacher.base_model.get_submodule(side).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"{op}: {argument}: expected one list of its {count} layers, got {outer} in {type(teacher).__name__}"
        )
    return outer[0]


def renamed(paths: Mapping[str, str | None], layers: Layers, theirs: Container[str]) -> Callable[[str], str]:
    """The student's names of parameters to the teacher's, `theirs`: with the numbers of their layers there."""

    def name_of(name: str) -> str:
        for side, path in paths.items():
            if path is not None and name.startswith(path):
                mine, _, rest = name.removeprefix(path).partition(".")
                its = f"{path}{layers[side][int(mine)]}.{rest}"
                return name if its not in theirs and rest.endswith(OF_FIRST) else its
        return name

    return name_of


def new_model(teacher: Any, kind: Any, config: Any) -> Any:
    """A model of the given class, on the teacher's device,
    without the parts that the teacher was made or left without."""
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


def copy_weights(
    teacher: Any, student: Any, name_of: Callable[[str], str], dtype: torch.dtype | None
) -> tuple[list[str], list[str]]:
    """Copies the teacher's parameters and buffers where they are of the same shape or are rows of the vocabulary.
    Returns the student's names of those that are copied, at least in part, and of the others."""
    theirs = teacher.state_dict()
    student.config.dtype = dtype or teacher.dtype
    of_vocabulary = [getattr(model.config, "vocab_size", None) for model in (teacher, student)]
    copied, fresh = [], []
    for name, mine in student.state_dict(keep_vars=True).items():
        its = theirs.get(name_of(name))
        if its is not None and its.shape == mine.shape:
            floating = dtype is not None and mine.is_floating_point()
            mine.data = its.detach().to(dtype if floating else its.dtype, copy=True)
            copied.append(name)
            continue
        if mine.is_floating_point():
            mine.data = mine.data.to(dtype or teacher.dtype)
        rows = [] if its is None else [*its.shape[:1], *mine.shape[:1]]
        if its is not None and rows == of_vocabulary and its.shape[1:] == mine.shape[1:]:
            mine.data[: min(rows)] = its[: min(rows)]
            copied.append(name)
        else:
            fresh.append(name)
    return copied, fresh
