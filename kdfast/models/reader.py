"""Reads queries, keys, values and hidden states out of transformers models, which keep their fused attention.

    teacher, student = kdfast.hf.Reader(teacher_model), kdfast.hf.Reader(student_model)
    s, t = student(**batch), teacher(**batch)
    loss = kdfast.qk_attention_mse(s.q, s.k, t.q[1::2], t.k[1::2], key_mask=s.mask, query_mask=s.mask)
    loss = loss + kdfast.hidden_mse(s.hidden, t.hidden[::2])

Most models call their attention through transformers' `AttentionInterface`: a function registered there sees queries,
keys and values and calls the SDPA or flash attention that the model uses, bit for bit the same. Eager attention is each
model's own and out of reach: such a model uses SDPA while it is read. MPNet and XLNet, which do not, are read by hooks.
`ADAPTERS` says how each architecture is read; `register` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdfast.models.inputs import unwrapped

__all__ = ["ADAPTERS", "Adapter", "Features", "Reader", "read_hidden", "record", "register", "through_interface"]


@dataclass(repr=False)
class Features:
    """What a forward pass of a model left, layer by layer: N entries of q, k and v, N + 1 of hidden.

    outputs: the model's own. hidden: [B, L, D], the embeddings' output and every layer's. q, k, v: [B, H, L, d];
    grouped keys and values have fewer heads; queries and keys as their product takes them, rotary embeddings applied.
    scale: of that product. bias: what relative positions add to the scaled product, [B or 1, H, L, L], where the model
    has it and the `Reader` was asked for it. mask: [B, L], True where a token counts; None where the call had no
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

    def __repr__(self) -> str:
        return f"Features({len(self.hidden) - 1} layers, hidden {list(self.hidden[-1].shape)})"

    @property
    def logits(self) -> Any:
        """Logits of the model's own outputs, where it has any."""
        return getattr(self.outputs, "logits", None)

    @property
    def scores(self) -> list[Tensor]:
        """Every layer's scores before mask and softmax, [B, H, L, L]: scale · q kᵀ, and the bias where there is one.
        Made on demand; `kdfast.qk_attention_mse` and `kdfast.qk_relation_kl` need none."""
        made = []
        for i, (q, k) in enumerate(zip(self.q, self.k, strict=True)):
            product = self.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
            made.append(product + self.bias[i] if self.bias else product)
        return made


@dataclass
class _Record:
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    bias: list[Tensor] = field(default_factory=list)
    scale: float | None = None
    wants_bias: bool = False


# Readers of the models that are read: a second Reader takes the first one's place.
_readers: WeakKeyDictionary[nn.Module, Reader] = WeakKeyDictionary()
# What the forward pass that runs leaves; not one that gradient checkpointing repeats: a layer leaves one entry.
_record: _Record | None = None


@dataclass(frozen=True)
class Adapter:
    """How an architecture is read.

    install: makes a model record into `record(q, k, v, scale, bias)` and returns what undoes that. cls_index: the token
    that stands for a sequence; None: the last one that counts. causal: whether tokens see only those before them.
    """

    install: Callable[[PreTrainedModel], Callable[[], None]]
    cls_index: int | None = 0
    causal: bool = False


def record(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Callable[[], Tensor] | None = None) -> None:
    """Keeps a layer's queries, keys and values, [B, H, L, d], for the `Reader` whose forward pass runs."""
    if _record is None:
        return
    _record.q.append(q)
    _record.k.append(k)
    _record.v.append(v)
    _record.scale = scale
    if bias is not None and _record.wants_bias:
        _record.bias.append(bias())


# ---- models that go through AttentionInterface ----
def _recording(attention: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        record(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return attention(module, query, key, value, attention_mask, **kwargs)

    return attend


def through_interface(model: PreTrainedModel) -> Callable[[], None]:
    """The `install` of models that call their attention through transformers' `AttentionInterface`."""
    before = model.config._attn_implementation
    base = before.removeprefix("kdfast_")  # a copy of a model that is read
    base = "sdpa" if base == "eager" else base
    name = f"kdfast_{base}"
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"kdfast.hf: attention: expected sdpa or a flash attention, got {base!r}")
    AttentionInterface.register(name, _recording(ALL_ATTENTION_FUNCTIONS[base]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    return lambda: model.set_attn_implementation(before)


# ---- MPNet: projections of its own, and a bias of relative positions ----
def _mpnet(model: PreTrainedModel) -> Callable[[], None]:
    from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        live = getattr(module, "live_heads", None)  # of `kdfast.prune.apply`, where the bias is of all heads
        if live == ():
            return
        hidden, position_bias = args[0], kwargs.get("position_bias", args[2] if len(args) > 2 else None)
        shape = (*hidden.shape[:-1], -1, module.attention_head_size)
        q, k, v = (kept.pop().view(shape).transpose(1, 2) for kept in module._kdfast_projected)
        bias = None if position_bias is None else lambda: position_bias if live is None else position_bias[:, live]
        record(q, k, v, module.attention_head_size**-0.5, bias)

    handles = []
    attentions = [m for m in model.modules() if isinstance(m, MPNetSelfAttention)]
    for attention in attentions:
        projected: Any = ([], [], [])
        attention._kdfast_projected = projected
        for linear, kept in zip((attention.q, attention.k, attention.v), projected, strict=True):
            handles.append(linear.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output)))
        handles.append(attention.register_forward_hook(after, with_kwargs=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del attention._kdfast_projected

    return undo


# ---- XLNet: scores of content, position and segment ----
def _xlnet(model: PreTrainedModel) -> Callable[[], None]:
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    def recording(attention: Any, core: Callable[..., Any]) -> Callable[..., Any]:
        def bias(q: Tensor, k: Tensor, k_r: Tensor, seg_mat: Tensor | None) -> Tensor:
            content = torch.einsum("bnd,jbnd->bnj", attention.r_w_bias.expand(q.shape[1], -1, -1), k)[:, :, None]
            position = torch.einsum("ibnd,jbnd->bnij", q + attention.r_r_bias, k_r)
            total = content + attention.rel_shift_bnij(position, klen=k.shape[0])
            if seg_mat is not None:
                segment = torch.einsum("ibnd,snd->ibns", q + attention.r_s_bias, attention.seg_embed)
                total = total + torch.einsum("ijbs,ibns->bnij", seg_mat, segment)
            scaled: Tensor = attention.scale * total
            return scaled

        def attend(q: Tensor, k: Tensor, v: Tensor, k_r: Tensor, seg_mat: Any = None, **kwargs: Any) -> Any:
            of_heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
            record(of_heads[0], of_heads[1], of_heads[2], attention.scale, lambda: bias(q, k, k_r, seg_mat))
            return core(q, k, v, k_r, seg_mat=seg_mat, **kwargs)

        return attend

    attentions = [m for m in model.modules() if isinstance(m, XLNetRelativeAttention)]
    for attention in attentions:
        attention.rel_attn_core = recording(attention, attention.rel_attn_core)  # type: ignore[method-assign]

    def undo() -> None:
        for attention in attentions:
            del attention.rel_attn_core

    return undo


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
    "mpnet": Adapter(_mpnet),
    "xlnet": Adapter(_xlnet, cls_index=-1),
}


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


def _features(adapter: Adapter, outputs: Any, read: _Record, mask: Tensor | None) -> Features:
    if getattr(outputs, "hidden_states", None) is None:
        got = type(outputs).__name__
        raise ValueError(f"kdfast.hf: outputs: expected some by name, with .hidden_states of every layer, got {got}")
    return Features(
        outputs=outputs,
        hidden=tuple(outputs.hidden_states),
        q=read.q,
        k=read.k,
        v=read.v,
        scale=float(read.scale or 0),
        bias=read.bias,
        mask=None if mask is None else mask.bool(),
        cls_index=_cls_index(adapter, mask),
        causal=adapter.causal,
    )


def read_hidden(model: nn.Module, **inputs: Any) -> Features:
    """Runs a model of any architecture on its keyword arguments; `Features` without queries, keys and values.

    The first token stands for a sequence where `ADAPTERS` says nothing else.
    """
    config = getattr(unwrapped(model), "config", None)
    adapter = ADAPTERS.get(getattr(config, "model_type", ""), Adapter(through_interface))
    return _features(adapter, model(**inputs, output_hidden_states=True), _Record(), inputs.get("attention_mask"))


class Reader:
    """A model whose forward passes give `Features`. Plain, compiled and DDP-wrapped models, with gradient checkpointing
    that is not reentrant.

    Args:
        model: of an architecture in `ADAPTERS`.
        bias: keep what relative positions add to the scores (MPNet, XLNet): [B, H, L, L] per layer.

    Raises:
        ValueError: an unknown architecture; the message says what to implement.
    """

    def __init__(self, model: nn.Module, *, bias: bool = False) -> None:
        self.model, self.bias = model, bias
        inner = _transformers_model(model)
        self.config = inner.config
        adapter = ADAPTERS.get(self.config.model_type)
        if adapter is None:
            raise ValueError(
                f"kdfast.hf.Reader: model: expected one of {', '.join(sorted(ADAPTERS))}, got "
                f"{self.config.model_type!r}; to read it: kdfast.hf.register({self.config.model_type!r}, "
                "kdfast.hf.Adapter(install)), where install(model) makes every attention call kdfast.hf.record(q, k, "
                "v, scale) and returns what undoes that; where the model uses AttentionInterface, "
                "kdfast.hf.through_interface is such an install"
            )
        if inner in _readers:
            _readers[inner].close()
        self.adapter = adapter
        self._undo: Callable[[], None] | None = adapter.install(inner)
        _readers[inner] = self

    def __call__(self, **inputs: Any) -> Features:
        """Runs the model on its keyword arguments."""
        global _record
        if self._undo is None:
            raise RuntimeError("kdfast.hf.Reader: expected one that is open, this one was closed")
        if inputs.get("output_attentions"):
            raise ValueError(
                "kdfast.hf.Reader: output_attentions: expected none, as fused attention has none, got some; see "
                "Features.scores"
            )
        mine = _Record(wants_bias=self.bias)
        before, _record = _record, mine
        try:
            outputs = self.model(**inputs, output_hidden_states=True)
        finally:
            _record = before
        if not mine.q or mine.scale is None:
            raise RuntimeError(
                f"kdfast.hf.Reader: {self.config.model_type}: expected its attention to be called, it was not"
            )
        if torch.is_grad_enabled() and not mine.q[-1].requires_grad and outputs.hidden_states[-1].requires_grad:
            raise RuntimeError(
                "kdfast.hf.Reader: gradient checkpointing: expected use_reentrant=False; reentrant checkpoints cut "
                "queries and keys off from their gradients"
            )
        return _features(self.adapter, outputs, mine, inputs.get("attention_mask"))

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
