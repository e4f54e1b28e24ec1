"""Criteria by weights, activations and gradients: each against its definition in NumPy, on models of every shape."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import criteria_oracle as oracle
import numpy as np
import pruning_oracle as zero
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast import prune
from kdfast.prune import criteria
from kdfast.prune.layers import layers_of, matrix
from kdfast.prune.rewire import linear_maps

EVERY = pytest.mark.parametrize("name", tiny_models.NAMES)
# Groups that several heads read; a weight that is stored transposed, with three maps in one; gated, two maps in one.
SOME = pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "modernbert"])
# Rotary embeddings, and the loss of language models, are of float32 in models of float64 too.
PRECISION = {"bert": 1e-9, "albert": 1e-9, "modernbert": 1e-6, "llama": 1e-5, "gpt2": 1e-5}


def agree(got: prune.Scores, expected: list[Any], tolerance: float = 1e-9) -> None:
    assert len(got.values) == len(expected)
    for found, exact in zip(got.values.values(), expected, strict=True):
        assert found.dtype == torch.float64
        assert np.abs(exact).max() > 0
        exact = torch.from_numpy(np.asarray(exact, dtype=np.float64))
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


# ---- weights ----
NORMS: dict[str, Callable[[Any], Any]] = {
    "magnitude": lambda v: np.abs(v).mean(),
    "l1": lambda v: np.abs(v).sum(),
    "l2": lambda v: np.sqrt((v**2).sum()),
}


@EVERY
@pytest.mark.parametrize("criterion", NORMS)
def test_norms(name: str, criterion: str) -> None:
    model = tiny_models.make(name)
    for of in oracle.UNITS:
        expected = [[NORMS[criterion](v) for v in oracle.vectors(layer, of)] for layer in layers_of(model)]
        agree(criteria.score(model, criterion, of), expected)  # type: ignore[arg-type]


@SOME
def test_blocks(name: str) -> None:
    """Tiles of every linear map."""
    model = tiny_models.make(name, **({"n_inner": 40} if name == "gpt2" else {"intermediate_size": 40}))
    got = criteria.score(model, "l2", "blocks", block=(8, 4))
    maps = {f"{x.name}.{n}": one for x in layers_of(model) for n, one in linear_maps("", x).items()}
    assert got.values.keys() == maps.keys()
    assert got.block == (8, 4)
    for found, linear in zip(got.values.values(), maps.values(), strict=True):
        w = matrix(linear).detach().numpy()
        tiles = [
            [np.sqrt((w[i : i + 8, j : j + 4] ** 2).sum()) for j in range(0, w.shape[1], 4)]
            for i in range(0, len(w), 8)
        ]
        np.testing.assert_allclose(found.numpy(), tiles, rtol=1e-12)


@SOME
@pytest.mark.parametrize("of", ["heads", "groups", "neurons"])
def test_fpgm(name: str, of: Any) -> None:
    model = tiny_models.make(name)
    expected = [
        [sum(np.sqrt(((v - other) ** 2).sum()) for other in found) for v in found]
        for found in (oracle.vectors(layer, of) for layer in layers_of(model))
    ]
    agree(criteria.score(model, "fpgm", of), expected)


def test_nisp() -> None:
    model = tiny_models.make("bert")
    layers = model.bert.encoder.layer
    s, heads, neurons = np.ones(tiny_models.WIDTH), [], []
    for layer in reversed(layers):
        w = {
            k: np.abs(x.weight.detach().numpy())
            for k, x in {
                "v": layer.attention.self.value,
                "o": layer.attention.output.dense,
                "1": layer.intermediate.dense,
                "2": layer.output.dense,
            }.items()
        }
        neurons.append(w["2"].T @ s)
        s = s + w["1"].T @ neurons[-1]
        slots = w["o"].T @ s
        heads.append(slots.reshape(tiny_models.HEADS, -1).sum(1))
        s = s + w["v"].T @ slots
    agree(criteria.score(model, "nisp", "neurons"), neurons[::-1])
    agree(criteria.score(model, "nisp", "heads"), heads[::-1])


@EVERY
def test_nisp_of_every_architecture(name: str) -> None:
    """Groups, and maps side by side: what a value's weights grow to reaches the layers below alone."""
    model = tiny_models.make(name)
    before = criteria.score(model, "nisp", "heads").values
    layer = layers_of(model)[-1]
    value = matrix(layer.module.get_submodule(layer.adapter.qkv[2]))
    with torch.no_grad():
        value[-1] *= 10
    after = criteria.score(model, "nisp", "heads").values
    *below, last = layers_of(model)
    assert torch.equal(after[last.name], before[last.name])
    assert all(bool((after[x.name] > before[x.name]).all()) for x in below)


def test_random() -> None:
    model = tiny_models.make("llama")
    one, same, other = (criteria.score(model, "random", "heads", seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one.values.values(), same.values.values(), other.values.values(), strict=True):
        assert torch.equal(a, b)
        assert bool((a != c).all())
    assert len(torch.cat(list(one.values.values())).unique()) == len(one)


# ---- activations ----
@SOME
@pytest.mark.parametrize("of", ["heads", "neurons"])
def test_activations(name: str, of: Any) -> None:
    """Padding does not count."""
    model = tiny_models.make(name)
    batches = [tiny_models.batch(model, seed=seed) for seed in (1, 2)]
    found = oracle.activations(model, batches, of)
    norms = [np.sqrt((x**2).sum(2)) for x in found]
    agree(criteria.score(model, "activation_norm", of, batches), [x.mean(0) for x in norms])
    middle = float(np.median(norms[0]))
    given = [x[..., 0] if of == "neurons" else n for x, n in zip(found, norms, strict=True)]
    expected = [(x > middle).mean(0) for x in given]
    agree(criteria.score(model, "apoz", of, batches, threshold=middle), expected)
    summed = criteria.score(model, "activation_norm", "groups", batches) if of == "heads" else None
    if summed is not None:
        ids = layers_of(model)[0].group_of.numpy()
        agree(summed, [[x.mean(0)[ids == g].sum() for g in range(max(ids) + 1)] for x in norms])


# ---- gradients ----
def mean_abs(gates: Any) -> Any:
    return np.abs(gates).mean(0)


OF_GATES: dict[str, Callable[[Any], Any]] = {
    "michel": mean_abs,
    "taylor": lambda gates: mean_abs(gates) / (np.linalg.norm(mean_abs(gates)) or 1),
    "taylor_batch": lambda gates: (np.abs(gates[:3].mean(0)) + np.abs(gates[3:].mean(0))) / 2,
    "fisher": lambda gates: (gates**2).mean(0) / 2,
}


@pytest.mark.parametrize("name", ["bert", "albert", "llama", "gpt2", "modernbert"])
@pytest.mark.parametrize("of", oracle.UNITS)
def test_gates(name: str, of: Any) -> None:
    model = tiny_models.make(name)
    batches = [oracle.labelled(model, 1, rows=3), oracle.labelled(model, 2, rows=2)]
    gates = oracle.gates(model, batches, of)
    for criterion, definition in OF_GATES.items():
        expected = [definition(x) for x in gates]
        agree(criteria.score(model, criterion, of, iter(batches)), expected, PRECISION[name])


def test_michel_is_that_of_importance() -> None:
    model = tiny_models.make("bert")
    batches = [oracle.labelled(model, 1, rows=3), oracle.labelled(model, 2, rows=2)]
    heads, neurons = prune.importance(model, batches, criterion="michel")
    agree(criteria.score(model, "michel", "heads", batches), list(heads.numpy()))
    agree(criteria.score(model, "michel", "neurons", batches), list(neurons.numpy()))


@SOME
@pytest.mark.parametrize("of", oracle.UNITS)
def test_weights_times_gradients(name: str, of: Any) -> None:
    model = tiny_models.make(name)
    batches = [oracle.labelled(model, seed) for seed in (1, 2)]
    layers = layers_of(model)

    def sums(batch: Any, power: int) -> list[Any]:
        oracle.gradients(model, batch)
        return [np.array([(v**power).sum() for v in oracle.vectors(x, of, oracle.products)]) for x in layers]

    by_batch = [sums(batch, 1) for batch in batches]
    by_row = [sums(row, 2) for row in oracle.rows_of(batches)]
    model.zero_grad()
    tolerance = PRECISION[name]
    squares = [(a**2 + b**2) / 2 for a, b in zip(*by_batch, strict=True)]
    agree(criteria.score(model, "taylor_weights", of, batches), squares, tolerance)
    both = [np.abs((a + b) / 2) for a, b in zip(*by_batch, strict=True)]
    whole = sum(x.sum() for x in both)
    agree(criteria.score(model, "snip", of, batches), [x / whole for x in both], tolerance)
    agree(
        criteria.score(model, "obd", of, batches),
        [sum(x) / (2 * len(by_row)) for x in zip(*by_row, strict=True)],
        tolerance,
    )


def test_blocks_of_gradients() -> None:
    model, batch = tiny_models.make("bert", intermediate_size=40), None
    batch = oracle.labelled(model, 1)
    got = criteria.score(model, "taylor_weights", "blocks", [batch], block=(8, 8))
    oracle.gradients(model, batch)
    query = model.bert.encoder.layer[1].attention.self.query.weight
    products = (query * query.grad).detach().numpy()
    expected = products.reshape(6, 8, 6, 8).sum((1, 3)) ** 2
    found = got.values["bert.encoder.layer.1.attention.self.query"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


# ---- any model, and as it was ----
def every(of: str) -> list[str]:
    return [n for n, x in criteria.CRITERIA.items() if of in x.of and x.needs != "training" and n not in ("lasso",)]


@pytest.mark.parametrize("of", ["heads", "neurons", "groups", "layers"])
def test_the_model_stays_as_it_was(of: Any) -> None:
    model = tiny_models.make("bert", dropout=0.5)
    batches = [oracle.labelled(model, seed) for seed in (1, 2)]
    expected = {name: criteria.score(model, name, of, batches) for name in every(of)}
    model.train()
    frozen = model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    model(**batches[0]).loss.backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {n: copy.deepcopy(p.grad) for n, p in model.named_parameters()}
    for name, exact in expected.items():
        agree(criteria.score(model, name, of, batches), [x.numpy() for x in exact.values.values()], 1e-7)
    assert all(module.training for module in model.modules())
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not frozen.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("pattern", ["some", "empty", "first"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_masked_and_smaller_models(name: str, pattern: str) -> None:
    """What is dead has -inf; of the rest, masked and smaller models find the same by what they see."""
    model = tiny_models.make(name)
    batches, masks = [oracle.labelled(model, 1)], zero.patterns(model)[pattern]
    smaller = prune.compact(model, masks)
    prune.apply(model, masks)
    kept = [i for i, lives in enumerate(masks.layers.tolist()) if lives]
    for of, live in (("heads", masks.heads), ("neurons", masks.neurons)):
        for criterion in ("michel", "activation_norm", "l2", "obs"):
            got, small = (list(criteria.score(m, criterion, of, batches).values.values()) for m in (model, smaller))  # type: ignore[arg-type]
            assert len(small) == len(kept)
            for i, found in enumerate(got):
                lives = live[i] & masks.layers[i]
                assert bool((found[~lives] == -torch.inf).all())
                assert bool(found[lives].isfinite().all())
            if criterion in ("michel", "activation_norm"):
                for i, found in zip(kept, small, strict=True):
                    torch.testing.assert_close(found, got[i][live[i]], rtol=1e-7, atol=1e-12)
                    assert not live[i].any() or bool((found != 0).any())


def test_float32_and_bfloat16() -> None:
    model = tiny_models.make("bert")
    batches = [oracle.labelled(model, 1)]
    for name in ("l1", "taylor", "taylor_weights", "obs", "activation_norm"):
        exact = criteria.score(model.double(), name, "neurons", batches)
        got = criteria.score(copy.deepcopy(model).bfloat16(), name, "neurons", batches)
        for a, b in zip(got.values.values(), exact.values.values(), strict=True):
            assert a.dtype == torch.float32
            assert float((a - b).norm() / b.norm()) < 0.1


# ---- peak memory ----
class Peak(TorchDispatchMode):
    """Bytes of what operators make, at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                size, key = storage.nbytes(), storage._cdata
                self.known[key] = weakref.ref(storage, lambda _, size=size, key=key: self.gone(size, key))
                self.now += size
                self.most = max(self.most, self.now)
        return made

    def gone(self, size: int, key: int) -> None:
        self.now -= size
        self.known.pop(key)


def peak(call: Callable[[], object]) -> int:
    with Peak() as mode:
        call()
    return mode.most


def test_memory_is_that_of_a_training_step() -> None:
    """With a batch small enough for weights to be most of it; of batches as many as there are."""
    model = tiny_models.make("bert", hidden_size=96, intermediate_size=384, vocab_size=100)
    batches = [oracle.labelled(model, seed) for seed in range(6)]
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    one_step = peak(step)
    assert one_step > 3 * 8 * sum(p.numel() for p in model.parameters())  # the gradients and two moments
    for name in ("taylor", "fisher", "taylor_weights", "snip", "obd", "activation_norm", "l2", "thinet"):
        for of in ("heads", "neurons"):
            assert 0 < peak(lambda name=name, of=of: criteria.score(model, name, of, batches)) < one_step, (name, of)  # type: ignore[misc]


# ---- errors ----
def test_errors() -> None:
    model = tiny_models.make("bert")
    batch = oracle.labelled(model, 1)
    for given, message in [
        (("entropy", "heads"), r"criterion: expected one of activation_norm, apoz, .*, got 'entropy'"),
        (("nisp", "layers"), r"of: expected one of heads, neurons, groups with 'nisp', got 'layers'"),
        (
            ("movement", "heads"),
            r"criterion: expected one that needs no training \(for this one: .*track\), got 'movement'",
        ),
        (("taylor", "heads"), r"batches: expected some, as 'taylor' reads them, got None"),
        (("taylor", "heads", []), r"batches: expected at least one, got none"),
        (("apoz", "heads", []), r"batches: expected at least one, got none"),
        (("apoz", "heads", [torch.ones(2, 3)]), r"batches: expected columns, got torch.float32"),
        (("obd", "heads", [torch.ones(2, 3)]), r"batches: expected columns, got torch.float32"),
        (("taylor", "heads", [tiny_models.batch(model)]), r"batches: expected columns, among them labels"),
        (("l1", "blocks"), r"block: expected one that divides bert\.encoder\.layer\.0\..*, \[48, 48\], got \[32, 32\]"),
    ]:
        with pytest.raises(ValueError, match=rf"^kdfast\.prune\.criteria\.score: {message}"):
            criteria.score(model, *given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"settings: expected those of 'apoz': threshold, got seed"):
        criteria.score(model, "apoz", "heads", [batch], seed=1)
    with pytest.raises(ValueError, match=r"settings: expected those of 'l1': none, got seed"):
        criteria.score(model, "l1", "heads", seed=1)
