"""Functions and their settings as modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accuracy import inputs, value_and_gradient
from torch import Tensor

import kdfast
from kdfast.bench.registry import OPERATORS, Operator
from kdfast.bench.registry.divergences import DIVERGENCES
from kdfast.bench.registry.linear import LINEAR
from kdfast.bench.registry.operator import apply

BY_OPERATOR = [pytest.param(operator, id=name) for name, operator in OPERATORS.items() if not operator.product]
S, T = torch.randn(5, 7), torch.randn(5, 7)


@pytest.mark.parametrize("operator", BY_OPERATOR)
def test_module_equals_function(operator: Operator) -> None:
    student, teacher, _ = inputs(operator.samples[0], 1.0, torch.float32, torch.float32)
    settings: dict[str, Any] = {"reduction": "sum"}
    settings |= {"temperature": 2.0} if operator.name in DIVERGENCES | LINEAR else {}
    settings |= {"alpha": 1.0} if operator.name.endswith("kd_loss") else {}
    expected = value_and_gradient(operator.function, student, teacher, settings)
    assert expected[0] != apply(operator.function, student, teacher, **settings | {"reduction": "mean"})
    for module in (kdfast.nn.Loss(operator.name, **settings), kdfast.nn.Loss(operator.function, **settings)):
        for got, wanted in zip(value_and_gradient(module, student, teacher, {}), expected, strict=True):
            assert wanted.any()
            assert torch.equal(got, wanted)
        assert repr(module) == f"Loss({', '.join([operator.name, *(f'{k}={v!r}' for k, v in settings.items())])})"


@pytest.mark.parametrize("operator", BY_OPERATOR)
def test_a_misspelt_argument(operator: Operator) -> None:
    """A function and a module name the same operator, argument and known ones."""
    student, teacher, _ = inputs(operator.samples[0], 1.0, torch.float32, torch.float32)
    with pytest.raises(TypeError, match=f"^{operator.name}: arguments: expected some of .*reduction.*, got reducton$"):
        kdfast.nn.Loss(operator.name, reducton="sum")
    with pytest.raises(TypeError, match="reducton"):
        apply(operator.function, student, teacher, reducton="sum")


@pytest.mark.parametrize("name", [*DIVERGENCES, *LINEAR])
def test_a_function_of_shared_options_names_what_it_knows(name: str) -> None:
    known = "temperature, mask, weight, vocab_size, reduction, num_items, process_group, vocab_start"
    function: Any = getattr(kdfast, name)
    given = (S, T, S.long()) if name == "topk_kl_div" else (S, T, S, T) if name in LINEAR else (S, T)
    with pytest.raises(TypeError, match=f"^{name}: arguments: expected some of .*{known}.*, got temprature$"):
        function(*given, temprature=2.0)


def test_call_goes_before_the_settings() -> None:
    module = kdfast.nn.Loss("js_div", beta=0.3, temperature=2.0)
    assert torch.equal(module(S, T), kdfast.js_div(S, T, beta=0.3, temperature=2.0))
    mask = torch.tensor([True, False, True, True, False])
    got = module(S, T, mask=mask, temperature=3.0)
    assert torch.equal(got, kdfast.js_div(S, T, beta=0.3, temperature=3.0, mask=mask))
    assert got != module(S, T)


def test_tensors_are_buffers() -> None:
    """They move with the module, which has no state; what launches take as numbers stays with the host."""
    rows, weight = torch.linspace(1, 3, 5), torch.linspace(0.5, 2, 5)
    module = kdfast.nn.Loss(kdfast.kl_div, temperature=rows, weight=weight)
    assert torch.equal(module(S, T), kdfast.kl_div(S, T, temperature=rows, weight=weight))
    assert {name for name, _ in module.named_buffers()} == {"temperature", "weight"}
    assert not module.state_dict()
    assert not list(module.parameters())
    assert "temperature=[5]" in repr(module)
    assert all(x.is_meta for _, x in copy.deepcopy(module).to("meta").named_buffers())
    assert module.double()(S.double(), T.double()).dtype == torch.float64
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(S, T), module(S, T))
    layers = [torch.randn(2, 3, 4) for _ in range(4)]
    module = kdfast.nn.Loss("hidden_mse", layer_weight=torch.tensor([1.0, 3.0]))
    assert not list(module.buffers())
    assert torch.equal(module(layers[:2], layers[2:]), kdfast.hidden_mse(layers[:2], layers[2:], layer_weight=[1, 3]))


def test_projection_is_trained() -> None:
    module = kdfast.nn.HiddenMSELoss(4, 6, reduction="sum", separate=2)
    student, teacher = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 6) for _ in range(2)]
    loss = module(student, teacher)
    projected = [linear(s) for linear, s in zip(module.projections, student, strict=True)]
    expected = sum(((s - t) ** 2).sum() for s, t in zip(projected, teacher, strict=True))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(list(module.parameters())) == 4
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


W = torch.randn(6, 4, requires_grad=True)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: kdfast.nn.Loss("foo"), ValueError, "Loss: function: expected a function of kdfast, or its name, got 'foo'"),
    (lambda: kdfast.nn.Loss("nn"), ValueError, "Loss: function: expected a function of kdfast"),
    (lambda: kdfast.nn.Loss("kl_div", beta=0.3), TypeError, "kl_div: arguments: expected some of temperature, .*, got beta"),
    (lambda: kdfast.nn.Loss("kd_loss", divergence="foo"), ValueError, "kd_loss: divergence: expected one of kl_div"),
    (lambda: kdfast.nn.Loss("skew_kl_div", skew=2.0), ValueError, "skew_kl_div: skew: expected a number from 0 to 1"),
    (lambda: kdfast.nn.Loss("kl_div", reduction="average"), ValueError, "kl_div: reduction: expected 'none'"),
    (lambda: kdfast.nn.Loss("kd_loss", temperature=-1), ValueError, "kd_loss: temperature: expected a finite number > 0, got -1"),
    (lambda: kdfast.nn.Loss("topk_kl_div", tail="cut"), ValueError, "topk_kl_div: tail: expected 'bucket'"),
    (lambda: kdfast.nn.Loss("hidden_mse", projection=W), ValueError, "hidden_mse: projection: expected a tensor without gradient"),
    (lambda: kdfast.nn.Loss("hidden_mse", projection=[W]), ValueError, "hidden_mse: projection: .*, got a list of tensors"),
    (lambda: kdfast.nn.HiddenMSELoss(4), ValueError, "HiddenMSELoss: student_size, teacher_size: expected both or neither"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[b[2][:50] for b in BAD])
def test_refuses(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"^{match}"):
        call()


def test_options_are_one_list() -> None:
    """What the type checker knows of is what there is."""
    from kdfast.ops import _options

    for keywords, options in (
        (_options.DivergenceOptions, _options.Options),
        (_options.LabelOptions, _options.WithLabels),
        (_options.KDOptions, _options.Distillation),
    ):
        assert set(keywords.__annotations__) == set(options.__dataclass_fields__)


def test_calls_are_the_schemas() -> None:
    from kdfast.ops import _call, _linear

    names = [argument.name for argument in torch.ops.kdfast.divergence.default._schema.arguments]
    assert names[2:-3] == [*_call.RowValues._fields, "divisor", *_call.Numbers._fields]
    assert len(torch.ops.kdfast.linear_divergence.default._schema.arguments) == 1 + _linear.FLAT


def test_is_a_part_of_a_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss = torch.nn.Linear(3, 7), kdfast.nn.Loss("kd_loss", alpha=0.3)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.head(x), T, labels)
            return loss

    model, x, labels = Model(), torch.randn(5, 3), torch.arange(5)
    model(x, labels).backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.any()
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
