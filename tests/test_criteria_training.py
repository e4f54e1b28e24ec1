"""Criteria that go through a training: gates, pulls on weights, movement."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import criteria_oracle as oracle
import numpy as np
import pruning_oracle as zero
import pytest
import tiny_models
import torch

from kdfast import prune
from kdfast.prune import criteria
from kdfast.prune.criteria.gates import Gates, HardConcrete, VariationalDropout
from kdfast.prune.layers import layers_of

SOME = pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "modernbert"])
GATES = ("slimming", "hard_concrete", "variational_dropout")
TRAINED = [n for n, x in criteria.CRITERIA.items() if x.needs == "training"]


def train(model: Any, tracker: Any, steps: int, seed: int = 0, learning_rate: float = 1e-2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    torch.manual_seed(seed)
    for step in range(steps):
        model(**oracle.labelled(model, step)).loss.backward()
        tracker.before_step()
        optimizer.step()
        tracker.after_step(learning_rate)
        optimizer.zero_grad()


# ---- hard concrete ----
def test_hard_concrete_numbers() -> None:
    """SPEC's: P(z ≠ 0) and the gate in evaluation mode."""
    model = tiny_models.make("bert")
    gates: Any = criteria.track(model, "hard_concrete", ("heads",))
    for log_alpha, open_, value in ((0.0, 0.831822, 0.5), (-2.0, 0.400975, 0.043044)):
        x = torch.tensor([log_alpha], dtype=torch.float64)
        assert float(HardConcrete.open(x)) == pytest.approx(open_, abs=5e-7)
        assert float(gates.gate(x, training=False)) == pytest.approx(value, abs=5e-7)
        torch.manual_seed(0)
        z = gates.gate(x.expand(200_000), training=True)
        assert float((z != 0).double().mean()) == pytest.approx(open_, abs=5e-3)
        assert float(z.min()) == 0
        assert float(z.max()) == 1
        assert float(gates.penalty(x)) == pytest.approx(open_, abs=5e-7)


def test_hard_concrete_samples() -> None:
    """By NumPy from the same uniform numbers."""
    model = tiny_models.make("bert")
    gates: Any = criteria.track(model, "hard_concrete", ("heads",))
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.manual_seed(1)
    got = gates.gate(x, training=True).numpy()
    torch.manual_seed(1)
    u = torch.rand_like(x).numpy()
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + x.numpy()) / (2 / 3))) * 1.2 - 0.1
    np.testing.assert_allclose(got, np.clip(s, 0, 1), rtol=1e-10)


def test_hard_concrete_learns_what_is_needed() -> None:
    """Neurons whose output weights are zero have nothing against the penalty."""
    model = tiny_models.make("bert")
    for layer in model.bert.encoder.layer:
        layer.output.dense.weight.data[:, ::2] = 0
        layer.output.dense.weight.data[:, 1::2] *= 10
    tracker = criteria.track(model, "hard_concrete", ("neurons",), weight=1e-3, learning_rate=0.1)
    model.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    train(model, tracker, 30, learning_rate=0.0)
    for scores in tracker.scores("neurons").values.values():
        assert float(scores[1::2].mean()) > float(scores[::2].mean())
        assert bool((scores[::2] < 2.0).all())


# ---- variational dropout ----
def test_variational_dropout_numbers() -> None:
    model = tiny_models.make("bert")
    gates: Any = criteria.track(model, "variational_dropout", ("heads",))
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    got = [float(gates.penalty(each)) for each in x]
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    a = x.numpy()
    minus_kl = k1 / (1 + np.exp(-(k2 + k3 * a))) - 0.5 * np.log1p(np.exp(-a)) - k1
    np.testing.assert_allclose(got, -minus_kl, rtol=1e-9)
    assert all(b < a for a, b in itertools.pairwise(got))  # it draws to more noise
    torch.manual_seed(0)
    z = gates.gate(torch.full((200_000,), math.log(0.25), dtype=torch.float64), training=True)
    assert float(z.mean()) == pytest.approx(1, abs=5e-3)
    assert float(z.var()) == pytest.approx(0.25, rel=0.02)
    assert gates.gate(torch.tensor([2.9, 3.1]), training=False).tolist() == [1, 0]


def test_the_weight_is_annealed() -> None:
    model = tiny_models.make("bert")
    tracker: Any = criteria.track(model, "variational_dropout", ("heads",), weight=0.5, anneal=4)
    weights = []
    for _ in range(6):
        train(model, tracker, 1)
        weights.append(tracker.weight)
    assert weights == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert isinstance(tracker, VariationalDropout)


# ---- gates on models ----
@SOME
@pytest.mark.parametrize("of", ["heads", "groups", "neurons"])
def test_gates_multiply(name: str, of: Any) -> None:
    """A gate of 0 is a dead unit; folded gates give what gates do."""
    model = tiny_models.make(name)
    batch = tiny_models.batch(model)
    whole = model(**batch).logits
    tracker: Any = criteria.track(model, "slimming", (of,))
    torch.testing.assert_close(model(**batch).logits, whole)
    masks = prune.Masks.full(model)
    with torch.no_grad():
        for i, gate in enumerate(tracker.parameters[of]):
            gate[1] = 0
            if of == "groups":
                masks.drop_group(i, 1)
            else:
                (masks.heads if of == "heads" else masks.neurons)[i][1] = False
    gated = model(**batch).logits
    with torch.no_grad():
        for gate in tracker.parameters[of]:
            gate.copy_(torch.linspace(0.5, 1.5, len(gate)))
    other = model(**batch).logits
    assert not torch.allclose(other, whole, rtol=1e-3)
    tracker.fold()
    torch.testing.assert_close(model(**batch).logits, other)
    again = tiny_models.make(name)
    with zero.zeroed(again, masks):
        torch.testing.assert_close(gated, again(**batch).logits)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_gates_of_masked_models() -> None:
    model = tiny_models.make("bert")
    masks = zero.patterns(model)["some"]
    prune.apply(model, masks)
    batch = tiny_models.batch(model)
    expected = model(**batch).logits
    tracker: Any = criteria.track(model, "slimming")
    torch.testing.assert_close(model(**batch).logits, expected)
    with torch.no_grad():
        for gate, live in zip(tracker.parameters["neurons"], masks.neurons, strict=True):
            gate[~live] = torch.nan
    torch.testing.assert_close(model(**batch).logits, expected)
    for x, live in zip(tracker.scores("neurons").values.values(), masks.neurons, strict=True):
        assert bool((x[~live] == -torch.inf).all())


def test_slimming_is_l1() -> None:
    """One step of Adam's on the loss with λ Σ |γ|, by hand."""
    model, by_hand = tiny_models.make("bert"), tiny_models.make("bert")
    batch = oracle.labelled(model, 0)
    tracker: Any = criteria.track(model, "slimming", ("neurons",), weight=0.3, learning_rate=0.05)
    gates = [torch.ones(37, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for layer, gate in zip(by_hand.bert.encoder.layer, gates, strict=True):
        layer.output.dense.register_forward_pre_hook(lambda _, x, gate=gate: (x[0] * gate,))
    optimizer = torch.optim.Adam(gates, lr=0.05)
    model(**batch).loss.backward()
    tracker.before_step()
    (by_hand(**batch).loss + 0.3 * sum(gate.abs().sum() for gate in gates)).backward()
    optimizer.step()
    for got, gate in zip(tracker.values("neurons"), gates, strict=True):
        assert bool((gate != 1).all())
        torch.testing.assert_close(got, gate.detach().abs())
    for mine, others in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, others.grad)


# ---- pulls ----
@SOME
@pytest.mark.parametrize("criterion", ["l1_penalty", "group_lasso", "unit_decay"])
@pytest.mark.parametrize("of", ["heads", "groups", "neurons"])
def test_pulls(name: str, criterion: str, of: Any) -> None:
    model = tiny_models.make(name)
    tracker: Any = criteria.track(model, criterion, (of,), weight=0.4)
    layers = layers_of(model)
    before = [[v.copy() for v in oracle.vectors(layer, of)] for layer in layers]
    rest = {n: p.detach().clone() for n, p in model.named_parameters()}
    if criterion == "unit_decay":
        model(**oracle.labelled(model, 0)).loss.backward()
        grads = [[v.copy() for v in oracle.vectors(layer, of, lambda p: p.grad)] for layer in layers]
        tracker.before_step()
        for layer, weights, was in zip(layers, before, grads, strict=True):
            for now, w, g in zip(oracle.vectors(layer, of, lambda p: p.grad), weights, was, strict=True):
                np.testing.assert_allclose(now, g + 0.4 * w / np.linalg.norm(w), rtol=1e-9, atol=1e-14)
        return
    tracker.after_step(0.25)
    changed = 0
    for layer, weights in zip(layers, before, strict=True):
        for now, w in zip(oracle.vectors(layer, of), weights, strict=True):
            if criterion == "l1_penalty":
                expected = np.sign(w) * np.maximum(np.abs(w) - 0.1, 0)
            else:
                expected = w * max(1 - 0.1 * math.sqrt(len(w)) / np.linalg.norm(w), 0)
            np.testing.assert_allclose(now, expected, rtol=1e-9, atol=1e-14)
            changed += int((expected != w).any())
    assert changed == sum(oracle.count(layer, of) for layer in layers)
    untouched = [n for n, p in model.named_parameters() if torch.equal(p, rest[n])]
    assert any("norm" in n.lower() or "ln" in n for n in untouched)


def test_group_lasso_makes_zeros() -> None:
    model = tiny_models.make("bert")
    tracker = criteria.track(model, "group_lasso", weight=10.0)
    train(model, tracker, 40)
    for of in ("heads", "neurons"):
        scores = tracker.scores(of)  # type: ignore[arg-type]
        dead = prune.select(model, scores, threshold=0.0, allow_empty=True)
        expected = model(**oracle.labelled(model, 1)).logits
        prune.apply(model, dead)
        torch.testing.assert_close(model(**oracle.labelled(model, 1)).logits, expected)
        prune.remove(model)
        assert any(not bool(x.all()) for x in (dead.heads if of == "heads" else dead.neurons))


# ---- movement ----
@SOME
def test_movement(name: str) -> None:
    """− Σ over steps of Σ w · g, with the weights before each step."""
    model = tiny_models.make(name)
    kinds: tuple[Any, ...] = oracle.UNITS
    tracker = criteria.track(model, "movement", kinds)
    by_hand = copy.deepcopy(model)
    layers = layers_of(by_hand)
    expected = {of: [np.zeros(oracle.count(layer, of)) for layer in layers] for of in kinds}
    for step in range(3):
        by_hand.zero_grad()
        by_hand(**oracle.labelled(by_hand, step)).loss.backward()
        for of in kinds:
            for total, layer in zip(expected[of], layers, strict=True):
                total -= [v.sum() for v in oracle.vectors(layer, of, oracle.products)]
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.01 * (0 if p.grad is None else p.grad)
    train(model, tracker, 3)
    for of in kinds:
        for got, exact in zip(tracker.scores(of).values.values(), expected[of], strict=True):
            assert np.abs(exact).max() > 0
            np.testing.assert_allclose(got.numpy(), exact, rtol=1e-4, atol=1e-6 * np.abs(exact).max())


def test_movement_of_blocks() -> None:
    model = tiny_models.make("bert", intermediate_size=40)
    tracker = criteria.track(model, "movement", ("blocks",), block=(8, 4))
    model(**oracle.labelled(model, 0)).loss.backward()
    tracker.before_step()
    w = model.bert.encoder.layer[2].intermediate.dense.weight
    expected = -(w * w.grad).detach().view(5, 8, 12, 4).sum((1, 3))
    torch.testing.assert_close(tracker.scores("blocks").values["bert.encoder.layer.2.intermediate.dense"], expected)
    assert prune.select_blocks(tracker.scores("blocks"), 0.5).keys() == tracker.scores("blocks").values.keys()


def test_soft_movement() -> None:
    """σ(S) > τ."""
    model = tiny_models.make("bert")
    tracker = criteria.track(model, "movement", ("neurons",))
    train(model, tracker, 4)
    tau = 0.5
    masks = prune.select(model, tracker.scores("neurons"), threshold=math.log(tau / (1 - tau)))
    for live, x in zip(masks.neurons, tracker.scores("neurons").values.values(), strict=True):
        assert torch.equal(live, x.sigmoid() > tau)


# ---- all ----
@pytest.mark.parametrize("criterion", TRAINED)
def test_goes_on_from_its_state(criterion: str) -> None:
    """Two steps, then two of another tracker of the same model, are four."""
    kinds: tuple[Any, ...] = ("heads", "neurons")
    whole, half = tiny_models.make("bert"), tiny_models.make("bert")
    tracker = criteria.track(whole, criterion, kinds)
    train(whole, tracker, 2)
    state = copy.deepcopy(whole.state_dict()), copy.deepcopy(tracker.state_dict())
    before = tracker.values("neurons")
    train(whole, tracker, 2)
    half.load_state_dict(state[0])
    other = criteria.track(half, criterion, kinds)
    other.load_state_dict(state[1])
    train(half, other, 2)
    for of in kinds:
        for a, b in zip(tracker.values(of), other.values(of), strict=True):
            assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(before, tracker.values("neurons"), strict=True))
    tracker.close()
    assert not [module for module in whole.modules() if module._forward_pre_hooks]
    assert isinstance(tracker, Gates) == (criterion in GATES)


def test_errors() -> None:
    model = tiny_models.make("bert")
    for given, message in [
        (("entropy",), r"criterion: expected one of activation_norm, .*, got 'entropy'"),
        (
            ("l2",),
            r"criterion: expected one that needs training \(for this one: kdfast\.prune\.criteria\.score\), got 'l2'",
        ),
        (("movement", ("blocks",)), r"block: expected one that divides bert\.encoder\..*, \[48, 48\], got \[32, 32\]"),
        (("slimming", ()), r"of: expected at least one kind of unit, got none"),
        (("slimming", ("layers",)), r"of: expected one of heads, groups, neurons with 'slimming', got 'layers'"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.criteria\.track: {message}"):
            criteria.track(model, *given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"settings: expected those of 'movement': block, got weight"):
        criteria.track(model, "movement", weight=1.0)
