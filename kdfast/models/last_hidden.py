"""A language model up to its logits: last hidden states and output embeddings, for `kdfast.linear_kd_loss`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdfast.models.finish import Finish, capped, probes, seen
from kdfast.models.head import OwnHead, plain, product
from kdfast.models.router import router_loss
from kdfast.ops._checks import kind
from kdfast.ops._shards import is_dtensor


class LastHidden(NamedTuple):
    """What a model's logits are made of: softcap · tanh((hidden weightᵀ + bias) / softcap),
    without softcap if it is None.

    hidden: [B, L, H], times the scale of the logits where the model has one (Cohere, Granite). weight: [V, H], bias:
    [V] or None: the model's parameters, DTensors where FSDP2 has them sharded. All in the dtype that the model
    multiplies them in, under autocast that of autocast.

    head: in place of weight and bias, where the output embeddings are no plain product (an adapter, a quantised weight,
    a forward of their own): makes float32 logits of hidden states.

    router_loss: of a mixture of experts, weighted as in its own loss; None where it computes none. aligned: whether
    logits are those of the same place's label (encoder-decoders) and not of the next token's.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    head: OwnHead | None = None
    router_loss: Tensor | None = None
    aligned: bool = False

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0] if self.head is None else self.head.vocabulary  # type: ignore[union-attr]

    def make_logits(self, hidden: Tensor | None = None) -> Tensor:
        """Logits [..., V] of these hidden states [..., H], by default all: float32 (float64 for float64)."""
        hidden = self.hidden if hidden is None else hidden
        if self.head is not None:
            return capped(self.head(hidden), self.softcap)
        assert self.weight is not None
        bias = None if self.bias is None else _whole(self.bias)
        return capped(product(hidden, _whole(self.weight), bias), self.softcap)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# What models were seen to do to their logits, whether hooks keep their output embeddings from being a plain product,
# and in which state.
_seen: WeakKeyDictionary[nn.Module, tuple[Any, Finish, bool]] = WeakKeyDictionary()


def _state(inner: Any, head: nn.Module) -> tuple[Any, ...]:
    """While it is the same, what was seen holds: hooks, and the numbers and tensors that the model and its config hold
    themselves. load_state_dict changes tensors too. Nothing waits for the device."""
    within = [inner.get_base_model()] if hasattr(inner, "get_base_model") else []
    modules = [inner, *within, *([inner._orig_mod] if hasattr(inner, "_orig_mod") else [])]  # of torch.compile
    config = getattr(inner, "config", None)
    configs = [config, *(x for x in _own(config).values() if hasattr(x, "get_text_config"))]
    numbers = [
        (place, name, value)
        for place, holder in enumerate([*modules, *configs])
        for name, value in _own(holder).items()
        if isinstance(value, (int, float))
    ]
    held = [x for m in modules for x in (*m.buffers(recurse=False), *m.parameters(recurse=False), *vars(m).values())]
    tensors = [(id(x), _version(x)) for x in held if isinstance(x, Tensor)]
    hooks = [(*m._forward_pre_hooks, *m._forward_hooks) for m in head.modules()]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return id(head), hooks, numbers, tensors, modes


def _own(x: Any) -> dict[str, Any]:
    return getattr(x, "__dict__", {})


def _version(x: Tensor) -> int:
    """Other after each change in place, but that of a tensor of inference mode, which has none."""
    return 0 if x.is_inference() else x._version


def last_hidden(model: nn.Module, **inputs: Any) -> LastHidden:
    """Runs a language model of transformers without the logits, of which it makes one row.

    `model(**inputs)` is called as it is, so DDP and FSDP2 do their work around it. For that call the hidden states join
    what it returns: DDP looks there for parameters that the loss does not reach, FSDP2 for where the backward begins.

    Args:
        model: one with output embeddings, plain or wrapped by DistributedDataParallel or `fully_shard`, with adapters
            of peft or without.
        **inputs: arguments of its forward; no labels, which would make it compute a loss of its own.

    Raises:
        TypeError: the model has no output embeddings.
        ValueError: it does more to its logits than a scale, a constant bias and a soft-cap; or its output embeddings
            are no plain product, and sharded.
    """
    inner = language_model(model)
    call = _Call(inner, inner.get_output_embeddings())
    with call.hooked():
        outputs = model(**inputs, use_cache=False)
    return call.result(outputs["hidden"], outputs.get("router_loss"))


def language_model(model: nn.Module) -> Any:
    """The model inside wrappers that has output embeddings.

    Raises:
        TypeError: there is none.
    """
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"kdfast: model: expected one with output embeddings, got {type(inner).__name__}")
    return inner


def _outside_graphs(function: Callable[[Any], Any], of: Any) -> Any:
    """`function(of)`, which asks for values. `torch.compiler.disable` as a decorator would import the compiler, which
    takes a second, with kdfast."""
    return torch.compiler.disable(function)(of) if torch.compiler.is_compiling() else function(of)


class _Call:
    """Watches a model's output embeddings, `head`, in one forward of one row, while the hidden states go past."""

    def __init__(self, inner: Any, head: nn.Module) -> None:
        self.inner, self.head, self.sharded = inner, head, hasattr(head, "reshard")  # by FSDP2, in a group of its own
        self.state = _state(inner, head)
        known, self.finish, self.disguised = _seen.get(inner, (None, Finish(), False))
        self.checked = known == self.state
        self.hidden: list[Tensor] = []
        self.makers: list[tuple[nn.Module, Tensor, int]] = []
        self.autocast: dict[str, Any] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        head = self.head
        # FSDP2's own hooks run between those that are prepended and those that are not, and look for tensors in
        # outputs: it gathers parameters again when the gradient of one arrives. Other hooks change what they like:
        # between ours.
        handles = [head.register_forward_pre_hook(self.one_row, prepend=not self.sharded)]
        if self.sharded:
            handles.append(head.register_forward_hook(lambda _, __, row: (row, self.hidden[-1]), prepend=True))
        handles += [m.register_forward_hook(self.keep, prepend=True) for m in head.modules() if plain(m)]
        handles.append(head.register_forward_hook(self.after_head))
        handles.append(self.inner.register_forward_hook(self.after_model, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def one_row(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or self.hidden:
            got = "another call" if self.hidden else [*hidden.shape] if isinstance(hidden, Tensor) else kind(hidden)
            expected = "one call of its output embeddings with hidden states [batch, length, size]"
            raise ValueError(f"kdfast: {self.name}: expected {expected}, got {got}")
        device = hidden.device.type
        self.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        self.hidden.append(hidden)
        self.given = hidden[:1, :1].clone()  # hooks may write to it
        return (self.given,)

    def keep(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if arguments[0] is self.given and _version(self.given) == 0:
            self.makers.append((module, output, _version(output)))

    def after_head(self, _: nn.Module, __: tuple[Tensor, ...], output: Any) -> Tensor:
        self.row: Tensor = output[0] if self.sharded else output
        # The product whose result this is, unchanged; an adapter's sum, or what another hook has changed, is none's.
        found = [module for module, made, version in self.makers if made is self.row and _version(made) == version]
        self.maker: Any = found[0] if found else None
        if not self.checked:
            self.disguised = self.maker is not None and not _outside_graphs(self.is_product, self.maker)
        if self.disguised:
            self.maker = None
        self.passed = self.row.detach() if self.checked else probes(self.row)
        return self.passed.clone()  # the model may write to it

    def is_product(self, maker: Any) -> bool:
        """Hooks may have written where versions do not tell (inference mode, `.data`), or put another weight in for the
        time of the product. Of shards that cannot be asked."""
        if is_dtensor(maker.weight):
            return True
        with torch.no_grad(), torch.autocast(**self.autocast):
            made = product(self.hidden[0][:1, :1], maker.weight, maker.bias).to(self.row.dtype)
        near = 1e-3 if made.dtype in (torch.float32, torch.float64) else 0.02
        largest = float(made.nan_to_num(0, 0, 0).abs().max())
        return torch.allclose(self.row, made, near, near * largest, equal_nan=True)

    def after_model(self, _: nn.Module, __: tuple[Any, ...], outputs: Any) -> dict[str, Tensor]:
        if not self.hidden or not hasattr(outputs, "logits"):
            got = f"{type(outputs).__name__} without them" if self.hidden else "no call of these"
            raise ValueError(f"kdfast: {self.name}: expected logits of its output embeddings, got {got}")
        if not self.checked:
            _outside_graphs(self.look, outputs.logits)
        router = router_loss(self.inner, outputs)
        # The row, for parameters that only the loss reaches.
        return {"hidden": self.hidden[0], "row": self.row} | ({} if router is None else {"router_loss": router})

    def look(self, logits: Tensor) -> None:
        finish = seen(self.passed, logits)
        if finish is None:
            raise ValueError(
                f"kdfast: {self.name}: expected logits that are those of its output embeddings but for a scale, a "
                "constant bias and a soft-cap, got others"
            )
        self.finish = finish
        _seen[self.inner] = self.state, finish, self.disguised

    def result(self, hidden: Tensor, router: Tensor | None) -> LastHidden:
        """Only after the forward: FSDP2 may then have put shards in place of the parameters that it used."""
        finish, maker = self.finish, self.maker
        if finish.added is not None:  # seen before the model was moved, perhaps
            finish = finish._replace(added=finish.added.to(self.row.device))
        config = getattr(self.inner, "config", None)
        others: Any = {"router_loss": router, "aligned": bool(getattr(config, "is_encoder_decoder", False))}
        if maker is None:
            head = OwnHead(self.head, self.row.shape[-1], finish._replace(softcap=None), self.autocast, self.name)
            return LastHidden(hidden, None, None, finish.softcap, head, **others)
        if finish.scale != 1:
            hidden = hidden * finish.scale
        bias = finish.bias(maker.bias)
        # Autocast, and FSDP2's mixed precision, multiply in another dtype than that of the parameters.
        dtype = self.row.dtype
        hidden, weight, bias = hidden.to(dtype), maker.weight.to(dtype), None if bias is None else bias.to(dtype)
        return LastHidden(hidden, weight, bias, finish.softcap, **others)

    @property
    def name(self) -> str:
        return type(self.inner).__name__
