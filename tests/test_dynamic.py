"""Weights and temperatures of rows: TextBrewer's numbers, the definitions in float64, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_objective_originals import agree, oracle
from test_recipes_by_hand import SETTINGS, Loss, follow, inputs
from torch import Tensor

from kdfast.objective import DynamicLogits, Labels, Terms
from kdfast.recipes import dynamic

ROWS, CLASSES = 7, 5


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.linspace(0.2, 6, ROWS, dtype=torch.float64)[:, None]  # from unsure to sure
    return s.to(dtype).requires_grad_(), (scale * t).to(dtype)


def loss_of(term: DynamicLogits, s: Tensor, t: Tensor, **columns: Any) -> Tensor:
    values = Terms(kl=term)(
        SimpleNamespace(logits=s), SimpleNamespace(logits=t), {"labels": torch.zeros(ROWS), **columns}
    )
    return values["kl"]


def by_definition(
    s: Tensor, t: Tensor, direction: str | None, gamma: float, temperature: Tensor, t_squared: bool = True
) -> Tensor:
    p = t.softmax(-1)
    u = -(p * p.log()).sum(-1) / math.log(t.shape[-1])
    w = 1 + {"up": gamma, "down": -gamma, None: 0.0}[direction] * (u - u.mean())
    assert float((w - 1).abs().max()) > 0.2 or direction is None
    assert float(w.mean()) == pytest.approx(1)
    per_row = F.kl_div(
        (s / temperature[:, None]).log_softmax(-1), (t / temperature[:, None]).softmax(-1), reduction="none"
    ).sum(-1)
    return (w * (temperature**2 if t_squared else 1) * per_row).mean()


def tau(rule: str | None, s: Tensor, t: Tensor, base: float, beta: float, power: float) -> Tensor:
    s = s.detach()
    if rule is None:
        return torch.full((len(s),), base, dtype=torch.float64)
    if rule == "flsw":
        v, w = (z / (z.square().sum(-1, keepdim=True).sqrt() + 1e-4) for z in (s, t))
        a = (1 - (v * w).sum(-1)) ** power
    else:
        a = 1 / (s.softmax(-1).max(-1).values + 1e-3)
    return base + beta * (a.mean() - a)


@pytest.mark.parametrize("rule", ["flsw", "cwsm"])
def test_temperatures_of_textbrewer(rule: str) -> None:
    o, _ = oracle("extra_vanilla_kd", torch.float64)
    expected = o["flsw_tau_b1_g2_base8" if rule == "flsw" else "cwsm_tau_b1_base8"]
    assert float(expected.std()) > 0.3
    term = DynamicLogits(temperature=8.0, direction=None, rule=rule)
    agree(term.temperatures(o["student_logits"], o["teacher_logits"]), expected, 1e-12)


@pytest.mark.parametrize("rule", [None, "flsw", "cwsm"])
@pytest.mark.parametrize(("direction", "gamma"), [("up", 1.0), ("down", 0.6), (None, 1.0)])
def test_loss_and_gradient_by_definition(direction: str | None, gamma: float, rule: str | None) -> None:
    s, t = logits()
    term = DynamicLogits(temperature=6.0, direction=direction, gamma=gamma, rule=rule, beta=0.7, power=1.5)
    temperature = tau(rule, s, t, 6.0, 0.7, 1.5)
    expected = by_definition(s, t, direction, gamma, temperature)
    got = loss_of(term, s, t)
    agree(got, expected.detach(), 1e-10)
    agree(torch.autograd.grad(got, s)[0], torch.autograd.grad(expected, s)[0], 1e-10)
    plain = DynamicLogits(
        temperature=6.0, direction=direction, gamma=gamma, rule=rule, beta=0.7, power=1.5, t_squared=False
    )
    agree(loss_of(plain, s, t), by_definition(s, t, direction, gamma, temperature, t_squared=False).detach(), 1e-10)


def test_directions_are_opposite() -> None:
    _, t = logits()
    up, down = (DynamicLogits(direction=direction, gamma=0.5).weights(t) for direction in ("up", "down"))
    torch.testing.assert_close(up + down, torch.full_like(up, 2))
    assert up.argmax() == t.softmax(-1).amax(-1).argmin()
    assert up.min() >= 0.5


def test_columns_of_rows_go_before() -> None:
    s, t = logits()
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = torch.linspace(3, 9, ROWS, dtype=torch.float64)
    term = DynamicLogits(temperature=1.0, rule="cwsm", direction="up", beta=0.1)
    u = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1) / math.log(CLASSES)
    a = 1 / (s.detach().softmax(-1).max(-1).values + 1e-3)
    temperature = base + 0.1 * (a.mean() - a)
    kl = F.kl_div((s / temperature[:, None]).log_softmax(-1), (t / temperature[:, None]).softmax(-1), reduction="none")
    expected = (weight * (1 + u - u.mean()) * temperature**2 * kl.sum(-1)).mean()
    agree(loss_of(term, s, t, sample_weight=weight, sample_temperature=base), expected.detach(), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    s, t = logits(dtype)
    term = DynamicLogits(temperature=4.0, rule="flsw", beta=0.5)
    wide, target = s.detach().double().requires_grad_(), t.double()
    expected = by_definition(wide, target, "up", 1.0, tau("flsw", wide, target, 4.0, 0.5, 2.0))
    got = loss_of(term, s, t)
    agree(got, expected.detach(), 1e-5)
    (gradient,) = torch.autograd.grad(got, s)
    assert gradient.dtype == dtype
    agree(gradient, torch.autograd.grad(expected, wide)[0], 1e-5 if dtype == torch.float32 else 5e-3)


def test_impossible_classes_have_no_entropy() -> None:
    s, t = logits()
    off = torch.zeros_like(t, dtype=torch.bool)
    off[:, 3] = True
    masked = t.masked_fill(off, -torch.inf)
    found = DynamicLogits().weights(masked)
    p = t[:, [0, 1, 2, 4]].softmax(-1)
    u = -(p * p.log()).sum(-1) / math.log(CLASSES)
    agree(found, 1 + u - u.mean(), 1e-12)
    assert loss_of(DynamicLogits(), s, masked).isfinite()


def test_padded_classes_do_not_count() -> None:
    s, t = logits()
    wide = [torch.cat([z, torch.full((ROWS, 2), torch.nan, dtype=z.dtype)], -1) for z in (s, t)]
    term, padded = (
        DynamicLogits(temperature=5.0, rule="cwsm", beta=0.5, **own) for own in ({}, {"vocab_size": CLASSES})
    )
    agree(loss_of(padded, *wide), loss_of(term, s, t).detach(), 1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"direction": "sideways"}, "direction: expected None, 'up' or 'down', got 'sideways'"),
        ({"rule": "fixed"}, "rule: expected None, 'flsw' or 'cwsm', got 'fixed'"),
        ({"gamma": 1.5}, "gamma: expected .*, got 1.5"),
        ({"beta": -1.0}, "beta: expected a number that is not negative, got -1.0"),
        ({"rule": "flsw"}, "temperature: expected at least 4, which flsw may take from it, got 1.0"),
        ({"tokens": "all"}, "tokens: expected None: weights are of whole rows, got 'all'"),
        ({"divergence": "logit_mse"}, "direction: expected None beside 'logit_mse', .*, got 'up'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^DynamicLogits: {expected}$"):
        DynamicLogits(**settings)


def test_temperature_that_unsure_students_could_use_up() -> None:
    s, t = logits()
    with pytest.raises(ValueError, match=r"expected at least 3\.97612, which cwsm may take from it, got 2\.0"):
        loss_of(DynamicLogits(temperature=2.0, rule="cwsm"), s, t)


# ---- the recipe ----
def of_dynamic(direction: str | None, gamma: float, rule: str | None, beta: float, end: float | None = None) -> Loss:
    alpha, t, steps = 0.9, 4.0, 20
    done = iter(range(steps))

    def loss(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        share = alpha + ((alpha if end is None else end) - alpha) * next(done) / steps
        z = student(**inputs(batch)).logits
        with torch.no_grad():
            target = teacher(**inputs(batch)).logits
            temperature = tau(rule, z, target, t, beta, 2.0).to(z.dtype)
        p = target.softmax(-1)
        u = -(p * p.log()).sum(-1) / math.log(p.shape[-1])
        w = 1 + {"up": gamma, "down": -gamma, None: 0.0}[direction] * (u - u.mean())
        scaled = [x / temperature[:, None] for x in (z, target)]
        kl = F.kl_div(scaled[0].log_softmax(-1), scaled[1].softmax(-1), reduction="none").sum(-1)
        return share * (w * temperature**2 * kl).mean() + (1 - share) * F.cross_entropy(z, batch["labels"])

    return loss


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"direction": "up", "gamma": 0.7, "alpha_end": 0.3}, of_dynamic("up", 0.7, None, 0.0, 0.3)),
        ({"direction": "down", "rule": "flsw", "beta": 0.9}, of_dynamic("down", 1.0, "flsw", 0.9)),
        ({"direction": "equal", "rule": "cwsm", "beta": 0.9}, of_dynamic(None, 1.0, "cwsm", 0.9)),
    ],
)
def test_recipe_follows_a_plain_loop(
    settings: dict[str, Any], loss: Loss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dynamic.Recipe(**SETTINGS, temperature=4.0, **settings)
    follow(recipe, {"student": (loss, "teacher")}, tmp_path, monkeypatch)


def test_recipe_of_other_kinds() -> None:
    for kind in ("regression", "multi_label"):
        with pytest.raises(ValueError, match=f"^kind: expected classification, .*, got {kind}$"):
            dynamic.Recipe().stages(3, 6, kind)
    alone = dynamic.Recipe(alpha=0.0).stages(3, 6, "classification")[0].objective
    student = SimpleNamespace(logits=torch.zeros(2, 2))
    assert list(alone(student, None, {"labels": torch.tensor([0, 1])})) == ["ce"]
    assert isinstance(alone.terms["ce"], Labels)
