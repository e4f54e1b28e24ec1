"""Which blocks of a matrix live, and the module of a layer that has only these."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdfast
from kdfast import BlockLayout
from kdfast.nn import BlockSparseLinear

MASK = torch.tensor([[True, False, True, False], [False] * 4, [True, False, False, False]])
LAYOUT = BlockLayout(MASK, (32, 64))


# ---- layouts ----
def weight(layout: BlockLayout) -> Tensor:
    """Random numbers where blocks live."""
    torch.manual_seed(0)
    return torch.randn(layout.shape) * layout.mask.repeat_interleave(layout.block[0], 0).repeat_interleave(
        layout.block[1], 1
    )


def test_what_a_layout_says() -> None:
    assert LAYOUT.shape == (96, 256)
    assert (LAYOUT.count, LAYOUT.density, LAYOUT.block) == (3, 0.25, (32, 64))
    assert [x.tolist() for x in LAYOUT.rows] == [[0, 2, 2, 3], [0, 2, 0], [0, 1, 2]]
    assert [x.tolist() for x in LAYOUT.columns] == [[0, 2, 2, 3, 3], [0, 2, 0], [0, 2, 1]]
    assert repr(LAYOUT) == "BlockLayout(96 × 256, 3 of 12 blocks of 32 × 64 live)"
    mask = MASK.clone()
    kept = BlockLayout(mask, (32, 64))
    mask[1] = True
    assert kept == LAYOUT


@pytest.mark.parametrize("mask", [MASK, torch.ones(2, 3) > 0, torch.zeros(2, 3) > 0], ids=["part", "all", "none"])
def test_values_there_and_back(mask: Tensor) -> None:
    """In row-major order of the mask; blocks with a number, NaN too, are those that live."""
    layout = BlockLayout(mask, (96, 32))
    whole = weight(layout)
    values = layout.values_of(whole)
    at = mask.nonzero().tolist()
    assert values.shape == (len(at), 96, 32)
    for block, (i, j) in zip(values, at, strict=True):
        assert torch.equal(block, whole[96 * i : 96 * (i + 1), 32 * j : 32 * (j + 1)])
    assert torch.equal(layout.dense(values), whole)
    sparse = torch.zeros_like(whole)
    for i, j in at:
        sparse[96 * i + 95, 32 * j] = torch.nan
    assert BlockLayout.from_weight(sparse, (96, 32)) == layout
    assert BlockLayout.from_weight(whole, (96, 32)) == layout


def test_gradients_of_both_ways() -> None:
    whole = weight(LAYOUT).requires_grad_()
    values = LAYOUT.values_of(whole)
    values.backward(torch.ones_like(values))
    assert torch.equal(whole.grad, LAYOUT.dense(torch.ones_like(values)))  # type: ignore[arg-type]
    leaf = values.detach().requires_grad_()
    LAYOUT.dense(leaf).backward(whole.detach())
    assert torch.equal(leaf.grad, values)  # type: ignore[arg-type]


def test_equality_and_state() -> None:
    others = (BlockLayout(MASK, (64, 32)), BlockLayout(~MASK, (32, 64)), BlockLayout(MASK[:2], (32, 64)), "layout")
    assert all(other != LAYOUT for other in others)
    file = io.BytesIO()
    torch.save(LAYOUT.state(), file)
    file.seek(0)
    again = (BlockLayout.from_state(torch.load(file)), pickle.loads(pickle.dumps(LAYOUT)), copy.deepcopy(LAYOUT))
    assert all(layout == LAYOUT for layout in again)
    assert LAYOUT.to("cpu") is LAYOUT
    moved = LAYOUT.to("meta")
    assert {x.device.type for x in (moved.mask, *moved.rows, *moved.columns)} == {"meta"}
    assert moved.shape == LAYOUT.shape


BAD: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "mask: expected a bool tensor, True where a block lives, got torch.int64", lambda: BlockLayout(MASK.long(), (32, 64))),
    (TypeError, "mask: expected a bool tensor, .*, got list", lambda: BlockLayout([[True]], (32, 64))),  # type: ignore[arg-type]
    (ValueError, r"mask: expected \[out / rows, in / columns\], .*, got shape \[4\]", lambda: BlockLayout(MASK[0], (32, 64))),
    (ValueError, r"mask: expected .*, at least one block, got shape \[0, 4\]", lambda: BlockLayout(MASK[:0], (32, 64))),
    (ValueError, r"block: expected two sides of 32, 64, 96 or 128, got \(16, 64\)", lambda: BlockLayout(MASK, (16, 64))),
    (ValueError, r"block: expected two sides .*, got \(32,\)", lambda: BlockLayout(MASK, (32,))),  # type: ignore[arg-type]
    (TypeError, "block: expected two sides .*, got 32", lambda: BlockLayout(MASK, 32)),  # type: ignore[arg-type]
    (ValueError, r"from_weight: weight: expected \[out, in\], multiples of the block's 32 and 64, got shape \[33, 64\]", lambda: BlockLayout.from_weight(torch.ones(33, 64), (32, 64))),
    (ValueError, r"values_of: weight: expected \[96, 256\], got shape \[96, 255\]", lambda: LAYOUT.values_of(torch.ones(96, 255))),
    (ValueError, r"dense: values: expected \[3, 32, 64\], got shape \[2, 32, 64\]", lambda: LAYOUT.dense(torch.ones(2, 32, 64))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[b[1][:30] for b in BAD])
def test_a_layout_refuses(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=rf"^BlockLayout(\.|: ){message}"):
        call()


# ---- the module ----
@pytest.fixture
def layer() -> BlockSparseLinear:
    torch.manual_seed(0)
    return BlockSparseLinear(LAYOUT)


def same(layer: BlockSparseLinear, linear: nn.Module) -> None:
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("bias", [True, False])
def test_from_a_linear_and_back(bias: bool) -> None:
    linear = nn.Linear(256, 96, bias).eval()
    linear.weight.requires_grad_(False)
    layer = BlockSparseLinear.from_linear(linear, MASK, (32, 64))
    assert not layer.training
    assert not layer.values.requires_grad
    dense = layer.to_linear()
    assert torch.equal(dense.weight, LAYOUT.dense(LAYOUT.values_of(linear.weight)))
    assert (dense.bias is None) == (not bias)
    same(layer, dense)
    again = BlockSparseLinear.from_linear(dense, block=(32, 64))
    assert again.layout == LAYOUT
    same(layer, again)
    assert layer.values.data_ptr() != again.values.data_ptr()


def test_trains(layer: BlockSparseLinear) -> None:
    torch.manual_seed(1)
    x, wanted = torch.randn(64, 256), torch.randn(64, 96)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_state(layer: BlockSparseLinear) -> None:
    """A state of other blocks makes the layer one of these; one that does not fit is refused, and changes nothing."""
    state = layer.state_dict()
    assert {name: list(x.shape) for name, x in state.items()} == {"values": [3, 32, 64], "bias": [96], "mask": [3, 4]}
    for assign in (False, True):
        other = BlockSparseLinear(BlockLayout(MASK.flip(0) | MASK, (32, 64)))
        other(torch.ones(1, 256)).sum().backward()
        other.load_state_dict(state, assign=assign)
        assert other.layout == LAYOUT
        same(other, layer)
        other(torch.ones(1, 256)).sum().backward()
        assert other.values.grad is not None
        assert other.values.grad.shape == other.values.shape
    before = layer.layout
    blocks = r"values: expected the mask's blocks, \[{}, 32, 64\], got shape \[{}, 32, 64\]"
    for wrong, message in (
        ({"mask": MASK[:2]}, "size mismatch for mask"),
        ({"values": torch.ones(2, 32, 64)}, blocks.format(3, 2)),
        ({"mask": torch.ones(3, 4) > 0}, blocks.format(12, 3)),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state | wrong)
        assert layer.layout is before
        assert torch.equal(layer.mask, MASK)


def test_copies_and_moves(layer: BlockSparseLinear) -> None:
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(other, layer)
    assert layer.bfloat16()(torch.randn(3, 256).bfloat16()).dtype == torch.bfloat16
    assert layer.mask.dtype == torch.bool
    empty = BlockSparseLinear(LAYOUT, device="meta")
    assert empty(torch.empty(3, 256, device="meta")).shape == (3, 96)
    empty.to_empty(device="cpu").reset_parameters()
    assert torch.equal(empty.mask, MASK)
    same(empty, empty.to_linear())


def test_a_compiled_module(layer: BlockSparseLinear) -> None:
    torch.compiler.reset()
    x = torch.randn(4, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.any()


def test_says_what_to_expect(layer: BlockSparseLinear) -> None:
    shown = "in_features=256, out_features=96, bias=True, block=(32, 64), density=0.25, expected 3.1 × as fast"
    assert repr(layer) == f"BlockSparseLinear({shown})"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockSparseLinear(BlockLayout(torch.arange(10)[None] < 8, (32, 32)))
    with pytest.warns(UserWarning, match=r"BlockSparseLinear: layout: 90% of its blocks live, .* 1.00 × the speed"):
        BlockSparseLinear(BlockLayout(torch.arange(10)[None] < 9, (32, 32)))


def test_refuses() -> None:
    linear, from_linear = nn.Linear(256, 96), BlockSparseLinear.from_linear
    with pytest.raises(TypeError, match=r"^BlockSparseLinear: layout: expected a kdfast\.BlockLayout, got"):
        BlockSparseLinear(MASK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^BlockSparseLinear\.from_linear: linear: expected an nn.Linear that is no"):
        from_linear(kdfast.nn.SelectedLinear(256, 96), MASK, (32, 64))
    with pytest.raises(ValueError, match=r"^BlockSparseLinear\.from_linear: mask: expected \[out / 32, in / 32\]"):
        from_linear(linear, MASK, (32, 32))
    with pytest.raises(ValueError, match=r"^BlockLayout\.from_weight: weight: expected \[out, in\], multiples"):
        from_linear(linear, block=(64, 64))


# ---- in models that are pruned ----
