"""Reads queries, keys, values and hidden states out of transformers models, which keep their fused attention.

    teacher, student = kdfast.hf.Reader(teacher_model), kdfast.hf.Reader(student_model)
    s, t = student(**batch), teacher(**batch)
    loss = kdfast.qk_attention_mse(s.q, s.k, t.q[1::2], t.k[1::2], key_mask=s.mask, query_mask=s.mask)
    loss = loss + kdfast.hidden_mse(s.hidden, t.hidden[::2])

Most models call their attention through transformers' `AttentionInterface`: a function registered there sees queries,
keys and values and calls the eager, SDPA or flash attention that the model uses, bit for bit the same. These are read
whatever their name; that every layer made one such call is seen when the model is run. Of encoder-decoders the encoder
is read. DeBERTa-v2, MPNet, XLNet and others that do not go through it are read by hooks.
`ADAPTERS` says how architectures are read where that is not all; `register` adds one. `docs/models.md` has a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdfast.models import read_by_hooks
from kdfast.models.inputs import unwrapped
from kdfast.models.read_by_hooks import through_projections
from kdfast.models.recording import Adapter, Record, record, recorded

__all__ = [
    *("ADAPTERS", "Adapter", "Features", "Reader", "adapter_of", "read_hidden", "record", "register"),
    *("through_interface", "through_projections"),
]


@dataclass(repr=False)
class Features:
    """What a forward pass of a model left, layer by layer: N entries of q, k and v, N + 1 of hidden. Of an
    encoder-decoder, its encoder's layers.

    outputs: the model's own. hidden: [B, L, D], the embeddings' output and every layer's. q, k, v: [B, H, L, d];
    grouped keys and values have fewer heads; queries and keys as their product takes them, rotary embeddings applied.
    scale: of that product. softcap: c where the model bounds the scaled product by c · tanh(product / c) (Gemma 2), or
    None. bias: what relative positions add to that, [B or 1, H, L, L], where the model has it and the `Reader` was
    asked for it. mask: [B, L], True where a token counts; None where the call had no
    attention_mask. cls_index: the token that stands for a sequence, a number or [B]. causal:
    whether tokens see only those before them.
    """

    outputs: Any
    hidden: tuple[Tensor, ...]
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    scale: float
    bias: list[Tensor]
    mask: Tensor | None
    cls_index: int | Tensor
    causal: bool
    softcap: float | None = None

    def __repr__(self) -> str:
        return f"Features({len(self.hidden) - 1} layers, hidden {list(self.hidden[-1].shape)})"

    @property
    def logits(self) -> Any:
        """Logits of the model's own outputs, where it has any."""
        return getattr(self.outputs, "logits", None)

    @property
    def scores(self) -> list[Tensor]:
        """Every layer's scores before mask and softmax, [B, H, L, L]: scale · q kᵀ, the soft-cap and the bias where there
        is one. Made on demand; `kdfast.qk_attention_mse` and `kdfast.qk_relation_kl` need none."""
        made = []
        for i, (q, k) in enumerate(zip(self.q, self.k, strict=True)):
            product = self.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
            if self.softcap is not None:
                product = self.softcap * torch.tanh(product / self.softcap)
            made.append(product + self.bias[i] if self.bias else product)
        return made


# Readers of the models that are read: a second Reader takes the first one's place.
_readers: WeakKeyDictionary[nn.Module, Reader] = WeakKeyDictionary()


# ---- models that go through AttentionInterface ----
def _own_eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Eager attention, of which every file of transformers' models has one of its own: with soft-caps, sinks."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager(module, *args, **kwargs)
    name = type(module).__name__
    raise ValueError(
        f"kdfast.hf: attention: expected an eager_attention_forward beside {name}, got none; sdpa may do: "
        "model.set_attn_implementation"
    )


def _recording(attention: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        scale, position_bias = kwargs.get("scaling"), kwargs.get("position_bias")
        record(
            query,
            key,
            value,
            query.shape[-1] ** -0.5 if scale is None else scale,
            None if position_bias is None else lambda: position_bias,
            softcap=kwargs.get("softcap"),
            module=module,
        )
        return attention(module, query, key, value, attention_mask, **kwargs)

    return attend


def through_interface(model: PreTrainedModel) -> Callable[[], None]:
    """The `install` of models that call their attention through transformers' `AttentionInterface`."""
    before = model.config._attn_implementation
    base = before.removeprefix("kdfast_")  # a copy of a model that is read
    name = f"kdfast_{base}"
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"kdfast.hf: attention: expected eager, sdpa or a flash attention, got {base!r}")
    AttentionInterface.register(name, _recording(_own_eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"kdfast.hf.Reader: model: expected {_READABLE}, got {_unread(model)}")
    return lambda: model.set_attn_implementation(before)


_READABLE = "one that calls its attention through transformers' AttentionInterface in each of its layers"


def _unread(model: PreTrainedModel) -> str:
    """An architecture that cannot be read, and what to do about it."""
    name = model.config.model_type
    return (
        f"{name!r}; to read it: kdfast.hf.register({name!r}, kdfast.hf.Adapter(install)), where install(model) makes "
        "every attention call kdfast.hf.record(q, k, v, scale) and returns what undoes that (of linear maps that make "
        "q, k and v: kdfast.hf.through_projections)"
    )


ADAPTERS: dict[str, Adapter] = {
    **{
        name: Adapter(through_interface)
        for name in ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "modernbert", "albert")
    },
    **{name: Adapter(through_interface) for name in ("vit", "deit", "dinov2")},
    **{
        name: Adapter(through_interface, cls_index=None, causal=True)
        for name in ("llama", "qwen2", "qwen3", "mistral", "smollm3")
    },
    "mpnet": Adapter(read_by_hooks.mpnet),
    "deberta-v2": Adapter(read_by_hooks.deberta_v2),
    **{name: Adapter(through_projections("query", "key", "value")) for name in ("megatron-bert", "rembert")},
    "xlnet": Adapter(read_by_hooks.xlnet, cls_index=-1),
}


def adapter_of(model: nn.Module) -> Adapter:
    """How a model is read: what `ADAPTERS` says, or else by its own attention modules, through `AttentionInterface`.

    Where all of these say that they are causal (`is_causal`), and the model has no encoder, tokens see only those
    before them, and the last one stands for a sequence.
    """
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    known = ADAPTERS.get(getattr(config, "model_type", ""))
    if known is not None:
        return known
    told = [module.is_causal for module in inner.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    causal = bool(told) and all(told) and not getattr(config, "is_encoder_decoder", False)
    return Adapter(through_interface, cls_index=None if causal else 0, causal=causal)


def register(model_type: str, adapter: Adapter) -> None:
    """Says how models whose `config.model_type` is `model_type` are read."""
    ADAPTERS[model_type] = adapter


def _transformers_model(model: nn.Module) -> Any:
    inner: Any = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"kdfast.hf.Reader: model: expected a transformers model, got {type(inner).__name__}")
    return inner


def _cls_index(adapter: Adapter, mask: Tensor | None) -> int | Tensor:
    if adapter.cls_index is not None:
        return adapter.cls_index
    if mask is None:
        return -1
    places = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask.bool(), places, 0).amax(-1)


def _features(adapter: Adapter, outputs: Any, read: Record, mask: Tensor | None) -> Features:
    states = getattr(outputs, "hidden_states", None)
    states = getattr(outputs, "encoder_hidden_states", None) if states is None else states
    if states is None:
        got = type(outputs).__name__
        raise ValueError(f"kdfast.hf: outputs: expected some by name, with .hidden_states of every layer, got {got}")
    return Features(
        outputs=outputs,
        hidden=tuple(states),
        q=read.q,
        k=read.k,
        v=read.v,
        scale=float(read.scale or 0),
        bias=read.bias,
        mask=None if mask is None else mask.bool(),
        cls_index=_cls_index(adapter, mask),
        causal=adapter.causal,
        softcap=read.softcap,
    )


def read_hidden(model: nn.Module, **inputs: Any) -> Features:
    """Runs a model of any architecture on its keyword arguments; `Features` without queries, keys and values."""
    outputs = model(**inputs, output_hidden_states=True)
    return _features(adapter_of(model), outputs, Record(), inputs.get("attention_mask"))


class Reader:
    """A model whose forward passes give `Features`. Plain, compiled, DDP-wrapped and PEFT's models, with gradient
    checkpointing that is not reentrant.

    Args:
        model: of an architecture that goes through transformers' `AttentionInterface`, or is in `ADAPTERS`.
        bias: keep what relative positions add to the scores (MPNet, XLNet, DeBERTa-v2, T5): [B, H, L, L] per layer.

    Raises:
        ValueError: an architecture that is neither, here or where it is run first; the message says what to implement.
    """

    def __init__(self, model: nn.Module, *, bias: bool = False) -> None:
        self.model, self.bias = model, bias
        inner = _transformers_model(model)
        self.config = inner.config
        if inner in _readers:
            _readers[inner].close()
        self.adapter = adapter_of(inner)
        self._by_use = self.config.model_type not in ADAPTERS
        encoder = inner.get_encoder() if getattr(self.config, "is_encoder_decoder", False) else inner
        self._only = None if encoder is inner else set(encoder.modules())
        self._undo: Callable[[], None] | None = self.adapter.install(inner)
        _readers[inner] = self

    def __call__(self, **inputs: Any) -> Features:
        """Runs the model on its keyword arguments."""
        if self._undo is None:
            raise RuntimeError("kdfast.hf.Reader: expected one that is open, this one was closed")
        if inputs.get("output_attentions"):
            raise ValueError(
                "kdfast.hf.Reader: output_attentions: expected none, as fused attention has none, got some; see "
                "Features.scores"
            )
        mine = Record(wants_bias=self.bias, only=self._only)
        with recorded(mine):
            outputs = self.model(**inputs, output_hidden_states=True)
        read = _features(self.adapter, outputs, mine, inputs.get("attention_mask"))
        if self._by_use:
            self._check_layers(read)
        if not mine.q:
            raise RuntimeError(
                f"kdfast.hf.Reader: {self.config.model_type}: expected its attention to be called, it was not"
            )
        if torch.is_grad_enabled() and not mine.q[-1].requires_grad and read.hidden[-1].requires_grad:
            raise RuntimeError(
                "kdfast.hf.Reader: gradient checkpointing: expected use_reentrant=False; reentrant checkpoints cut "
                "queries and keys off from their gradients"
            )
        return read

    def _check_layers(self, read: Features) -> None:
        """That a model which nothing is known of made one call per layer, of all tokens of its hidden states."""
        states = read.hidden[-1]
        layers = len(read.hidden) - 1
        rows, length = states.shape[:2]
        calls = [(q.shape[0], q.shape[2], k.shape[2]) for q, k in zip(read.q, read.k, strict=True)]
        if calls != [(rows, length, length)] * layers:
            got = (
                f"{len(calls)} calls for {layers} layers" if len(calls) != layers else "queries or keys of other tokens"
            )
            unread = _unread(_transformers_model(self.model))
            raise ValueError(f"kdfast.hf.Reader: model: expected {_READABLE}, got {got} of {unread}")

    @classmethod
    def of(cls, model: nn.Module) -> Reader:
        """The open Reader of this model, or a new one."""
        found = _readers.get(_transformers_model(model))
        return found if found is not None and found.model is model and found._undo is not None else cls(model)

    def close(self) -> None:
        """Leaves the model as it was. Another Reader of the same model does so too."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
