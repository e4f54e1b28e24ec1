"""What stands in smaller models where the architecture's own modules do not fit: keys and values that different numbers
of heads read, and parts of which nothing is left."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

if TYPE_CHECKING:
    from kdfast.prune.layers import Adapter


class RepeatedHeads(nn.Linear):
    """A linear map to groups of keys or values, some of which follow one another more than once, so that the same number
    of heads reads each: [..., in] -> [..., repeated · head size], at place i group repeat[i]. LoRA of peft does not go on
    it, as it adds what it makes to what is repeated already.

    The numbers are in the config on disk (`kdfast.prune.disk`), not in the state, which is that of `nn.Linear`.
    """

    repeat: tuple[int, ...]
    head_size: int

    def forward(self, x: Tensor) -> Tensor:
        groups = F.linear(x, self.weight, self.bias).unflatten(-1, (-1, self.head_size)).unbind(-2)
        return torch.cat([groups[i] for i in self.repeat], -1)  # where index_select's backward adds in any order

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, repeat={self.repeat}"


def repeat_heads(linear: Any, repeat: tuple[int, ...] | None, head_size: int) -> None:
    """Makes a linear map one that repeats heads, or one that does not, with the same parameters and hooks."""
    if repeat is not None:
        linear.__class__ = RepeatedHeads
        linear.repeat, linear.head_size = repeat, head_size
    elif isinstance(linear, RepeatedHeads):
        del linear.repeat, linear.head_size
        linear.__class__ = nn.Linear  # type: ignore[assignment]


class Nothing(nn.Module):
    """A linear map of which no row is left: [..., in] -> [..., 0]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], 0)


class OnlyBias(nn.Module):
    """A linear map of which no column is left: [..., 0] -> [..., out], its bias, or zeros where it has none."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.register_parameter("bias", linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.bias.expand(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, bias={self.bias is not None}"


class _Asked:
    """An attention module that notes which of its attributes are asked for."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention, self.found = attention, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        self.found[name] = getattr(self.attention, name)
        return self.found[name]


class WithoutHeads(nn.Module):
    """An attention module of which no head is left: what its class does with the heads' outputs, here of width 0.

    It holds what `adapter.without_heads` asks for of the attention module, and tells the cache of keys and values how
    long the sequence is, which transformers asks it of the first layer.
    """

    def __init__(self, attention: nn.Module, adapter: Adapter, head_size: int, width: int) -> None:
        super().__init__()
        asked, like = _Asked(attention), next(attention.parameters())
        hidden = like.new_zeros(1, 1, width)
        adapter.without_heads(asked, hidden, hidden.new_empty(1, 1, 0))
        for name, value in asked.found.items():
            setattr(self, name, value)
        self.without_heads = adapter.without_heads
        self.head_dim, self.layer_idx = head_size, getattr(attention, "layer_idx", None)
        self.train(attention.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        tell_length((*args, *kwargs.values()), self.layer_idx, hidden)
        return self.without_heads(self, hidden, hidden.new_empty(*hidden.shape[:-1], 0))


def tell_length(arguments: tuple[Any, ...], layer: int | None, hidden: Tensor) -> None:
    """Gives a cache of keys and values, where one is among an attention's or a layer's arguments, a key and a value of
    zero for every token: transformers asks its layers, most often the first, how many tokens they have seen.

    Args:
        layer: its number in the cache; None: it has none. hidden: [B, L, D].
    """
    cache: Any = next((x for x in arguments if isinstance(x, Cache)), None)
    if cache is not None and layer is not None:
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        getattr(cache, "self_attention_cache", cache).update(nothing, nothing, layer)


def of_own_heads(attention: Any, arguments: tuple[str, ...], heads: tuple[int, ...]) -> None:
    """Lets an attention module that gets arguments with all heads of the full model in dimension 1, a bias of positions
    say, take what is its own heads'. heads: their numbers there."""
    if not hasattr(attention, "own_heads"):
        names = list(inspect.signature(type(attention).forward).parameters)[1:]  # without self
        places = {name: names.index(name) for name in arguments}
        attention.register_forward_pre_hook(partial(_select, places), with_kwargs=True)
    attention.own_heads = heads


def _select(
    places: dict[str, int], attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for name, place in places.items():
        if name in kwargs:
            kwargs = {**kwargs, name: heads_of(kwargs[name], attention.own_heads)}
        elif place < len(args):
            args = (*args[:place], heads_of(args[place], attention.own_heads), *args[place + 1 :])
    return args, kwargs


def heads_of(given: Tensor | None, heads: tuple[int, ...]) -> Tensor | None:
    """Some of the heads, in dimension 1."""
    if given is None:
        return None
    every = given.unbind(1)
    return torch.stack([every[i] for i in heads], 1)
