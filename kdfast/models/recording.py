"""What a forward pass that is read leaves, and how architectures are made to leave it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Record:
    """Layer by layer, of the attention modules in `only` where that is given (of those that tell which they are)."""

    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    bias: list[Tensor] = field(default_factory=list)
    scale: float | None = None
    softcap: float | None = None
    wants_bias: bool = False
    only: Container[nn.Module] | None = None


# What the forward pass that runs leaves; not one that gradient checkpointing repeats: a layer leaves one entry.
_record: Record | None = None


@dataclass(frozen=True)
class Adapter:
    """How an architecture is read.

    install: makes a model record into `record(q, k, v, scale, bias)` and returns what undoes that. cls_index: the token
    that stands for a sequence; None: the last one that counts. causal: whether tokens see only those before them.
    """

    install: Callable[[PreTrainedModel], Callable[[], None]]
    cls_index: int | None = 0
    causal: bool = False


@contextmanager
def recorded(into: Record) -> Iterator[None]:
    """Within it, `record` keeps what it is given there."""
    global _record
    before, _record = _record, into
    try:
        yield
    finally:
        _record = before


def record(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Callable[[], Tensor] | None = None,
    *,
    softcap: float | None = None,
    module: nn.Module | None = None,
) -> None:
    """Keeps a layer's queries, keys and values, [B, H, L, d], for the `Reader` whose forward pass runs.

    Args:
        scale: of their product. A layer with another one than the first has its queries multiplied by what differs.
        bias: makes what is added to the scaled product, [B or 1, H, L, L].
        softcap: c of c · tanh(product / c), which scaled products are bounded by.
        module: the attention; left out where that is of the decoder of a model whose encoder is read.
    """
    if _record is None or (module is not None and _record.only is not None and module not in _record.only):
        return
    if _record.scale is None:
        _record.scale, _record.softcap = scale, softcap
    elif scale != _record.scale:
        q = q * (scale / _record.scale)
    _record.q.append(q)
    _record.k.append(k)
    _record.v.append(v)
    if bias is not None and _record.wants_bias:
        _record.bias.append(bias())
