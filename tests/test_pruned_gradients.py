"""Gradients of layers of which a part lives, where they are added up: in `.grad`, for autograd, and for no one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruned import EVERY, IN, OUT, PARTS, SOME, Call, close, exact, live, made, with_nan
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def accumulated(
    function: Call, kwargs: dict[str, Any], given: list[Tensor], before: Callable[[Tensor], Any]
) -> list[Tensor]:
    """`.grad` of all after two backwards on top of one, `before` called with the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in given[:3]]
    for t in leaves:
        t.grad = torch.full_like(t, 0.5)
    before(leaves[1])
    for factor in (1.0, 2.0):
        function(*leaves, **kwargs).backward(factor * given[3])
    return [t.grad for t in leaves]  # type: ignore[misc]


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "into .grad": lambda w: None,
    "tensor hook": lambda w: w.register_hook(lambda g: 1 * g),
    "hook after accumulation": lambda w: w.register_post_accumulate_grad_hook(lambda p: None),
    "grad of another layout": lambda w: setattr(w, "grad", w.grad.t().contiguous().t()),  # type: ignore[union-attr]
    "fresh": lambda w: setattr(w, "grad", None),
}


@EVERY
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_accumulation(name: str, way: str, dtype: torch.dtype) -> None:
    function, reference, kwargs = PARTS[name]
    given = made(kwargs, dtype)
    got = accumulated(function, kwargs, given, WAYS[way])
    wanted = accumulated(reference, kwargs, [t.double() for t in given], WAYS[way])
    close(got, wanted, 1e-12 if dtype is torch.float64 else 2**-7)
    dead = with_nan(torch.zeros(OUT, IN), *live(kwargs)).isnan()
    assert (got[1][dead] == (0 if way == "fresh" else 0.5)).all()


@SOME
def test_no_gradient_of_the_size_of_the_weight(name: str) -> None:
    """Where there is a .grad already, the very tensor is added to, and autograd gets none."""
    function, _, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs, torch.float32)
    weight.requires_grad_().grad = torch.zeros_like(weight)
    there, seen = weight.grad.data_ptr(), []
    y = function(x.requires_grad_(), weight, bias, **kwargs)
    y.grad_fn.register_hook(lambda inputs, _: seen.append(inputs[1]))  # type: ignore[union-attr]
    y.backward(grad)
    assert seen == [None]
    assert weight.grad.data_ptr() == there
    assert weight.grad.any()


@SOME
def test_autocast_accumulates_in_the_dtype_of_the_weight(name: str) -> None:
    function, reference, kwargs = PARTS[name]
    given = made(kwargs, torch.float32)
    given[3] = given[3].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = (accumulated(f, kwargs, given, WAYS["into .grad"]) for f in (function, reference))
    close(got, [t.double() for t in wanted], 1e-3)


@SOME
def test_only_what_is_asked_for(name: str) -> None:
    """`backward(inputs=)` and `torch.autograd.grad` write no other .grad; what needs no gradient gets none."""
    function, _, kwargs = PARTS[name]
    given = [t.requires_grad_() for t in made(kwargs)[:3]]
    x, weight, _ = given
    grad = made(kwargs)[3]
    for t in given:
        t.grad = torch.zeros_like(t)
    function(*given, **kwargs).backward(grad, inputs=[x])
    assert not weight.grad.any()  # type: ignore[union-attr]
    torch.autograd.grad(function(*given, **kwargs), [weight], grad)
    torch.autograd.grad(function(*given, **kwargs), [x], grad)
    assert not weight.grad.any()  # type: ignore[union-attr]
    function(*given, **kwargs).backward(grad, inputs=[weight])
    assert torch.equal(weight.grad, exact(name, *(t.detach() for t in given), grad)[2])  # type: ignore[arg-type]
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(given)]
        function(*leaves, **kwargs).backward(grad)
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]


@SOME
def test_backward_twice_and_shared_weights(name: str) -> None:
    function, reference, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs)

    def twice(f: Call) -> Tensor:
        w = weight.clone().requires_grad_()
        y = f(x, w, bias, **kwargs) + f(2 * x, w, bias, **kwargs)
        y.backward(grad, retain_graph=True)
        y.backward(3 * grad)
        return w.grad  # type: ignore[return-value]

    close([twice(function)], [twice(reference)], 1e-12)


@SOME
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name: str, reentrant: bool) -> None:
    function, reference, kwargs = PARTS[name]
    x, weight, bias, grad = made(kwargs)

    def run(f: Call) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        for _ in range(2):
            y = checkpoint(lambda *given: f(*given, **kwargs).tanh(), *leaves, use_reentrant=reentrant)
            y.backward(grad)
        return [t.grad for t in leaves]  # type: ignore[misc]

    close(run(function), run(reference), 1e-12)
