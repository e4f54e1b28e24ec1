"""Linear layers of which a part lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.bench.registry import floors
from kdfast.bench.registry.operator import Operator, Sample
from kdfast.ops import block_sparse, prefix, selected
from kdfast.ops._block_layout import BlockLayout

Make = Callable[[torch.Generator, float], tuple[Any, Any]]


def _layer(*x: int, weight: tuple[int, int], strided: bool = False) -> Make:
    """An input and a weight, which has nobody to be apart from; strided: both transposed in memory."""

    def make(generator: torch.Generator, gap: float) -> tuple[Any, Any]:
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (x, weight)]
        return tuple(t.mT.contiguous().mT if strided else t for t in made), ()

    return make


def _with_bias(outputs: int, **kwargs: Any) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda g: {"bias": torch.randn(outputs, generator=g, dtype=torch.float64), **kwargs}


_PREFIX_SAMPLES = (
    Sample("both", "rows and columns", _layer(7, 19, weight=(31, 40)), _with_bias(31, in_features=19, out_features=13)),
    Sample("outputs", "rows alone", _layer(3, 5, 40, weight=(31, 40)), lambda g: {"out_features": 1}),
    Sample("inputs", "columns alone", _layer(9, weight=(31, 40)), _with_bias(31, in_features=9)),
    Sample("whole", "nothing dead", _layer(2, 1, 3, 40, weight=(31, 40)), _with_bias(31)),
    Sample("strided", "transposed memory", _layer(6, 8, weight=(31, 40), strided=True), lambda g: {"in_features": 8}),
)

_ROWS = torch.tensor([0, 1, 2, 7, 9, 15, 16, 29, 30])
# Whole words of 32 live and dead ones, single columns, the last one.
_COLUMNS = torch.cat((torch.arange(33), torch.tensor([35, 40, 46, 47, 96, 99, 129])))
_NARROW = _layer(7, len(_COLUMNS), weight=(31, 130))
_SELECTED_SAMPLES = (
    Sample("part", "rows and columns", _NARROW, _with_bias(31, rows=_ROWS, columns=_COLUMNS)),
    Sample("outputs", "rows alone", _layer(3, 5, 40, weight=(31, 40)), _with_bias(31, rows=_ROWS)),
    Sample("inputs", "columns alone", _NARROW, lambda g: {"columns": _COLUMNS}),
    Sample("whole", "nothing dead", _layer(2, 1, 3, 40, weight=(31, 40)), _with_bias(31)),
    Sample(
        "strided",
        "transposed memory",
        _layer(6, len(_COLUMNS), weight=(31, 130), strided=True),
        lambda g: {"rows": _ROWS, "columns": _COLUMNS},
    ),
)


def _made(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """rows, inputs, outputs: half of the larger of these live."""
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs if inputs < outputs else inputs // 2, **options)
    return (x, torch.randn(outputs, inputs, **options).mul_(inputs**-0.5)), ()


def _sizes(student: Any) -> dict[str, Any]:
    x, _ = student
    return {"in_features": x.shape[-1], "out_features": _outputs(student)}


def _outputs(student: Any) -> int:
    x, weight = student
    return int(weight.shape[0]) // (2 if x.shape[-1] == weight.shape[1] else 1)


def _indices(student: Any) -> dict[str, Any]:
    """Neurons here and there."""
    x, weight = student
    name, count = ("rows", weight.shape[0]) if x.shape[-1] == weight.shape[1] else ("columns", weight.shape[1])
    live = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 2].sort().values
    return {name: live.to(x.device)}


def _flops(student: Any, gradient: bool) -> float:
    """Three products of the part that lives, or one."""
    x, _ = student
    return float((6 if gradient else 2) * x.numel() * _outputs(student))


# ---- blocks ----
_LEADING = torch.tensor([[True, False, True], [False, False, False], [True, False, True], [False, False, True]])


def _blocks(*leading: int, mask: Tensor, block: tuple[int, int], strided: bool = False, bias: bool = True) -> Any:
    """What a sample is made by: an input and live blocks, and the layout with a bias."""
    layout = BlockLayout(mask, block)
    make = _layer(*leading, layout.shape[1], weight=(layout.count, *block), strided=strided)  # type: ignore[arg-type]
    return make, _with_bias(layout.shape[0], layout=layout) if bias else lambda g: {"layout": layout}


_WIDE = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.6
_BLOCK_SAMPLES = (
    Sample("part", "a block row, and a block column, without any", *_blocks(7, mask=_LEADING, block=(32, 32))),
    Sample("tall", "blocks higher than wide", *_blocks(3, 5, mask=_LEADING, block=(128, 32))),
    Sample("wide", "wider, of an odd width of tiles", *_blocks(67, mask=_WIDE, block=(32, 96), bias=False)),
    Sample("strided", "transposed memory", *_blocks(6, mask=_WIDE, block=(64, 64), strided=True)),
    Sample("whole", "nothing dead", *_blocks(2, 1, 3, mask=torch.ones(2, 3) > 0, block=(96, 64))),
    Sample("none", "no live block", *_blocks(5, mask=torch.zeros(2, 2) > 0, block=(32, 64))),
)
_SIDE, _DENSITY = 64, 0.25


def _made_blocks(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """rows, inputs, outputs: a quarter of the blocks lives."""
    rows, inputs, outputs = shape
    if inputs % _SIDE or outputs % _SIDE or (inputs // _SIDE) * (outputs // _SIDE) * _DENSITY % 1:
        expected = f"features in blocks of {_SIDE}, four blocks or a multiple of it"
        raise ValueError(f"block_sparse_linear: shape: expected {expected}, got {inputs}, {outputs}")
    count = int(_DENSITY * (inputs // _SIDE) * (outputs // _SIDE))
    x = torch.randn(rows, inputs, **options)
    return (x, torch.randn(count, _SIDE, _SIDE, **options).mul_((_DENSITY * inputs) ** -0.5)), ()


def _layout(student: Any) -> dict[str, Any]:
    """Blocks here and there."""
    x, values = student
    columns, all_blocks = x.shape[-1] // _SIDE, int(len(values) / _DENSITY)
    mask = torch.zeros(all_blocks, dtype=torch.bool)
    mask[torch.randperm(all_blocks, generator=torch.Generator().manual_seed(0))[: len(values)]] = True
    return {"layout": BlockLayout(mask.view(-1, columns), (_SIDE, _SIDE)).to(x.device)}


def _block_flops(student: Any, gradient: bool) -> float:
    x, values = student
    return float((6 if gradient else 2) * x.numel() // x.shape[-1] * values.numel())


_CPU_SHAPES = tuple(
    ((rows, *sizes), dtype)
    for sizes in ((768, 3072), (3072, 768))
    for rows, dtype in ((64, "float32"), (512, "float32"), (512, "bfloat16"))
)
_CUDA_SHAPES = tuple(((4096, *sizes), "bfloat16") for sizes in ((768, 3072), (3072, 768)))
_OF_PARTS: dict[str, Any] = {
    "make": _made, "flops": _flops, "floors": floors.of_matmuls, "cuda_shapes": _CUDA_SHAPES
}  # fmt: skip


def _operator(name: str, function: Callable[..., Tensor], reference: Callable[..., Tensor], **more: Any) -> Operator:
    return Operator(name, function, reference, product=True, cpu_shapes=_CPU_SHAPES, **_OF_PARTS | more)


PRUNED: dict[str, Operator] = {
    "prefix_linear": _operator(
        "prefix_linear",
        prefix.prefix_linear,
        prefix.prefix_linear_reference,
        native=(),
        samples=_PREFIX_SAMPLES,
        eager=prefix.prefix_linear_reference,
        arguments=_sizes,
    ),
    "selected_linear": _operator(
        "selected_linear",
        selected.selected_linear,
        selected.selected_linear_reference,
        native=("pack_part", "unpack_part_"),
        samples=_SELECTED_SAMPLES,
        eager=selected.selected_linear_reference,  # dense, times a mask: benchmarks/pruned_linear.py
        arguments=_indices,
    ),
    "block_sparse_linear": _operator(
        "block_sparse_linear",
        block_sparse.block_sparse_linear,
        block_sparse.block_sparse_linear_reference,
        native=("block_sparse_product", "block_sparse_gradient"),
        samples=_BLOCK_SAMPLES,
        eager=block_sparse.block_sparse_linear_reference,  # whose weight lies whole: benchmarks/block_sparse.py
        make=_made_blocks,
        arguments=_layout,
        flops=_block_flops,
        floors=floors.of_blocks,
        exact=2**-41,  # the reference rounds as many sums
    ),
}
