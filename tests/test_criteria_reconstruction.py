"""Criteria that reconstruct what output maps give, and units chosen together; weights that take the part of what goes."""

from __future__ import annotations

import itertools
from typing import Any

import criteria_oracle as oracle
import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor, nn

from kdfast import prune
from kdfast.prune import criteria
from kdfast.prune.criteria import collaborative, reconstruction
from kdfast.prune.criteria.compensation import refitted
from kdfast.prune.layers import layers_of, matrix

SOME = pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
KINDS = pytest.mark.parametrize("of", ["heads", "neurons"])


def outputs(model: Any, batches: Any, of: str) -> list[tuple[Any, Any]]:
    """Of every layer what its output map reads, [tokens, units, numbers], and its matrix [out, units, numbers]."""
    found = []
    for layer, x in zip(layers_of(model), oracle.activations(model, batches, of), strict=True):
        linear = layer.module.get_submodule(layer.adapter.output if of == "heads" else layer.adapter.contract)
        found.append((x, matrix(linear).detach().clone().numpy().reshape(-1, *x.shape[1:])))
    return found


def batches_of(model: Any, rows: int = 8) -> list[dict[str, Tensor]]:
    return [oracle.labelled(model, seed, rows) for seed in (1, 2)]


# ---- OBS ----
def obs(x: Any, w: Any, damping: float) -> Any:
    """Every unit's error by the least squares without it and those before it, no inverse updated."""
    tokens, units, size = x.shape
    h = 2 * x.reshape(tokens, -1).T @ x.reshape(tokens, -1) / tokens
    h += damping * np.diag(h).mean() * np.eye(len(h))
    left, scores = list(range(units)), np.zeros(units)
    whole = w.reshape(len(w), -1)

    def error(kept: list[int]) -> float:
        s = (np.array(kept)[:, None] * size + np.arange(size)).ravel().astype(int)
        fitted = np.zeros_like(whole)
        fitted[:, s] = np.linalg.solve(h[np.ix_(s, s)], (whole @ h[:, s]).T).T
        return 0.5 * float(np.trace((whole - fitted) @ h @ (whole - fitted).T))

    while left:
        errors = {unit: error([one for one in left if one != unit]) for unit in left}
        first = min(errors, key=lambda unit: errors[unit])
        scores[first] = errors[first]
        left.remove(first)
    return scores


@SOME
@KINDS
def test_obs(name: str, of: Any) -> None:
    model = tiny_models.make(name)
    batches = batches_of(model)
    got = criteria.score(model, "obs", of, batches, damping=0.01)
    for found, (x, w) in zip(got.values.values(), outputs(model, batches, of), strict=True):
        expected = obs(x, w, 0.01)
        assert (expected > 0).all()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


# ---- ThiNet ----
@SOME
@KINDS
def test_thinet(name: str, of: Any) -> None:
    """The greedy choice on outputs themselves."""
    model = tiny_models.make(name)
    batches = batches_of(model)
    got = criteria.score(model, "thinet", of, batches)
    for found, (x, w) in zip(got.values.values(), outputs(model, batches, of), strict=True):
        given = np.einsum("tuk,ouk->uto", x, w)
        left, dropped, order = list(range(len(given))), np.zeros_like(given[0]), np.zeros(len(given))
        for place in range(len(given)):
            first = min(left, key=lambda unit: ((dropped + given[unit]) ** 2).sum())
            dropped = dropped + given[first]
            order[first] = place / len(given)
            left.remove(first)
        np.testing.assert_allclose(found.numpy(), order, atol=1e-12)


# ---- LASSO ----
@KINDS
def test_lasso(of: Any) -> None:
    """Which units have β ≠ 0 at some λ, by coordinate descent."""
    pytest.importorskip("sklearn")
    model = tiny_models.make("bert")
    batches = batches_of(model)
    got = criteria.score(model, "lasso", of, batches)
    for found, (x, w) in zip(got.values.values(), outputs(model, batches, of), strict=True):
        given = np.einsum("tuk,ouk->uto", x, w).reshape(x.shape[1], -1)
        q = given @ given.T / len(x)
        assert (found > 0).any()
        for level in (0.7, 0.3):
            penalty = float(np.quantile(found.numpy(), level)) * 1.001  # beside a knot
            beta = np.zeros(len(q))
            for _ in range(3000):
                for j in range(len(q)):
                    rest = q[j].sum() - q[j] @ beta + q[j, j] * beta[j]
                    beta[j] = np.sign(rest) * max(abs(rest) - penalty, 0) / q[j, j]
            assert ((np.abs(beta) > 1e-9) == (found.numpy() > penalty)).mean() > 0.95
            assert 0 < (np.abs(beta) > 1e-9).sum() < len(beta)


def test_lasso_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("sklearn", "sklearn.linear_model", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    model = tiny_models.make("bert")
    with pytest.raises(ImportError, match=r"needs sklearn\S*, which is not installed: pip install kdfast\[prune\]"):
        criteria.score(model, "lasso", "heads", batches_of(model))
    with pytest.raises(ImportError, match=r"pip install kdfast\[prune\]"):
        criteria.merge_clusters(model, 0.5)


# ---- DCP ----
@KINDS
def test_dcp(of: Any) -> None:
    """The gradient by autograd, at every choice anew."""
    model = tiny_models.make("bert")
    batches = batches_of(model)
    got = criteria.score(model, "dcp", of, batches, balance=0.5)
    for i, (found, (x, w)) in enumerate(zip(got.values.values(), outputs(model, batches, of), strict=True)):
        layer = layers_of(model)[i]
        linear: Any = layer.module.get_submodule(layer.adapter.output if of == "heads" else layer.adapter.contract)
        model.zero_grad()
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        of_loss = 0.5 * linear.weight.grad.reshape(w.shape)
        inputs, whole = torch.from_numpy(x), torch.from_numpy(w)
        chosen, order = list[int](), np.zeros(x.shape[1])
        for place in range(len(order)):
            mine = torch.zeros_like(whole)
            mine[:, chosen] = whole[:, chosen]
            mine.requires_grad_()
            error = torch.einsum("tuk,ouk->to", inputs, whole - mine).square().sum() / (2 * len(inputs))
            norms = (torch.autograd.grad(error, mine)[0] + of_loss).square().sum((0, 2))
            norms[chosen] = -1
            chosen.append(int(norms.argmax()))
            order[chosen[-1]] = 1 - place / len(order)
        np.testing.assert_allclose(found.numpy(), order, atol=1e-12)
    model.zero_grad()


# ---- collaborative ----
def test_the_relaxed_problem() -> None:
    """Near the best of all subsets, and below it, as numbers between 0 and 1 may be too."""
    torch.manual_seed(0)
    a, u = torch.randn(10, 6, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    p = a @ a.mT / 6
    x = collaborative.relaxed(u, p, 4, 500)
    assert abs(float(x.sum()) - 4) < 1e-9
    assert bool((x >= 0).all() & (x <= 1).all())

    def cost(x: Tensor) -> float:
        return float(u @ x + x @ p @ x)

    subsets = [
        torch.zeros(10).index_fill_(0, torch.tensor(one), 1).double() for one in itertools.combinations(range(10), 4)
    ]
    best = min(map(cost, subsets))
    assert cost(x) < best
    slope = u + 2 * p @ x
    gap = float(slope @ x - slope.topk(4, largest=False).values.sum())  # what a better x could bring at most
    assert 0 <= gap < 1e-2 * best


def test_collaborative() -> None:
    """Two neurons whose effects cancel each other go together, though each alone would cost much."""
    model = tiny_models.make("bert")
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight[1], layer.intermediate.dense.bias[1] = (
            layer.intermediate.dense.weight[0],
            layer.intermediate.dense.bias[0],
        )
        layer.output.dense.weight[:, 0] *= 30
        layer.output.dense.weight[:, 1] = -layer.output.dense.weight[:, 0]
    batches = [oracle.labelled(model, seed, 6) for seed in range(4)]
    name = "bert.encoder.layer.1"
    alone = criteria.score(model, "fisher", "neurons", batches).values[name]
    assert bool((alone[:2] > alone.median()).all())
    gates = np.concatenate([oracle.gates(model, [batch], "neurons")[1] for batch in batches])
    linear, quadratic = torch.from_numpy(np.abs(gates.mean(0))), torch.from_numpy(gates.T @ gates / (2 * len(gates)))
    got = criteria.score(model, "collaborative", "neurons", batches, keep=0.9).values[name]
    x = collaborative.relaxed(linear, quadratic, 37 - 33, 300)
    assert {*got.topk(4, largest=False).indices.tolist()} == {*x.topk(4).indices.tolist()}
    assert sorted(got.tolist()) == pytest.approx(np.linspace(0, 1, 37).tolist())
    with pytest.raises(ValueError, match="keep: expected a number between 0 and 1, got 1"):
        criteria.score(model, "collaborative", "neurons", batches, keep=1)


# ---- clusters ----
def test_merged_copies_change_nothing() -> None:
    pytest.importorskip("sklearn")
    model = tiny_models.make("llama", intermediate_size=24)
    with torch.no_grad():
        for layer in layers_of(model):
            mlp: Any = layer.module.mlp
            mlp.gate_proj.weight[12:], mlp.up_proj.weight[12:] = mlp.gate_proj.weight[:12], mlp.up_proj.weight[:12]
    batch = tiny_models.batch(model)
    expected = model(**batch).logits
    masks = criteria.merge_clusters(model, 0.5)
    assert [int(live.sum()) for live in masks.neurons] == [12] * 3
    prune.apply(model, masks)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-9)
    other = tiny_models.make("bert")
    for keep in (1.0, 0.0, 0.999):
        with pytest.raises(ValueError, match=r"merge_clusters: keep: expected"):
            criteria.merge_clusters(other, keep)


# ---- compensation ----
# Narrow hidden states, of which many neurons make much of the same.
_SMALL = {"hidden_size": 24, "intermediate_size": 96}
_SMALL_GPT2 = {"n_embd": 24, "n_inner": 96}


def trained(name: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model that has learned which of two words is first."""
    model = tiny_models.make(name, **(_SMALL_GPT2 if name == "gpt2" else _SMALL)).float()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = []
    for _ in range(60):
        ids = torch.randint(3, 20, (16, 12), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] > 10).long()})
        if name in tiny_models.CAUSAL:
            batches[-1]["labels"] = ids
        model(**batches[-1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double(), batches


@SOME
@KINDS
def test_compensation_is_better(name: str, of: Any) -> None:
    """On activations of a trained model that the fit has not seen, every layer's output is nearer to the whole one's."""
    model, batches = trained(name)
    fit, held_out = batches[:20], batches[20:30]
    scores = criteria.score(model, "obs", of, fit)
    masks = prune.select(model, scores, keep=0.5, scope="local")
    before = outputs(model, held_out, of)
    biases = [_bias(model, i, of) for i in range(len(before))]
    criteria.compensate(model, masks, fit)
    for i, (x, w) in enumerate(before):
        live = (masks.heads if of == "heads" else masks.neurons)[i].numpy()
        linear: Any = _output(model, i, of)
        fitted = matrix(linear).detach().numpy().reshape(w.shape)
        whole = np.einsum("tuk,ouk->to", x, w) + biases[i]
        without = np.einsum("tuk,ouk->to", x[:, live], w[:, live]) + biases[i]
        with_it = np.einsum("tuk,ouk->to", x[:, live], fitted[:, live]) + _bias(model, i, of)
        errors = [((whole - one) ** 2).sum() for one in (without, with_it)]
        assert errors[0] > 0
        assert errors[1] < 0.3 * errors[0]
        assert np.array_equal(fitted[:, ~live], w[:, ~live])


def _output(model: Any, i: int, of: str) -> nn.Module:
    layer = layers_of(model)[i]
    return layer.module.get_submodule(layer.adapter.output if of == "heads" else layer.adapter.contract)


def _bias(model: Any, i: int, of: str) -> Any:
    linear: Any = _output(model, i, of)
    return 0.0 if linear.bias is None else linear.bias.detach().clone().numpy()


def test_compensation_is_least_squares() -> None:
    torch.manual_seed(0)
    x, w, live = torch.randn(200, 9).double(), torch.randn(4, 9).double(), torch.arange(9) % 3 > 0
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    got = refitted(w, x.mT @ x / 200, live, 0.0)
    expected = np.linalg.lstsq(x[:, live].numpy(), (x @ w.mT).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-8)
    stay = refitted(w, torch.zeros(9, 9).double() + torch.eye(9), live, 1e9)
    np.testing.assert_allclose(stay.numpy(), w[:, live].numpy(), rtol=1e-6)


def test_the_error_of_obs_is_that_of_compensation() -> None:
    """The score of the last that goes is the squared error of what compensation leaves."""
    torch.manual_seed(1)
    x, w = torch.randn(300, 8).double(), torch.randn(5, 8).double()
    x = x @ torch.randn(8, 8).double()
    second = x.mT @ x / 300
    scores = reconstruction._eliminated(w, 2 * second, 2, 1e-9)
    order = scores.argsort()
    live = (order[2:, None] * 2 + torch.arange(2)).flatten().sort().values
    mask = torch.zeros(8, dtype=torch.bool).index_fill_(0, live, True)
    fitted = torch.zeros_like(w)
    fitted[:, mask] = refitted(w, second, mask, 1e-9)
    error = ((x @ (w - fitted).mT) ** 2).sum() / 300
    torch.testing.assert_close(scores[order[1]], error, rtol=1e-6, atol=0)


def test_errors() -> None:
    model = tiny_models.make("bert")
    masks = prune.Masks.full(model)
    masks.neurons[0][:3] = False
    with pytest.raises(ValueError, match=r"compensate: batches: expected at least one, got none"):
        criteria.compensate(model, masks, [])
    with pytest.raises(TypeError, match="masks"):
        criteria.compensate(tiny_models.make("llama"), None, [])  # type: ignore[arg-type]
    prune.apply(model, masks)
    with pytest.raises(ValueError, match=r"compensate: model: expected one without masks, got one that has some"):
        criteria.compensate(model, masks, batches_of(model))
