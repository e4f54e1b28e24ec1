"""Losses of hidden · weightᵀ without its logits: the loop over rows, its raw operator and its autograd Function.

Four matrix products and none of them twice: the logits of both sides, chunk by chunk (kdfast/ops/_chunks.py); then, of
a slab of chunks, the gradients of hidden states and weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import _C
from kdfast.ops import _call, _checks, _chunks, _divergence, _heads, _transforms
from kdfast.ops._call import ARGUMENTS, KNOWN_EVERYTHING, KNOWN_NOTHING, SAVE_NOTHING, Call, RowValues
from kdfast.ops._heads import WORKSPACE, Gradients, Head, Widening

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Inputs(NamedTuple):
    """What the raw operator takes, flat rows [N, ...]. The teacher is a head, or what is given of it [..., D]: logits,
    or log-probabilities of the columns `call.rows.indices`."""

    op: str
    student: Head
    teacher: Head | None
    given: Tensor | None
    group: str | None
    budget: int
    entropy: bool  # whether the student's is asked for
    call: Call

    def flat(self) -> tuple[Any, ...]:
        """In the order of the schema, after `wanted`."""
        teacher = (None, None, None, 0.0, 1.0) if self.teacher is None else self.teacher
        return self.op, *self.student, *teacher, *self[3:-1], *self.call.flat()

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Inputs:
        size = len(Head._fields)
        op, student, teacher, rest = flat[0], flat[1 : 1 + size], flat[1 + size : 1 + 2 * size], flat[1 + 2 * size :]
        given, group, budget, entropy, *call = rest
        of_teacher = None if teacher[0] is None else Head(*teacher)
        return cls(op, Head(*student), of_teacher, given, group, budget, entropy, Call.of(call))


OF_STUDENT = slice(1, 4)  # hidden states, weight and bias of flat inputs: `wanted` says whose gradients are
FLAT = 1 + 2 * len(Head._fields) + 4 + ARGUMENTS


Results = tuple[Tensor, Tensor, Tensor, list[Tensor]]  # loss, components, entropies [N] or empty, gradients
REVERSE_KL = _divergence.ALL_KINDS.index("reverse_kl_div")


class Slab(NamedTuple):
    """Some rows' memory [n, width] for the gradients of their logits. A chunk's own logits, float32, lie where
    gradients are not written yet, and in the tail: kdfast/ops/_chunks.py has the picture."""

    memory: Tensor
    rows: slice  # of the loop
    apart: bool  # the student's logits, from their gradients
    logits_dtype: torch.dtype

    def gradients(self, rows: slice) -> Tensor:
        return self.memory[rows.start - self.rows.start : rows.stop - self.rows.start]

    def student_logits(self, rows: slice) -> Tensor:
        return self._from_the_end(rows, 1) if self.apart else self.gradients(rows)

    def teacher_logits(self, rows: slice) -> Tensor:
        return self._from_the_end(rows, 1 + self.apart)

    def _from_the_end(self, rows: slice, place: int) -> Tensor:
        """[rows, width], the `place`-th of such pieces."""
        count, (length, width) = rows.stop - rows.start, self.memory.shape
        each = count * self.logits_dtype.itemsize // self.memory.dtype.itemsize
        end = length - (place - 1) * each
        return self.memory[end - each : end].view(-1).view(self.logits_dtype).view(count, width)


class Loop:
    """Over rows that all count; those of what is given of the teacher are at `places` [N] there, None: all of them."""

    def __init__(self, inputs: Inputs, places: Tensor | None, group: ProcessGroup | None, wanted: list[bool]) -> None:
        self.op, self.student, self.teacher, self.given = inputs.op, inputs.student, inputs.teacher, inputs.given
        self.places, self.group, self.wanted, self.entropies = places, group, wanted, inputs.entropy
        # Gradients of the products are as many times those of the logits; what is returned is divided by it.
        self.factor = inputs.student.scale if any(wanted) else 1.0
        numbers = inputs.call.numbers
        self.call = inputs.call._replace(numbers=numbers._replace(scale=numbers.scale * self.factor))
        self.columns = inputs.call.numbers.columns
        weight = inputs.student.weight
        dtype, self.on_gpu, self.gradient = weight.dtype, _heads.on_gpu(weight), any(wanted)
        self.logits_dtype = torch.promote_types(dtype, torch.float32)
        self.widening = Widening(self.logits_dtype)
        # Products of gradients take the inputs' dtype on the GPU; without gradients the logits are alone.
        self.dtype = dtype if self.on_gpu and self.gradient else self.logits_dtype
        # On the CPU gradients take the place of the student's logits, but for a soft-cap's, which needs both.
        self.apart = self.gradient and (self.on_gpu or self.student.softcap > 0)
        # From one row of logits to the next: whole 128-byte lines of the GPU.
        self.width = -(-self.columns // 64) * 64 if self.on_gpu else self.columns
        # Given logits whose rows start unlike these would be read column by column there.
        given_logits = self.given if inputs.call.rows.indices is None else None
        self.copied = self.on_gpu and given_logits is not None and not _in_groups_of_four(given_logits, places)

    def plan(self, budget: int) -> _chunks.Plan:
        """`budget`: bytes; 0: whatever suits the device."""
        row_bytes = self.width * self.dtype.itemsize
        if self.given is not None and self.places is not None:  # its rows are copied
            row_bytes += self.given.shape[-1] * self.given.element_size()
        teachers = self.teacher is not None or self.copied
        tail = (self.apart + teachers) * self.logits_dtype.itemsize // self.dtype.itemsize
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

    def run(self, budget: int, padding: int) -> Results:
        """Loss and components, of every row in turn or of all; the entropies of the rows; and the gradients, `padding`
        rows of weight more."""
        plan = self.plan(budget) if self.student.hidden.shape[0] else _chunks.Plan([], 0)
        memory = self.student.weight.new_empty(plan.memory, self.width, dtype=self.dtype)
        sharded = self.group is not None
        gradients = Gradients(self.student, self.widening, padding, self.wanted, len(plan.slabs), sharded)
        results = []
        for chunks in plan.slabs:
            slab = Slab(memory, slice(chunks[0].begin, chunks[-1].end), self.apart, self.logits_dtype)
            results += [self.chunk(slice(*chunk), slab) for chunk in chunks]
            if self.gradient:
                gradients.add(slab.rows, slab.gradients(slab.rows)[:, : self.columns])
        return *self.reduced(results), self.finished(gradients)

    def chunk(self, rows: slice, slab: Slab) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, components and entropies of some of the slab's rows; their gradients go into its memory."""
        s = slab.student_logits(rows)
        self.student.logits(rows, s[:, : self.columns], self.widening)
        if self.teacher is not None:
            t = slab.teacher_logits(rows)
            self.teacher.logits(rows, t[:, : self.columns], self.widening)
        else:
            assert self.given is not None
            given = rows_of(self.given, rows if self.places is None else self.places[rows])
            t = slab.teacher_logits(rows) if self.copied else given
            if self.copied:
                t[:, : self.columns] = given[:, : self.columns]
        call = self.call._replace(rows=self.call.rows.map(lambda x: x[rows]))
        entropies = self.entropy(s, call) if self.entropies else s.new_empty(0)
        state = None if self.group is None else _divergence.state_of(self.group, s, t, call)
        known = KNOWN_NOTHING if state is None else KNOWN_EVERYTHING
        if not self.gradient:
            loss, components, _ = _call.divergence(s, t, call, state, known, SAVE_NOTHING)
            return loss, components, entropies
        g = slab.gradients(rows)
        loss, components = _call.divergence_into(g, s, t, call, state, known)
        if self.student.softcap:
            self.student.through_softcap(s, g)
        return loss, components, entropies

    def entropy(self, s: Tensor, call: Call) -> Tensor:
        """Of each row's softmax(z / T): log V − KL(s ‖ uniform), from logits that are there anyway."""
        rows = RowValues(None, None, call.rows.row_temperature, None, None)
        numbers = call.numbers._replace(kind=REVERSE_KL, mixing=0.0, scale=1.0, per_row=True, distillation=False)
        call, uniform = Call(rows, None, numbers), s.new_zeros(()).expand_as(s)
        state = None if self.group is None else _divergence.state_of(self.group, s, uniform, call)
        known = KNOWN_NOTHING if state is None else KNOWN_EVERYTHING
        return math.log(max(numbers.vocabulary, 1)) - _call.divergence(s, uniform, call, state, known, SAVE_NOTHING)[0]

    def reduced(self, results: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        if not results:
            loss, components = _divergence.new_results(self.student.weight, (0,), self.call.numbers)
            return loss.zero_(), components.zero_(), loss.new_empty(0)
        together = torch.cat if self.call.numbers.per_row else lambda parts: torch.stack(parts).sum(0)
        loss, components = (together([of[i] for of in results]) / self.factor for i in (0, 1))
        return loss, components, torch.cat([of[2] for of in results])

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


def _in_groups_of_four(x: Tensor, places: Tensor | None) -> bool:
    """Whether every row of [..., D], or of a copy of the rows at `places`, starts at a multiple of four elements."""
    if x.stride(-1) != 1:
        return False
    if places is not None:
        return x.shape[-1] % 4 == 0
    return x.data_ptr() % (4 * x.element_size()) == 0 and all(step % 4 == 0 for step in x.stride()[:-1])


def linear_divergence(wanted: list[bool], *flat: Any) -> Results:
    """The raw operator. Rows that do not count are dropped before any product; but not in a CUDA graph, where their
    number cannot be asked for: there they are calculated and do not count."""
    inputs, places = Inputs.of(flat), None
    rows, mask = inputs.student.hidden.shape[0], inputs.call.rows.mask
    if mask is not None and not (inputs.student.hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
        places = mask.nonzero().squeeze(1)
        places = None if len(places) == rows else places
        inputs = _at(inputs, places)
    columns, padded = inputs.call.numbers.columns, inputs.student.weight.shape[0]
    teacher = None if inputs.teacher is None else inputs.teacher.first(columns)
    inputs = inputs._replace(student=inputs.student.first(columns), teacher=teacher)
    loop = Loop(inputs, places, None if inputs.group is None else _group_named(inputs.group), wanted)
    with torch.autocast(inputs.student.hidden.device.type, enabled=False):  # would round the products
        loss, components, entropies, gradients = loop.run(inputs.budget, padded - inputs.student.weight.shape[0])
    if places is not None and inputs.call.numbers.per_row:
        loss, components = (_spread(x, places, rows) for x in (loss, components))
    if places is not None and wanted[0]:
        gradients[0] = _spread(gradients[0], places, rows)
    if inputs.entropy and places is not None:
        entropies = _spread(entropies, places, rows)
    elif inputs.entropy and inputs.call.rows.mask is not None:
        entropies = entropies.where(inputs.call.rows.mask, 0)
    return loss, components, entropies, gradients


def _at(inputs: Inputs, places: Tensor | None) -> Inputs:
    """The rows that are there alone (None: all), but of what is given of the teacher; all of them count."""
    values = inputs.call.rows._replace(mask=None)
    if places is None:
        return inputs._replace(call=inputs.call._replace(rows=values))
    call = inputs.call._replace(rows=values.map(lambda x: x[places]))
    teacher = None if inputs.teacher is None else inputs.teacher.at(places)
    return inputs._replace(student=inputs.student.at(places), teacher=teacher, call=call)


def _group_named(name: str) -> ProcessGroup:
    # Raw operators take no process groups; torch's own functional collectives find them so too.
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(name))  # type: ignore[attr-defined,no-any-return]


def _spread(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """Rows back where they were, zeros between them."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)


torch.library.define(
    "kdfast::linear_divergence",
    "(bool[3] wanted, str op, Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "float student_softcap, float student_scale, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    f"float teacher_softcap, float teacher_scale, Tensor? given, str? group, int budget, bool entropy, "
    f"{_C.divergence_arguments}) -> (Tensor loss, Tensor components, Tensor entropies, Tensor[] gradients)",
)
torch.library.impl("kdfast::linear_divergence", ("cpu", "cuda"), linear_divergence)


@torch.library.register_fake("kdfast::linear_divergence")
def _(wanted: list[bool], *flat: Any) -> Results:
    inputs = Inputs.of(flat)
    hidden, weight = inputs.student.hidden, inputs.student.weight
    loss, components = _divergence.new_results(hidden, hidden.shape[:1], inputs.call.numbers)
    dtype = _heads.gradient_dtype(weight)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = [hidden.new_empty(s if w else (0,), dtype=dtype) for s, w in zip(shapes, wanted, strict=True)]
    entropies = hidden.new_empty(hidden.shape[:1] if inputs.entropy else (0,), dtype=_checks.loss_dtype(hidden))
    return loss, components, entropies, gradients


def called(inputs: Inputs, wanted: list[bool]) -> Results:
    return torch.ops.kdfast.linear_divergence(wanted, *inputs.flat())  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """The gradients for an upstream factor of 1 are made in the forward, but for `none`, whose rows have a factor each:
    there the backward is the same loop with the factors as weights.
    """

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs.of(flat)
        numbers, weight = inputs.call.numbers, inputs.student.weight
        needed = zip(flat[OF_STUDENT], ctx.needs_input_grad[OF_STUDENT], strict=True)
        ctx.op, ctx.per_row, ctx.wanted = inputs.op, numbers.per_row, [n and x is not None for x, n in needed]
        if ctx.per_row:
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in flat))
            ctx.others = [None if isinstance(x, Tensor) else x for x in flat]
            loss, components, entropies, _ = called(inputs, [False] * 3)
        else:
            # float16 gradients are made about the number of rows larger: divided by it they would underflow.
            rows = inputs.student.hidden.shape[0]
            ctx.power = 2 ** rows.bit_length() if weight.dtype == torch.float16 else 1
            larger = inputs.call._replace(numbers=numbers._replace(scale=numbers.scale * ctx.power))
            loss, components, entropies, gradients = called(inputs._replace(call=larger), ctx.wanted)
            loss, components = loss / ctx.power, components / ctx.power
            ctx.save_for_backward(*gradients)
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(components, entropies)
        return loss, components, entropies

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _divergence.refuse_double_backward(ctx.op)
        saved = ctx.saved_tensors
        if ctx.per_row:
            _transforms.refuse_batched(ctx.op, grad_loss)
            inputs = Inputs.of([x if other is None else other for x, other in zip(saved, ctx.others, strict=True)])
            rows, numbers = inputs.call.rows, inputs.call.numbers._replace(per_row=False)
            factors = grad_loss if rows.weight is None else grad_loss * rows.weight
            call = inputs.call._replace(rows=rows._replace(weight=factors), numbers=numbers)
            gradients = called(inputs._replace(call=call, entropy=False), ctx.wanted)[3]
            dtype = inputs.student.weight.dtype
        else:
            gradients, dtype = list(_divergence.scaled(saved, grad_loss / ctx.power)), ctx.dtype
        for_inputs = (g.to(dtype) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True))
        return None, *for_inputs, *(None,) * (FLAT - 4)


def run(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, components and entropies of checked arguments, for `none` of flat rows; entropies always."""
    s, t = inputs.student.flat(), None if inputs.teacher is None else inputs.teacher.flat().detached()
    inputs = inputs._replace(student=s, teacher=t)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in s[:3]):
        return _Linear.apply(*inputs.flat())  # type: ignore[no-any-return]
    return called(inputs, [False] * 3)[:3]
