"""The modules of a model that `apply` has masked: the same objects, of a class that computes only what lives.

A module takes a class made of its own and one of those here, and gives it back in `restore`. A `forward` set on the
module would do as well, but for the replicas of `nn.DataParallel`, which `transformers.Trainer` makes with several GPUs:
they would compute with the weights of the module it was set on. And `torch.compile` sees that a class is another one.
Names of classes stay, as FSDP and others look for layers by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops._packed import Packed
from kdfast.prune.layers import ADAPTERS, matrix
from kdfast.prune.modules import heads_of, tell_length

_OURS = "_kdfast_is_ours"  # an attribute that classes made here have of their own


class Masked(nn.Module):
    """What masked modules share. One whose class was wrapped since (`fully_shard`) keeps it without its state, and
    computes as it did before."""

    _kdfast_masked: Any = None  # what it keeps

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)
        if _OURS not in vars(type(self)):
            return made
        return (_new, type(self).__bases__, *made[2:])  # its class is not found by its name


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _class(kind: type[Masked], of: type[nn.Module]) -> type[nn.Module]:
    if (kind, of) not in _classes:
        names = {name: getattr(of, name) for name in ("__module__", "__qualname__", "__doc__")}
        _classes[kind, of] = type(of.__name__, (kind, of), {**names, _OURS: True})
    return _classes[kind, of]


def _new(kind: type[Masked], of: type[nn.Module]) -> nn.Module:
    made = _class(kind, of)
    return made.__new__(made)


def mask(module: nn.Module, kind: type[Masked], kept: object) -> None:
    """Makes a module one of a kind, which keeps this."""
    if not isinstance(module, kind):
        object.__setattr__(module, "__class__", _class(kind, type(module)))
    module.__dict__["_kdfast_masked"] = kept


def restore(module: nn.Module) -> None:
    """Makes a module what it was, if it was masked."""
    kept = module.__dict__.pop("_kdfast_masked", None)
    if isinstance(kept, KeptHeads):
        module.__dict__.update(kept.before)
    if _OURS in vars(type(module)):
        object.__setattr__(module, "__class__", type(module).__bases__[1])


# ---- linear maps ----
@dataclass
class KeptPart:
    """Rows and columns of a linear map, and which of the heads that it makes of them follow one another."""

    packed: Packed
    repeat: tuple[int, ...] | None
    head_size: int


class MaskedMap(Masked):
    """A linear map."""

    def forward(self, x: Tensor) -> Tensor:
        kept: KeptPart | None = self._kdfast_masked
        if kept is None:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        made = kept.packed(x, matrix(self), self.bias)  # type: ignore[arg-type]
        if not made.shape[-1] or not x.shape[-1]:
            return _with_unused(made, self, x)  # type: ignore[no-any-return]
        if kept.repeat is None:
            return made
        # by numbers, not by a tensor of them: nothing that would have to follow the model to its device
        heads = made.unflatten(-1, (-1, kept.head_size)).unbind(-2)
        return torch.cat([heads[i] for i in kept.repeat], -1)

    def extra_repr(self) -> str:
        kept: KeptPart | None = self._kdfast_masked
        live = () if kept is None else (("rows", kept.packed.rows), ("columns", kept.packed.columns))
        shown = [super().extra_repr(), *(f"{name}={len(of)}" for name, of in live if of is not None)]
        return ", ".join(filter(None, shown))


def live_part(linear: nn.Module, of_input: bool) -> Tensor | None:
    """Which features a linear map gets, or makes, that is masked; None: the first of them, mostly all."""
    linear = getattr(linear, "base_layer", linear)  # below an adapter of peft
    kept = getattr(linear, "_kdfast_masked", None)
    return (kept.packed.columns if of_input else kept.packed.rows) if isinstance(kept, KeptPart) else None


# ---- attention ----
@dataclass
class KeptHeads:
    """Heads of an attention module. per_head: arguments of its forward that have all heads in dimension 1, with their
    places. before: attributes that were changed, as they were."""

    model_type: str
    heads: tuple[int, ...]
    per_head: dict[str, int]
    before: dict[str, Any]


class MaskedAttention(Masked):
    """An attention module: its maps make and take the heads that live."""

    @property
    def live_heads(self) -> tuple[int, ...] | None:
        """The numbers of the heads that live; None: all."""
        return None if self._kdfast_masked is None else self._kdfast_masked.heads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept: KeptHeads | None = self._kdfast_masked
        if kept is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not kept.heads:
            hidden = args[0] if args else kwargs["hidden_states"]
            tell_length((*args, *kwargs.values()), getattr(self, "layer_idx", None), hidden)
            made = ADAPTERS[kept.model_type].without_heads(self, hidden, hidden.new_empty(*hidden.shape[:-1], 0))
            return _with_unused(made, self, hidden)
        for name, place in kept.per_head.items():
            if place < len(args):
                args = (*args[:place], heads_of(args[place], kept.heads), *args[place + 1 :])
            elif name in kwargs:
                kwargs = {**kwargs, name: heads_of(kwargs[name], kept.heads)}
        return super().forward(*args, **kwargs)  # type: ignore[misc]


# ---- layers ----
@dataclass
class Passing:
    """How a dropped layer passes on. number: of its keys and values in a cache, None where it has none."""

    returns_tuple: bool
    number: int | None


class DroppedLayer(Masked):
    """A layer that passes on what it gets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept: Passing | None = self._kdfast_masked
        if kept is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden = args[0] if args else kwargs["hidden_states"]
        tell_length((*args, *kwargs.values()), kept.number, hidden)
        return _with_unused((hidden, None) if kept.returns_tuple else hidden, self)


# ---- parameters that nothing is computed with ----
def _with_unused(made: Any, module: nn.Module, *given: Tensor) -> Any:
    """What a module made, or passed on, with its parameters, and what it was given, taking part in the backward, without a
    gradient there: DDP waits for all that may get one, on every rank."""
    unused = [x for x in (*given, *module.parameters()) if x.requires_grad]
    if not torch.is_grad_enabled() or not unused:
        return made
    if isinstance(made, tuple):
        return (_TakePart.apply(made[0], *unused), *made[1:])
    return _TakePart.apply(made, *unused)


class _TakePart(torch.autograd.Function):
    """The identity on the first argument; the others get no gradient, but are reached by the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = len(unused)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, *[None] * ctx.unused
