"""Models whose linear maps have only some blocks: masked, made smaller, saved and loaded as the dense ones with zeros."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pruned_oracle as oracle
import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn

import kdfast
from kdfast.nn import BlockSparseLinear
from kdfast.prune.layers import layers_of

# Twelve heads of 16 (two are a block of 32), six groups where there are groups; 224 neurons.
SIZES: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 224}
CHANGES = {"bert": SIZES, "llama": {**SIZES, "num_key_value_heads": 6}, "modernbert": SIZES}
EVERY = pytest.mark.parametrize("name", CHANGES)
BLOCK = (32, 32)


def pruned(name: str, keep: float = 0.6) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model of blocks, the same with dense maps and zeros, and the masks of blocks."""
    model = tiny_models.make(name, num_hidden_layers=2, **CHANGES[name])
    scores = kdfast.prune.criteria.score(model, "magnitude", of="blocks", block=BLOCK)
    live = kdfast.prune.select_blocks(scores, keep, scope="local")
    dense = copy.deepcopy(model)
    for place, mask in live.items():
        dense.get_submodule(place).weight.data.mul_(mask.repeat_interleave(32, 0).repeat_interleave(32, 1))
    kdfast.prune.keep_blocks(model, live)
    return model, dense, live


def outputs(model: nn.Module) -> Tensor:
    found: Tensor = model(**tiny_models.batch(model)).logits
    return found


def same(model: nn.Module, other: nn.Module) -> None:
    wanted = outputs(other)
    assert wanted.std() > 0.01
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-10, atol=1e-10)


def maps_of_blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)]


@EVERY
def test_computes_and_trains_as_with_zeros(name: str) -> None:
    model, dense, live = pruned(name)
    assert maps_of_blocks(model) == [name for name, _ in model.named_modules() if name in live]
    same(model, dense)
    outputs(model).square().sum().backward()
    outputs(dense).square().sum().backward()
    for place in live:
        layer, gradient = model.get_submodule(place), dense.get_submodule(place).weight.grad
        torch.testing.assert_close(layer.values.grad, layer.layout.values_of(gradient))
        assert layer.values.grad.abs().sum() > 0


@EVERY
def test_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, dense, live = pruned(name)
    model.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("*.bin")]
    kind = hf.AutoModelForCausalLM if name in tiny_models.CAUSAL else hf.AutoModelForSequenceClassification
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float64)
    assert maps_of_blocks(loaded) == maps_of_blocks(model)
    for place, mask in live.items():
        assert torch.equal(loaded.get_submodule(place).layout.mask, mask)
    same(loaded, dense)
    loaded.save_pretrained(tmp_path / "again")
    same(kind.from_pretrained(tmp_path / "again", dtype=torch.float64), dense)


@EVERY
def test_masked_and_smaller(name: str, tmp_path: Path) -> None:
    """Of the twelve heads and 224 neurons whole blocks go in one layer, others in the next, whose maps get dense."""
    model, dense, _ = pruned(name)
    masks = kdfast.prune.Masks.full(model)
    masks.heads[0][[0, 1, 6, 7]] = False
    masks.neurons[0][[*range(10, 30), *range(60, 72)]] = False
    masks.heads[1][[2, 3, 4, 5, 9]] = False
    masks.neurons[1][50:55] = False
    wanted = oracle.masked(dense, masks)
    smaller = kdfast.prune.compact(model, masks)
    same(smaller, wanted)
    first, second = layers_of(smaller, of_blocks=True)
    for layer, kind in ((first, BlockSparseLinear), (second, nn.Linear)):
        assert isinstance(layer.module.get_submodule(layer.adapter.contract), kind)
    sizes = [sum(p.numel() for p in layers_of(x, of_blocks=True)[0].module.parameters()) for x in (smaller, model)]
    assert sizes[0] < 0.9 * sizes[1]
    smaller.save_pretrained(tmp_path)
    auto = hf.AutoModelForCausalLM if name in tiny_models.CAUSAL else hf.AutoModelForSequenceClassification
    same(auto.from_pretrained(tmp_path, dtype=torch.float64), wanted)
    kdfast.prune.apply(model, masks)
    same(model, wanted)
    outputs(model).square().sum().backward()
    values = model.get_submodule(maps_of_blocks(model)[0]).values
    assert values.grad.abs().sum() > 0
    kdfast.prune.remove(model)
    same(model, dense)


def test_a_block_that_lives_stays_though_it_is_zero() -> None:
    model, _, _ = pruned("bert")
    place = maps_of_blocks(model)[0]
    with torch.no_grad():
        model.get_submodule(place).values[0] = 0
    smaller = kdfast.prune.compact(model, kdfast.prune.Masks.full(model))
    assert smaller.get_submodule(place).layout == model.get_submodule(place).layout


def test_arithmetic_is_that_of_blocks() -> None:
    model, dense, _ = pruned("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing gets faster at this size
        report = kdfast.prune.report(dense, model, tiny_models.batch(model), repeats=1)
    rows = tiny_models.batch(model)["input_ids"].numel()
    dead = sum(
        1024 * int((~module.layout.mask).sum()) for module in model.modules() if isinstance(module, BlockSparseLinear)
    )
    assert dead > 0
    assert report.before.gflop - report.after.gflop == pytest.approx(2e-9 * rows * dead)
    assert report.before.parameters - report.after.parameters == dead


def test_errors() -> None:
    model = tiny_models.make("bert", num_hidden_layers=1, **SIZES)
    place, keep = "bert.encoder.layer.0.attention.self.query", kdfast.prune.keep_blocks
    start = r"^kdfast\.prune\.keep_blocks: live: expected "
    before = dict(model.named_modules())
    good = {place: torch.eye(6) > 0}
    with pytest.raises(ValueError, match=start + r"names of linear maps, as bert\.encoder.*, got 'query'"):
        keep(model, {**good, "query": torch.eye(6) > 0})
    with pytest.raises(ValueError, match=start + rf".*that divide {place}, \[192, 192\], got shape \[5, 6\]"):
        keep(model, {place: torch.ones(5, 6) > 0})
    with pytest.raises(ValueError, match=start + rf"\[rows of blocks, columns of blocks\] of {place}, got list"):
        keep(model, {place: [[True]]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="two sides of 32, 64, 96 or 128, got"):
        keep(model, {place: torch.ones(12, 12) > 0})
    with pytest.raises(TypeError, match=r"^BlockLayout: mask: expected a bool tensor"):
        keep(model, {place: torch.eye(6)})
    assert dict(model.named_modules()) == before
    masks = kdfast.prune.Masks.full(model)
    masks.neurons[0][3] = False
    kdfast.prune.apply(model, masks)
    with pytest.raises(TypeError, match=r"keep_blocks: model: expected one without masks"):
        keep(model, good)
    kdfast.prune.remove(model)
    keep(model, good)
    with pytest.raises(TypeError, match=start + rf"names of modules that are nn.Linear, as {place}, got BlockSparse"):
        keep(model, good)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ValueError, match=r"compact: optimizer: expected None for a model with maps of blocks, got AdamW"
    ):
        kdfast.prune.compact(model, masks, optimizer)
    masks.hidden = torch.arange(192) < 96
    with pytest.raises(ValueError, match=r"compact: masks\.hidden: expected None for a model with maps of blocks"):
        kdfast.prune.compact(model, masks)
    with pytest.raises(TypeError, match=r"kdfast\.prune\.rewire: model: expected .*to_linear"):
        kdfast.prune.rewire(model, [torch.ones(12)], [torch.ones(224)])


def test_nothing_of_a_sublayer_is_left(tmp_path: Path) -> None:
    model, dense, _ = pruned("bert")
    masks = kdfast.prune.Masks.full(model)
    masks.heads[0][:] = False
    masks.neurons[1][:] = False
    smaller = kdfast.prune.compact(model, masks)
    same(smaller, oracle.masked(dense, masks))
    smaller.save_pretrained(tmp_path)
    same(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64), smaller)
