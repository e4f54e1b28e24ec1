"""What holds for every operator, over the registry."""

from __future__ import annotations

import pytest
import torch
from accuracy import check, inputs, value_and_gradient

from kdfast import _C
from kdfast.bench.registry import OPERATORS, Operator, Sample
from kdfast.bench.registry.operator import apply, mapped

CASES = [
    pytest.param(operator, sample, id=f"{operator.name}-{sample.name}")
    for operator in OPERATORS.values()
    for sample in operator.samples
]
BY_OPERATOR = [pytest.param(operator, id=name) for name, operator in OPERATORS.items()]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("gap", [1.0, 0.05])
@pytest.mark.parametrize(("operator", "sample"), CASES)
def test_value_and_gradient(
    operator: Operator, sample: Sample, gap: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check(operator, sample, gap, *dtypes)


# The divergences share their raw operators: every sample of one of them, of the others what tells them apart.
# So do the distances between layers: their reductions come from the samples of one.
RAW_NAMES = ("-part", "-rows", "-rows_none", "-masked", "-per_head", "-per_token", "-causal")
RAW_CASES = [case for case in CASES if case.id.startswith("kl_div-") or case.id.endswith(RAW_NAMES)]


@pytest.mark.parametrize(("operator", "sample"), RAW_CASES)
def test_raw_operator_is_a_good_citizen(operator: Operator, sample: Sample) -> None:
    """Schema, fake kernel and tracing of the raw operators, on inputs that need no gradient."""
    student, teacher, kwargs = inputs(sample, 1.0, torch.float32, torch.float32)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "kdfast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        value_and_gradient(operator.function, student, teacher, kwargs)
        apply(operator.function, student, teacher, **kwargs)
    assert {func._opname for func, _ in calls} <= set(operator.native)
    assert calls
    for func, args in calls:
        torch.library.opcheck(func, mapped(torch.Tensor.detach, args))


@pytest.mark.parametrize("operator", BY_OPERATOR)
def test_has_everything(operator: Operator) -> None:
    assert operator.function.__doc__
    for name in operator.native:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{name}", "CPU")
        if _C.cuda is not None and operator.cuda_shapes:  # without, it has no kernel there
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{name}", "CUDA")


COMPILED = [pytest.param(operator, "aot_eager", id=f"{name}-aot_eager") for name, operator in OPERATORS.items()]
COMPILED += [
    pytest.param(OPERATORS[name], "inductor", id=f"{name}-inductor")
    for name in ("kl_div", "kd_loss", "qk_attention_mse")
]


@pytest.mark.parametrize(("operator", "backend"), COMPILED)
def test_compiles_without_graph_breaks(operator: Operator, backend: str) -> None:
    names = (
        ("odd", "rows", "rows_none", "num_items") if operator.name == "kl_div" else ("part", "rows", "masked", "last")
    )
    samples = [s for s in operator.samples if s.name in names] or [operator.samples[0]]
    for sample in samples:
        student, teacher, kwargs = inputs(sample, 1.0, torch.bfloat16, torch.float32)
        compiled = torch.compile(operator.function, fullgraph=True, backend=backend)
        for got, expected in zip(
            value_and_gradient(compiled, student, teacher, kwargs),
            value_and_gradient(operator.function, student, teacher, kwargs),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
