"""torch.compile, and liger-kernel where it can be imported, beside kdfast on the headline cases. Last: it compiles for long."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.bench import harness, timing
from kdfast.bench.evidence.benchmarks import calls_of, cases
from kdfast.bench.evidence.record import DEVICE, DRY, Record
from kdfast.bench.registry import OPERATORS
from kdfast.bench.registry.operator import apply, tensors

MOST = 2 if DRY else 7  # cases


def liger() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its losses of log-probabilities, from logits, by the operator of kdfast's that is the same."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    kl, js = LigerKLDIVLoss(reduction="batchmean"), LigerJSD(beta=0.5)
    return {
        "kl_div": lambda s, t: kl(s.log_softmax(-1), t.softmax(-1)),
        "js_div": lambda s, t: js(s.log_softmax(-1), t.log_softmax(-1)),
    }


def measure(case: harness.Case, found: dict[str, object]) -> None:
    student, teacher = harness.make(case, DEVICE)
    calls = calls_of(case, student, teacher)
    ours = calls["kdfast"]

    def beside(name: str, loss_of: Callable[..., Tensor]) -> None:
        def call() -> None:
            loss = apply(loss_of, student, teacher, **OPERATORS[case.operator].arguments(student))
            torch.autograd.grad(loss, tensors(student))

        try:
            call()
            times = timing.back_to_back({"kdfast": ours, name: call}, DEVICE, rounds=3)
            medians = {n: statistics.median(x) for n, x in times.items()}
            found[f"{name}_ms"], found[f"x_{name}"] = medians[name], medians[name] / medians["kdfast"]
        except Exception as error:
            found[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:200]}"
            if DEVICE == "cuda":
                torch.cuda.empty_cache()

    try:
        losses = liger()
    except ImportError as error:
        found["liger_error"] = str(error)
    else:
        if case.operator in losses:
            beside("liger", losses[case.operator])
    torch.compiler.reset()
    beside("compiled", torch.compile(OPERATORS[case.operator].eager, backend="eager" if DRY else "inductor"))


def run(record: Record) -> None:
    wanted = [c for c in cases(os.environ.get("ONLY", "")) if c.gradient and not OPERATORS[c.operator].product]
    for case in wanted[:MOST]:
        with record.case(case.name) as found:
            measure(case, found)
    record.failed = False  # errors are results here
