"""Operators inside the transforms of `torch.func`, and in forward mode.

Outside of these an operator makes its gradients in the forward and scales them in place, which no transform could
follow. Inside, it is a Function whose forward is the operator on plain tensors, and whose backward is the operator's
backward, for which it looks at the tensors again. Both have first derivatives in reverse mode and refuse others; `vmap`
takes the batch one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

Operator = TypeVar("Operator", bound=Callable[..., Any])


def transformable(operator: Operator) -> Operator:
    """A public function that `torch.func` may transform; its first result is differentiated, others are not."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _transformed(operator, args, kwargs) if _is_active() else operator(*args, **kwargs)

    # Code of its own: torch.compile keeps what it has compiled by code, and not much for each.
    call.__code__ = call.__code__.replace(co_name=operator.__name__)
    return cast(Operator, functools.wraps(operator)(call))


def _is_active() -> bool:
    """Whether there is a transform, or a forward-mode level."""
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    )


def _transformed(operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    call = _Call(operator, leaves, spec)
    results = _Value.apply(call, *(x for x in leaves if isinstance(x, Tensor)))
    return pytree.tree_unflatten(results, call.results)


class _Call:
    """An operator and its arguments but for the tensors, which transforms must see."""

    def __init__(self, operator: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.operator, self.name, self.spec = operator, operator.__name__, spec
        self.leaves = [Tensor if isinstance(x, Tensor) else x for x in leaves]
        self.results: Any = None  # the form of the results, once there are some

    def on(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results, flat."""
        rest = iter(tensors)
        leaves = [next(rest) if x is Tensor else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        results, self.results = pytree.tree_flatten(self.operator(*args, **kwargs))
        return tuple(results)


class _Once(torch.autograd.Function):
    """The operator of a _Call and its tensors; without derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        no_double_backward(ctx.call.name)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"{ctx.call.name}: forward-mode differentiation is not available: expected reverse mode, as backward and "
            "torch.func.grad, vjp and jacrev"
        )

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, call: _Call, *inputs: Any) -> tuple[Any, int]:
        if not info.batch_size:
            raise RuntimeError(f"{call.name}: vmap: expected a batch of one or more, got 0")
        leaves, spec = pytree.tree_flatten((call, *inputs))
        dims = pytree.tree_leaves(in_dims)

        def at(i: int) -> Any:
            some = (x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True))
            return cls.apply(*pytree.tree_unflatten(some, spec))

        return pytree.tree_map(lambda *each: torch.stack(each), *map(at, range(info.batch_size))), 0


class _Value(_Once):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return call.on(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(_Gradient.apply(ctx.call, wanted, grad_loss, *ctx.saved_tensors))
        return None, *(next(gradients) if w else None for w in wanted)


class _Gradient(_Once):
    """Gradients of the tensors that are `wanted`: none of a teacher, zeros of which stand for it."""

    @staticmethod
    def forward(  # type: ignore[override]
        call: _Call, wanted: tuple[bool, ...], grad_loss: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
            differentiated = [x for x in inputs if x.requires_grad]
            loss = call.on(inputs)[0]
            if not loss.requires_grad:
                return tuple(map(torch.zeros_like, differentiated))
            return torch.autograd.grad(loss, differentiated, grad_loss, allow_unused=True, materialize_grads=True)


def no_double_backward(op: str) -> NoReturn:
    raise RuntimeError(
        f"{op}: double backward is not available: expected a first derivative, without create_graph=True and of no "
        "gradient"
    )


def is_batched(gradient: Tensor) -> bool:
    """Whether a backward outside of transforms is taken for many gradients at once (`is_grads_batched`)."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)


def refuse_batched(op: str, gradient: Tensor, of: str = "with reduction='none'") -> None:
    if not torch.compiler.is_compiling() and is_batched(gradient):
        raise RuntimeError(f"{op}: batched gradients are not available {of}: expected torch.func.jacrev")
