"""Architectures whose attention does not go through transformers' `AttentionInterface`, read by hooks: MPNet, DeBERTa-v2,
MegatronBERT and RemBERT at their projections, XLNet at the core of its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdfast.models.recording import record

Bias = Callable[[], Tensor]


# ---- queries, keys and values that are what three linear maps make ----
def through_projections(
    query: str,
    key: str,
    value: str,
    scale: Callable[[Any], float] = lambda module: float(module.attention_head_size**-0.5),
    bias: Callable[[Any, tuple[Any, ...], dict[str, Any]], Bias | None] = lambda module, args, kwargs: None,
) -> Callable[[PreTrainedModel], Callable[[], None]]:
    """The `install` of models whose attention modules have these three linear maps and `attention_head_size`, and
    multiply what the maps make as it is, without rotary embeddings.

    Args:
        query, key, value: names of the maps.
        scale: of the product, of an attention module.
        bias: of such a module and the arguments that it was called with: what makes the bias of its scores, or None.
    """

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        kept = module._kdfast_projected
        firsts = [outputs[0] for outputs in kept if outputs]  # later ones are of positions
        for outputs in kept:
            outputs.clear()
        if len(firsts) == 3:  # none where `kdfast.prune.apply` left no head
            shape = (*firsts[0].shape[:-1], -1, module.attention_head_size)
            q, k, v = (x.view(shape).transpose(1, 2) for x in firsts)
            record(q, k, v, scale(module), bias(module, args, kwargs), module=module)

    def install(model: PreTrainedModel) -> Callable[[], None]:
        handles: list[Any] = []
        names = (query, key, value)
        attentions: list[Any] = [
            module
            for module in model.modules()
            if hasattr(module, "attention_head_size") and all(hasattr(module, name) for name in names)
        ]
        for attention in attentions:
            attention._kdfast_projected = ([], [], [])
            for name, kept in zip(names, attention._kdfast_projected, strict=True):
                linear: nn.Module = getattr(attention, name)
                handles.append(linear.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output)))
            handles.append(attention.register_forward_hook(after, with_kwargs=True))

        def undo() -> None:
            for handle in handles:
                handle.remove()
            for attention in attentions:
                del attention._kdfast_projected

        return undo

    return install


# ---- MPNet: a bias of relative positions ----
def _mpnet_bias(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bias | None:
    live = getattr(module, "live_heads", None)  # of `kdfast.prune.apply`, where the bias is of all heads
    position_bias = kwargs.get("position_bias", args[2] if len(args) > 2 else None)
    if position_bias is None:
        return None
    return lambda: position_bias if live is None else position_bias[:, live]


mpnet = through_projections("q", "k", "v", bias=_mpnet_bias)


# ---- DeBERTa: scores of content with positions, and of positions with content ----
def _deberta_scale(module: Any) -> float:
    parts = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    return float((module.attention_head_size * parts) ** -0.5)


def _deberta_bias(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bias | None:
    bias = module.__dict__.pop("_kdfast_bias", None)
    return None if bias is None else lambda: bias.view(-1, module.num_attention_heads, *bias.shape[1:])


_deberta_projections = through_projections("query_proj", "key_proj", "value_proj", _deberta_scale, _deberta_bias)


def deberta_v2(model: PreTrainedModel) -> Callable[[], None]:
    """Its bias is made by a method of the attention, which keeps what it returns."""

    def keeping(attention: Any, made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def bias(*args: Any, **kwargs: Any) -> Tensor:
            attention._kdfast_bias = made(*args, **kwargs)
            return attention._kdfast_bias  # type: ignore[no-any-return]

        return bias

    undo_projections = _deberta_projections(model)
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "disentangled_attention_bias")]
    for attention in attentions:
        attention.disentangled_attention_bias = keeping(attention, attention.disentangled_attention_bias)

    def undo() -> None:
        undo_projections()
        for attention in attentions:
            del attention.disentangled_attention_bias

    return undo


# ---- XLNet: scores of content, position and segment ----
def xlnet(model: PreTrainedModel) -> Callable[[], None]:
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
