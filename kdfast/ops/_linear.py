"""Losses of hidden · weightᵀ without its logits: the loop over rows, its raw operator and its autograd Function.

Four matrix products and none of them twice: the logits of both sides, chunk by chunk (kdfast/ops/_chunks.py); then, of
a slab of chunks, the gradients of hidden states and weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import _checks, _chunks, _divergence, _heads, _transforms
from kdfast.ops._divergence import KNOWN_EVERYTHING, KNOWN_NOTHING, SAVE_NOTHING, Call
from kdfast.ops._heads import WORKSPACE, Gradients, Head, Widening

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NONE, MEAN, SUM = (_checks.REDUCTIONS[name] for name in ("none", "mean", "sum"))


class Loop:
    """Over rows that all count. The teacher is a head, or what is given of it [..., D]: logits, or log-probabilities of
    the columns `call.indices`; the rows are at `places` there, None: all of them."""

    def __init__(
        self,
        op: str,
        student: Head,
        teacher: Head | None,
        given: Tensor | None,
        places: Tensor | None,
        call: Call,
        group: ProcessGroup | None,
        wanted: list[bool],
    ) -> None:
        self.op, self.student, self.teacher, self.given, self.places = op, student, teacher, given, places
        self.call, self.group, self.wanted = call, group, wanted
        dtype, self.on_gpu, self.gradient = student.weight.dtype, _heads.on_gpu(student.weight), any(wanted)
        self.logits_dtype = torch.promote_types(dtype, torch.float32)
        self.widening = Widening(self.logits_dtype)
        # Products of gradients take the inputs' dtype on the GPU; without gradients the logits are alone.
        self.dtype = dtype if self.on_gpu and self.gradient else self.logits_dtype
        # On the CPU gradients take the place of the student's logits, but for a soft-cap's, which needs both.
        self.apart = self.gradient and (self.on_gpu or student.softcap > 0)
        # From one row of logits to the next: whole 128-byte lines of the GPU.
        self.width = -(-call.columns // 64) * 64 if self.on_gpu else call.columns

    def plan(self, budget: int) -> _chunks.Plan:
        """`budget`: bytes; 0: whatever suits the device."""
        row_bytes = self.width * self.dtype.itemsize
        if self.given is not None and self.places is not None:  # its rows are copied
            row_bytes += self.given.shape[-1] * self.given.element_size()
        tail = (self.apart + (self.teacher is not None)) * self.logits_dtype.itemsize // self.dtype.itemsize
        workspace = 0 if self.on_gpu else WORKSPACE
        budget = budget or _chunks.automatic(self.student.weight.device)
        fits = (budget - workspace) // max(row_bytes, 1)  # a shard may have no columns
        if self.group is not None:  # the ranks' chunks are the same
            least = torch.tensor(fits, device=self.student.weight.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
            fits = int(least)
        if fits < 1 + tail:
            needed = row_bytes * (1 + tail) + workspace
            expected = f"{needed} bytes or more, for a row of logits and {workspace} bytes of workspace"
            _checks.wrong_value(self.op, "memory_budget", expected, budget)
        several = self.on_gpu and self.wanted[1]
        return _chunks.plan(self.student.hidden.shape[0], fits, tail, self.on_gpu, several)

    def run(self, budget: int, padding: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss and components, of every row in turn or of all; and the gradients, `padding` rows of weight more."""
        plan = self.plan(budget) if self.student.hidden.shape[0] else _chunks.Plan([], 0)
        memory = self.student.weight.new_empty(plan.memory, self.width, dtype=self.dtype)
        sharded = self.group is not None
        gradients = Gradients(self.student, self.widening, padding, self.wanted, len(plan.slabs), sharded)
        results = []
        for slab in plan.slabs:
            rows = slice(slab[0].begin, slab[-1].end)
            results += [self.chunk(slice(*chunk), rows.start, memory) for chunk in slab]
            if self.gradient:
                gradients.add(rows, memory[: rows.stop - rows.start, : self.call.columns])
        return *self.reduced(results), self.finished(gradients)

    def chunk(self, rows: slice, begin: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and components of a chunk of the slab that begins at row `begin`; its gradients go into the memory."""
        g = memory[rows.start - begin : rows.stop - begin]
        tail = self.tail(memory, rows.stop - rows.start)
        s = next(tail) if self.apart else g
        self.student.logits(rows, s[:, : self.call.columns], self.widening)
        if self.teacher is not None:
            t = next(tail)
            self.teacher.logits(rows, t[:, : self.call.columns], self.widening)
        else:
            assert self.given is not None
            t = rows_of(self.given, rows if self.places is None else self.places[rows])
        call = self.call.rows(lambda x: x[rows])
        state = None if self.group is None else _divergence.state_of(self.group, s, t, call)
        known = KNOWN_NOTHING if state is None else KNOWN_EVERYTHING
        if not self.gradient:
            loss, components, _ = torch.ops.kdfast.divergence(s, t, *call, state, known, SAVE_NOTHING)
            return loss, components
        loss, components = torch.ops.kdfast.divergence_into(g, s, t, *call, state, known)
        if self.student.softcap:
            self.student.through_softcap(s, g)
        return loss, components

    def tail(self, memory: Tensor, rows: int) -> Iterator[Tensor]:
        """Places for float32 logits of some rows, from the end of the memory on."""
        each, end = rows * self.logits_dtype.itemsize // self.dtype.itemsize, memory.shape[0]
        while True:
            yield memory[end - each : end].view(-1).view(self.logits_dtype).view(rows, self.width)
            end -= each

    def reduced(self, results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not results:
            loss, components = _divergence.new_results(self.student.weight, (0,), self.call)
            return loss.zero_(), components.zero_()
        together = torch.cat if self.call.reduction == NONE else lambda parts: torch.stack(parts).sum(0)
        return together([loss for loss, _ in results]), together([parts for _, parts in results])

    def finished(self, gradients: Gradients) -> list[Tensor]:
        if self.group is not None and self.wanted[0]:
            dist.all_reduce(gradients.hidden, group=self.group)
        return [x.to(gradients.dtype) for x in (gradients.hidden, gradients.weight, gradients.bias)]


def rows_of(x: Tensor, at: Tensor | slice) -> Tensor:
    """Some rows of [..., D]; a copy where memory keeps them apart, of these alone."""
    if isinstance(at, slice):
        try:
            return x.view(-1, x.shape[-1])[at]
        except RuntimeError:
            at = torch.arange(at.start, at.stop, device=x.device)
    return x[torch.unravel_index(at, x.shape[:-1])]


def with_denominators(call: Call, like: Tensor) -> Call:
    """A mean over all rows, for calls that see some of them each."""
    if call.reduction != MEAN or call.num_items is not None:
        return call
    counted = call.mask if call.mask is not None else like.new_ones(like.shape[0], dtype=torch.bool)
    labelled = counted if call.labels is None else counted & (call.labels != call.ignore_index)
    return call._replace(num_items=torch.stack((counted.sum(), labelled.sum())).to(_checks.loss_dtype(like)))


def linear_divergence(
    op: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    student_softcap: float,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_softcap: float,
    given: Tensor | None,
    group: str | None,
    budget: int,
    wanted: list[bool],
    *args: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The raw operator. Rows that do not count are dropped before any product; but not in a CUDA graph, where their
    number cannot be asked for: there they are calculated and do not count."""
    call, places, rows = Call(*args), None, student_hidden.shape[0]
    if call.mask is not None and not (student_hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
        places = call.mask.nonzero().squeeze(1)
        call = call._replace(mask=None)
        if len(places) == rows:
            places = None
        else:
            call = call.rows(lambda x: x[places])
            student_hidden = student_hidden[places]
            teacher_hidden = None if teacher_hidden is None else teacher_hidden[places]
    call = with_denominators(call, student_hidden)
    student = Head(student_hidden, student_weight, student_bias, student_softcap).first(call.columns)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap).first(call.columns)
    of_group = None if group is None else _group_named(group)
    padding = student_weight.shape[0] - student.weight.shape[0]
    loop = Loop(op, student, teacher, given, places, call, of_group, wanted)
    with torch.autocast(student_hidden.device.type, enabled=False):  # would round the products
        loss, components, gradients = loop.run(budget, padding)
    if places is not None and call.reduction == NONE:
        loss, components = (_spread(x, places, rows) for x in (loss, components))
    if places is not None and wanted[0]:
        gradients[0] = _spread(gradients[0], places, rows)
    return loss, components, gradients


def _group_named(name: str) -> ProcessGroup:
    # Raw operators take no process groups; torch's own functional collectives find them so too.
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(name))  # type: ignore[attr-defined,no-any-return]


def _spread(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """Rows back where they were, zeros between them."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)


# A Call's part of the native schema, after student and teacher.
_CALL = ", ".join(str(torch.ops.kdfast.divergence.default._schema).split(", ")[2 : 2 + len(Call._fields)])
torch.library.define(
    "kdfast::linear_divergence",
    "(str op, Tensor student_hidden, Tensor student_weight, Tensor? student_bias, float student_softcap, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_softcap, Tensor? given, "
    f"str? group, int budget, bool[3] wanted, {_CALL}) -> (Tensor loss, Tensor components, Tensor[] gradients)",
)
torch.library.impl("kdfast::linear_divergence", ("cpu", "cuda"), linear_divergence)


@torch.library.register_fake("kdfast::linear_divergence")
def _(op: str, hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, wanted = Call(*args[-len(Call._fields) :]), args[-len(Call._fields) - 1]
    loss, components = _divergence.new_results(hidden, hidden.shape[:1], call)
    dtype = _heads.gradient_dtype(weight)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return (
        loss,
        components,
        [hidden.new_empty(s if w else (0,), dtype=dtype) for s, w in zip(shapes, wanted, strict=True)],
    )


class _Linear(torch.autograd.Function):
    """The gradients for an upstream factor of 1 are made in the forward, but for `none`, whose rows have a factor each:
    there the backward is the same loop with the factors as weights.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """`inputs`: of the raw operator, without `wanted`."""
        ctx.op, weight, call = inputs[0], inputs[2], Call(*inputs[-len(Call._fields) :])
        ctx.wanted = [
            needed and x is not None for x, needed in zip(inputs[1:4], ctx.needs_input_grad[1:4], strict=True)
        ]
        ctx.per_row = call.reduction == NONE
        if ctx.per_row:
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            loss, components, _ = called(inputs, call, [False] * 3)
        else:
            # float16 gradients are made about the number of rows larger: divided by it they would underflow.
            ctx.power = 2 ** inputs[1].shape[0].bit_length() if weight.dtype == torch.float16 else 1
            larger = call._replace(scale=call.scale * ctx.power)
            loss, components, gradients = called(inputs, larger, ctx.wanted)
            loss, components = loss / ctx.power, components / ctx.power
            ctx.save_for_backward(*gradients)
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(components)
        return loss, components

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _divergence.refuse_double_backward(ctx.op)
        saved = ctx.saved_tensors
        if ctx.per_row:
            _transforms.refuse_batched(ctx.op, grad_loss)
            inputs = [x if other is None else other for x, other in zip(saved, ctx.others, strict=True)]
            call = Call(*inputs[-len(Call._fields) :])
            factors = grad_loss if call.weight is None else grad_loss * call.weight
            gradients = called(inputs, call._replace(reduction=SUM, weight=factors), ctx.wanted)[2]
            dtype = inputs[2].dtype
        else:
            gradients, dtype = list(_divergence.scaled(saved, grad_loss / ctx.power)), ctx.dtype
        for_inputs = (g.to(dtype) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True))
        return None, *for_inputs, *(None,) * (len(INPUTS) - 4)


INPUTS = (
    *("op", "student_hidden", "student_weight", "student_bias", "student_softcap"),
    *("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_softcap", "given", "group", "budget"),
    *Call._fields,
)


def called(inputs: Sequence[Any], call: Call, wanted: list[bool]) -> tuple[Tensor, Tensor, list[Tensor]]:
    before = inputs[: len(INPUTS) - len(call)]
    return torch.ops.kdfast.linear_divergence(*before, wanted, *call)  # type: ignore[no-any-return]


def run(
    op: str, student: Head, teacher: Head | None, given: Tensor | None, group: str | None, budget: int, call: Call
) -> tuple[Tensor, Tensor]:
    """Loss and components of checked arguments; for `none` of flat rows."""
    s = student.flat()
    t = (None, None, None, 0.0) if teacher is None else teacher.flat().detached()
    inputs = (op, *s, *t, given, group, budget, *call)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in s[:3]):
        return _Linear.apply(*inputs)  # type: ignore[no-any-return]
    return called(inputs, call, [False] * 3)[:2]
