"""Every operator inside the transforms of `torch.func` and in forward mode: the values of plain torch, or one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import inputs
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import kdfast
from kdfast.bench.registry import OPERATORS, Operator, Sample
from kdfast.bench.registry.operator import apply, mapped, tensors

TRAINED = ("projection", "bias", "student_bias")
NO_SECOND = "double backward is not available: expected a first derivative"
NO_FORWARD = "forward-mode differentiation is not available: expected reverse mode"


def of_each_reduction(operator: Operator) -> dict[str, Sample]:
    """The last sample of every reduction, which is none of the large ones, and one with trained parameters."""
    found = {}
    for sample in operator.samples:
        kwargs = sample.kwargs(torch.Generator().manual_seed(0))
        trained = any(name in kwargs for name in TRAINED)
        found["trained" if trained else kwargs.get("reduction", "mean")] = sample
    return found


EVERY = pytest.mark.parametrize("operator", [pytest.param(operator, id=name) for name, operator in OPERATORS.items()])
OF_EACH = [
    pytest.param(operator, sample, id=f"{name}-{reduction}")
    for name, operator in OPERATORS.items()
    for reduction, sample in of_each_reduction(operator).items()
]
EACH = pytest.mark.parametrize(("operator", "sample"), OF_EACH)
NONE = pytest.mark.parametrize(("operator", "sample"), [case for case in OF_EACH if case.id.endswith("-none")])


def losses(operator: Operator, sample: Sample) -> tuple[Any, Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """What is trained, in float64; the operator's loss of it, and the reference's."""
    student, teacher, kwargs = inputs(sample, 1.0, torch.float64, torch.float64)
    trained = {name: kwargs.pop(name).double() for name in TRAINED if name in kwargs}

    def loss_of(function: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
        return lambda x: apply(function, x["student"], teacher, **kwargs, **x["parameters"])

    return {"student": student, "parameters": trained}, loss_of(operator.function), loss_of(operator.reference)


def in_eager(function: Callable[[Any], Tensor], at: Any, upstream: Tensor | None = None) -> list[Tensor]:
    at = mapped(lambda x: x.detach().requires_grad_(), at)
    return list(torch.autograd.grad(function(at), tensors(at), upstream))


def close(got: list[Tensor], exact: list[Tensor]) -> None:
    assert any(x.any() for x in exact), "zeros would pass"
    for ours, wanted in zip(got, exact, strict=True):
        assert float((ours - wanted).norm()) <= 1e-9 * float(wanted.norm())


# ---- values ----
@EACH
def test_vjp(operator: Operator, sample: Sample) -> None:
    """And again: nothing that is kept is scaled."""
    at, ours, reference = losses(operator, sample)
    value, pull = torch.func.vjp(ours, at)
    exact = reference(at)
    close([value], [exact])
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    for _ in range(2):
        close(tensors(pull(upstream)), in_eager(reference, at, upstream))


@EVERY
def test_grad(operator: Operator) -> None:
    at, ours, reference = losses(operator, operator.samples[0])
    gradients, value = torch.func.grad_and_value(lambda x: ours(x).sum())(at)
    exact = in_eager(lambda x: reference(x).sum(), at)
    close([value, *tensors(gradients)], [reference(at).sum(), *exact])


@NONE
def test_jacrev(operator: Operator, sample: Sample) -> None:
    at, ours, reference = losses(operator, sample)
    values = reference(at)
    rows = torch.eye(values.numel(), dtype=values.dtype).reshape(-1, *values.shape)
    by_row = [in_eager(reference, at, row) for row in rows]
    exact = [torch.stack(x).reshape(*values.shape, *x[0].shape) for x in zip(*by_row, strict=True)]
    close(tensors(torch.func.jacrev(ours)(at)), exact)


def batch_of(x: Any) -> Any:
    return mapped(lambda x: torch.stack((x, 0.5 * x, 0.2 * x)), x)


def one_of(batch: Any, i: int) -> Any:
    return mapped(lambda x: x[i], batch)


@EACH
def test_vmap_of_the_operator_and_of_its_gradient(operator: Operator, sample: Sample) -> None:
    at, ours, _ = losses(operator, sample)
    batch = batch_of(at)
    each = [ours(one_of(batch, i)) for i in range(3)]
    assert torch.equal(torch.func.vmap(ours)(batch), torch.stack(each))
    gradients = tensors(torch.func.vmap(torch.func.grad(lambda x: ours(x).sum()))(batch))
    exact = [in_eager(lambda x: ours(x).sum(), one_of(batch, i)) for i in range(3)]
    close(gradients, [torch.stack(x) for x in zip(*exact, strict=True)])
    # Differentiated from outside, by a transform and in eager.
    total = lambda x: torch.func.vmap(ours)(x).sum()  # noqa: E731
    close(tensors(torch.func.grad(total)(batch)), gradients)
    close(in_eager(total, batch), gradients)


def test_vmap_over_arguments_of_every_kind() -> None:
    """Other dimensions than the first, labels and masks of each, some arguments shared, nested."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, 9, generator=generator) for _ in range(2))
    labels = torch.randint(9, (4, 6), generator=generator)
    labels[0, 1] = -100
    mask = torch.rand(4, generator=generator) < 0.5

    def loss(s: Tensor, t: Tensor, hard: Tensor, counted: Tensor) -> Any:
        return kdfast.kd_loss(s, t, hard, mask=counted, return_components=True)

    got = torch.func.vmap(torch.func.vmap(loss), in_dims=(1, None, 0, 0))(student, teacher[:, 0], labels, mask[:, None].expand(4, 6))  # fmt: skip
    assert isinstance(got, kdfast.KDLossComponents)
    for i in range(4):
        for j in range(6):
            wanted = loss(student[j, i], teacher[j, 0], labels[i, j], mask[i])
            assert [x[i, j].item() for x in got] == [x.item() for x in wanted]
    assert all(x.any() for x in got)


def test_gradients_of_every_example() -> None:
    """What `torch.func` is used for: a model's parameters, one gradient per row."""
    model, x, teacher = nn.Linear(5, 7), torch.randn(6, 5), torch.randn(6, 7)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor, of_teacher: Tensor) -> Tensor:
        return kdfast.kl_div(torch.func.functional_call(model, parameters, row), of_teacher)

    detached = {name: p.detach() for name, p in parameters.items()}
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(detached, x, teacher)
    for i in range(6):
        exact = torch.autograd.grad(kdfast.kl_div(model(x[i]), teacher[i]), list(parameters.values()))
        assert exact[0].any()
        torch.testing.assert_close([g[i] for g in got.values()], list(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype: torch.dtype) -> None:
    """float16 gradients of a mean do not underflow here either."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4096, 8, generator=generator).to(dtype) for _ in range(2))
    _, pull = torch.func.vjp(lambda s: kdfast.kl_div(s, teacher), student)
    (gradient,) = pull(torch.tensor(2.0**12))
    exact = in_eager(lambda s: kdfast.kl_div(s, teacher, reduction="sum"), student)[0]
    assert gradient.dtype == dtype
    assert exact.any()
    torch.testing.assert_close(gradient, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 4, 9)
    alone = torch.func.grad(lambda t: kdfast.kl_div(student, t))(teacher)
    both = torch.func.grad(kdfast.kl_div, argnums=(0, 1))(student, teacher)
    assert not alone.any()
    assert not both[1].any()
    torch.testing.assert_close(both[0], in_eager(lambda s: kdfast.kl_div(s, teacher), student)[0])


@pytest.mark.parametrize("argument", ["weight", "temperature"])
def test_what_is_not_differentiated_is_refused(argument: str) -> None:
    student, teacher = torch.randn(2, 4, 9)
    with pytest.raises(ValueError, match=f"kl_div: {argument}: expected a tensor without gradient"):
        torch.func.grad(lambda x: kdfast.kl_div(student, teacher, **{argument: x}))(torch.ones(4))


def test_compiled() -> None:
    """Transforms of compiled code, and compiled transforms."""
    student, teacher = torch.randn(2, 4, 9)
    (exact,) = in_eager(lambda s: kdfast.kl_div(s, teacher), student)
    compiled = lambda function: torch.compile(function, backend="aot_eager")  # noqa: E731
    for gradient in (compiled(torch.func.grad(kdfast.kl_div)), torch.func.grad(compiled(kdfast.kl_div))):
        close([gradient(student, teacher)], [exact])
    each = kdfast.kl_div(student, teacher, reduction="none")
    for values in (compiled(torch.func.vmap(kdfast.kl_div)), torch.func.vmap(compiled(kdfast.kl_div))):
        torch.testing.assert_close(values(student, teacher), each)
    with pytest.raises(RuntimeError, match=f"kl_div: {NO_FORWARD}"):
        compiled(lambda x: torch.func.jvp(lambda s: kdfast.kl_div(s, teacher), (x,), (x,)))(student)


# ---- errors ----
@EACH
def test_forward_mode_is_refused(operator: Operator, sample: Sample) -> None:
    at, ours, _ = losses(operator, sample)
    refused = pytest.raises(RuntimeError, match=f"^{operator.name}: {NO_FORWARD}")
    with refused:
        torch.func.jvp(ours, (at,), (at,))
    with refused:
        torch.func.jvp(torch.func.grad(lambda x: ours(x).sum()), (at,), (at,))
    for needs in (False, True):
        with forward_ad.dual_level():
            dual = mapped(lambda x: forward_ad.make_dual(x.detach().requires_grad_(needs), torch.ones_like(x)), at)  # noqa: B023
            with refused:
                ours(dual)
            with torch.no_grad(), refused:
                ours(dual)


@EVERY
def test_second_derivatives_are_refused(operator: Operator) -> None:
    at, of_each, _ = losses(operator, operator.samples[0])
    ours = lambda x: of_each(x).sum()  # noqa: E731
    refused = pytest.raises(RuntimeError, match=f"^{operator.name}: {NO_SECOND}")

    def squares(x: Any) -> Tensor:
        return sum(g.square().sum() for g in tensors(torch.func.grad(ours)(x)))  # type: ignore[return-value]

    with refused:
        torch.func.grad(squares)(at)
    with refused:  # beside something that has one: no silent part of a sum
        torch.func.grad(lambda x: squares(x) + tensors(x)[0].square().sum())(at)
    with refused:
        torch.func.vjp(torch.func.grad(ours), at)[1](at)
    with refused:
        needs = mapped(lambda x: x.detach().requires_grad_(), at)
        torch.autograd.grad(ours(needs), tensors(needs), create_graph=True)


def test_a_hessian_is_refused() -> None:
    student, teacher = torch.randn(2, 4, 9)
    with pytest.raises(RuntimeError, match=f"kl_div: {NO_FORWARD}"):
        torch.func.hessian(kdfast.kl_div)(student, teacher)
    with pytest.raises(RuntimeError, match=f"kl_div: {NO_SECOND}"):
        torch.autograd.functional.hessian(lambda s: kdfast.kl_div(s, teacher), student)


def test_eager_beside_a_forward_mode_level() -> None:
    """What has no tangent is as it is."""
    student, teacher = torch.randn(2, 4, 9)
    exact = in_eager(lambda s: kdfast.kl_div(s, teacher), student)
    with forward_ad.dual_level():
        close(in_eager(lambda s: kdfast.kl_div(s, teacher), student), exact)


@EACH
def test_batched_gradients(operator: Operator, sample: Sample) -> None:
    """`is_grads_batched`, which torch.autograd.functional.jacobian(vectorize=True) asks for."""
    at, ours, _ = losses(operator, sample)
    at = mapped(lambda x: x.detach().requires_grad_(), at)
    value = ours(at)
    upstream = torch.linspace(-1, 2, 3 * value.numel(), dtype=value.dtype).reshape(3, *value.shape)
    batched = lambda: torch.autograd.grad(value, tensors(at), upstream, is_grads_batched=True)  # noqa: E731
    if value.dim() and operator.native[:1] != ("divergence",):
        with pytest.raises(RuntimeError, match=f"^{operator.name}: batched gradients are not available .*jacrev"):
            batched()
        return
    exact = [in_eager(ours, at, of) for of in upstream]
    close(list(batched()), [torch.stack(x) for x in zip(*exact, strict=True)])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="kl_div: vmap: expected a batch of one or more, got 0"):
        torch.func.vmap(kdfast.kl_div)(torch.zeros(0, 3, 5), torch.zeros(0, 3, 5))


def test_names_and_signatures_stay() -> None:
    """The wrapper shows what is documented, inspected and pickled."""
    import inspect

    for name, operator in OPERATORS.items():
        assert operator.function.__name__ == name
        assert operator.product or "reduction" in inspect.signature(operator.function).parameters
        assert pytree.tree_leaves(operator.function) == [operator.function]
