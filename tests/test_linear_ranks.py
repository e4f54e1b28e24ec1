"""linear_kd_loss and its like over ranks (gloo, 2 and 4): a split vocabulary by process group and by DTensors, and a
head that fully_shard keeps in shards; and what is sent."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from documents import PAGES
from ranks import spawn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.ops._divergence import SECOND_LOOK
from kdfast.ops._heads import WORKSPACE

ROWS, WIDTH, VOCABULARY = 13, 10, 840
UNEVEN = (0, 1, 700, VOCABULARY)  # the last of four shards holds nothing
BUDGET = (32 << 20) + 60_000  # a few rows at a time


def heads(dtype: torch.dtype, seed: int = 3) -> tuple[Tensor, ...]:
    """The student's hidden states and weight, and the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (ROWS, WIDTH), (VOCABULARY, WIDTH))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def arguments(seed: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[4] = -100
    mask, weight = torch.rand(ROWS, generator=generator) < 0.7, torch.rand(ROWS, generator=generator)
    return {"labels": labels, "mask": mask, "weight": weight, "memory_budget": BUDGET}


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad(loss, of, upstream))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert got.shape == expected.shape, what
    precision = {torch.float64: 1e-12, torch.bfloat16: 2**-7}.get(dtype, 2e-6)
    error = (got.double() - expected.double()).norm()
    assert error <= precision * expected.double().norm(), f"{what}: differs by {error} of {expected.norm()}"


def check_vocabulary(rank: int, ranks: int) -> None:
    bounds = (*UNEVEN, VOCABULARY)[:: 4 // ranks]
    even = VOCABULARY // ranks
    splits: list[tuple[int, int, dict[str, Any]]] = [
        (rank * even, (rank + 1) * even, {}),
        (bounds[rank], bounds[rank + 1], {"vocab_start": bounds[rank], "vocab_size": VOCABULARY}),
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for settings in (
            *({"divergence": "kl_div"}, {"divergence": "js_div", "reduction": "none"}, {"topk": 30}),
            {"mask": None, "alpha": 0.8},  # the labels say which rows count
        ):
            h, w, th, tw = heads(dtype)
            given = arguments() | settings
            k = given.pop("topk", None)
            function: Any = kdfast.linear_kd_loss if k is None else kdfast.linear_topk_kd_loss
            known = (th.double() @ tw.double().T).log_softmax(-1).topk(k or 1)
            h.requires_grad_()

            def loss_of(begin: int, end: int, **more: Any) -> tuple[Tensor, list[Tensor]]:
                weight = w[begin:end].detach().requires_grad_()  # noqa: B023
                of_teacher = (th, tw[begin:end]) if k is None else tuple(known)  # noqa: B023
                of = function(h, weight, *of_teacher, **given, return_entropy=True, **more)  # noqa: B023
                return of.loss.detach(), [*gradients(of.loss, h, weight), of.entropy]  # noqa: B023

            loss, (of_hidden, of_weight, entropy) = loss_of(0, VOCABULARY)
            assert of_hidden.any()
            assert entropy.any()
            for begin, end, more in splits:
                what = f"{dtype} {settings} rank {rank} of {ranks}, rows {begin} to {end}"
                got, (ours_hidden, ours_weight, of_student) = loss_of(
                    begin, end, **more, process_group=dist.group.WORLD
                )
                close(got, loss, torch.float64 if dtype == torch.float64 else torch.float32, what)
                close(of_student, entropy, torch.float64 if dtype == torch.float64 else torch.float32, what)
                close(ours_hidden, of_hidden, dtype, what)
                close(ours_weight, of_weight[begin:end], dtype, what)


def check_tensor_parallel(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))
    h, w, th, tw = heads(torch.float32)
    w, tw = w[:-1], tw[:-1]  # an odd vocabulary
    kwargs = arguments() | {"labels": arguments()["labels"] % (VOCABULARY - 1)}
    h, w = h.requires_grad_(), w.detach().requires_grad_()
    loss = kdfast.linear_kd_loss(h, w, th, tw, **kwargs)
    expected = gradients(loss, h, w)
    hidden, of_teacher = (distribute_tensor(x.detach(), mesh, [Replicate()]) for x in (h, th))
    weight, teacher = (distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (w, tw))
    hidden.requires_grad_(), weight.requires_grad_()
    ours = kdfast.linear_kd_loss(hidden, weight, of_teacher, teacher, **kwargs)
    close(ours.detach(), loss.detach(), torch.float32, "loss")
    for got, exact in zip(gradients(ours, hidden, weight), expected, strict=True):
        assert isinstance(got, DTensor)
        close(got.full_tensor(), exact, torch.float32, "gradient")
    with pytest.raises(ValueError, match="student_hidden: expected a replicated DTensor"):
        kdfast.linear_kd_loss(distribute_tensor(h.detach(), mesh, [Shard(0)]), weight, of_teacher, teacher, **kwargs)
    with pytest.raises(ValueError, match="process_group: expected neither"):
        kdfast.linear_kd_loss(hidden, weight, of_teacher, teacher, process_group=dist.group.WORLD, **kwargs)
    with pytest.raises(TypeError, match="teacher_weight: expected a DTensor sharded on dimension 0"):
        kdfast.linear_kd_loss(hidden, weight, of_teacher, tw, **kwargs)


def check_sharded_parameter(rank: int, ranks: int) -> None:
    """Every rank has rows of its own; the gradient of the parameter is the mean over ranks, sharded."""
    mesh = init_device_mesh("cpu", (ranks,))
    whole = heads(torch.float32)[1][:-1]
    for dtype in (torch.float32, torch.bfloat16):
        weight = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
        of_ranks = []
        for other in range(ranks):
            h, _, th, tw = heads(dtype, seed=other)
            plain = whole.to(dtype).requires_grad_()
            kwargs = arguments(other) | {"labels": arguments(other)["labels"] % (VOCABULARY - 1)}
            loss = kdfast.linear_kd_loss(h, plain, th, tw[:-1], **kwargs)
            of_ranks.append((h, th, tw[:-1], kwargs, loss.detach(), gradients(loss, plain)[0].float()))
        h, th, tw, kwargs, loss, _ = of_ranks[rank]
        ours = kdfast.linear_kd_loss(h, weight, th, tw, **kwargs)
        close(ours.detach(), loss, torch.float32, "loss")
        (gradient,) = gradients(ours, weight)
        assert isinstance(gradient, DTensor)
        assert gradient.placements == (Shard(0),)
        close(gradient.full_tensor(), sum(g for *_, g in of_ranks) / ranks, dtype, "gradient")


def sizes_of_page(**numbers: int) -> dict[str, int]:
    """What docs/large_vocabularies.md says is sent, by the beginnings of its tables' rows."""
    rows = re.findall(r"^\| ([^|]+) \| (?:a \w+) \| ([^|]+) \|", PAGES["docs/large_vocabularies.md"], flags=re.M)
    return {what: eval(size.replace("·", "*"), dict(numbers)) for what, size in rows}


@contextmanager
def all_reduces() -> Iterator[dict[str, list[int]]]:
    """The bytes of each, by what is reduced."""
    sent: dict[str, list[int]] = defaultdict(list)
    original = dist.all_reduce
    names = {dist.ReduceOp.MIN: "min", dist.ReduceOp.MAX: "max"}

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **given: Any) -> Any:
        sent[names.get(op) or f"sum of {x.shape[-1]}"].append(x.nbytes)
        return original(x, op, **given)

    with patch.object(dist, "all_reduce", all_reduce):
        yield sent


class OfShards(TorchDispatchMode):
    """The bytes of what is gathered and scattered, all of it."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []
        self.parts = {"all_gather_into_tensor": ranks, "reduce_scatter_tensor": 1}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.parts:
            self.sent.append((name, args[0].nbytes * self.parts[name]))
        return function(*args, **(kwargs or {}))


def check_collectives(rank: int, ranks: int) -> None:
    """How often and how much, against the page."""
    h, w, th, tw = (x.chunk(ranks)[rank] if len(x) == VOCABULARY else x for x in heads(torch.float32))
    h, w = h.requires_grad_(), w.detach().requires_grad_()
    expected = sizes_of_page(N=ROWS, H=WIDTH, V=VOCABULARY, b=2)
    budgets, maxima, sums, again, of_hidden, gathered, scattered, of_teacher = expected.values()
    given = {"alpha": 1.0, "memory_budget": WORKSPACE + 12 * w[:, 0].nbytes, "process_group": dist.group.WORLD}
    for divergence in ("kl_div", *SECOND_LOOK):
        with all_reduces() as sent:
            kdfast.linear_kd_loss(h, w, th, tw, divergence=divergence, **given).backward()
        chunks = len(sent["max"])
        assert 1 < chunks < ROWS
        looks = {"sum of 2": (chunks, again)} if divergence in SECOND_LOOK else {}
        found = {name: (len(sizes), sum(sizes)) for name, sizes in sent.items()}
        once = {"min": (1, budgets), f"sum of {WIDTH}": (1, of_hidden)}
        assert found == {**once, "max": (chunks, maxima), "sum of 7": (chunks, sums), **looks}, divergence
    mesh = init_device_mesh("cpu", (ranks,))
    h, w, th, tw = heads(torch.bfloat16)
    weight, teacher = (distribute_tensor(x.float(), mesh, [Shard(0)]) for x in (w, tw))
    with OfShards(ranks) as of:
        kdfast.linear_kd_loss(h, weight.requires_grad_(), th, teacher, alpha=1.0).backward()
    gather, scatter = of.parts
    assert of.sent == [(gather, gathered), (gather, of_teacher), (scatter, scattered)]


CHECKS = {
    "collectives": check_collectives,
    "vocabulary": check_vocabulary,
    "tensor_parallel": check_tensor_parallel,
    "fsdp": check_sharded_parameter,
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_ranks_agree_with_one_process(ranks: int, check: str, tmp_path: Path) -> None:
    spawn(CHECKS[check], ranks, tmp_path, ranks)
