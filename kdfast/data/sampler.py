"""Orders of rows, and batches of rows that two tokenizers made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, cycle, islice
from typing import Any

import torch
from torch.utils.data import Sampler


class TeacherCollator:
    """Batches of rows that have columns for a teacher with a tokenizer of its own: `teacher_input_ids` and the like.

    `inner` makes the batch of the other columns; the teacher's are padded by its tokenizer, which also makes the
    `teacher_attention_mask` where the rows have none.

    Args:
        inner: the collator of the student, such as `DataCollatorWithPadding(tokenizer)`.
        teacher_tokenizer: of transformers. Other columns that begin with `teacher_` go to `inner`.
        number: of one of several teachers (`kdfast.models.teachers.Teachers`), whose columns are `teacher_0_input_ids`
            and the like; `inner` may be a `TeacherCollator` of another.

    Raises:
        ValueError: a row without `teacher_input_ids`.
    """

    def __init__(
        self, inner: Callable[[list[dict[str, Any]]], Any], teacher_tokenizer: Any, number: int | None = None
    ) -> None:
        self.inner, self.tokenizer = inner, teacher_tokenizer
        self.prefix = "teacher_" if number is None else f"teacher_{number}_"
        names = {"input_ids", "attention_mask", "token_type_ids", *teacher_tokenizer.model_input_names}
        self.columns = {f"{self.prefix}{name}": name for name in names}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for number, row in enumerate(rows):
            if f"{self.prefix}input_ids" not in row:
                expected = f"{self.prefix}input_ids"
                raise ValueError(f"TeacherCollator: row {number}: expected {expected}, got {', '.join(row)}")
        own = [{name: x for name, x in row.items() if name not in self.columns} for row in rows]
        its = [{self.columns[name]: x for name, x in row.items() if name in self.columns} for row in rows]
        padded = self.tokenizer.pad(its, return_tensors="pt")
        return {**self.inner(own), **{f"{self.prefix}{name}": x for name, x in padded.items()}}


class LengthGroupedSampler(Sampler[int]):
    """Row numbers such that each run of `batch_size` has rows of similar length, in an order fixed by seed and epoch.

    Rows are shuffled, sorted by length inside pools of `pool` batches, cut into batches, and the batches are shuffled.
    transformers' sampler of this name leaves batches in falling length inside a pool and draws from the global random
    state, so a run resumed within an epoch would see another order than the uninterrupted one.

    Args:
        lengths: length of each row, in tokens.
        batch_size: rows per batch, over all processes and accumulation steps.
        seed: together with the epoch (`set_epoch`) it determines the order.
        pool: batches per sorting pool; larger pools save more padding and vary the batches less.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, pool: int = 50) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.pool
        pools = [sorted(rows[i : i + size], key=self.lengths.__getitem__) for i in range(0, len(rows), size)]
        rows = [row for one in pools for row in one]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A shorter last batch stays last: the data loader cuts every batch_size rows.
        whole = len(rows) // self.batch_size
        order = torch.randperm(whole, generator=generator).tolist() + list(range(whole, len(batches)))
        yield from (row for batch in order for row in batches[batch])


class TaskSampler(Sampler[int]):
    """Row numbers of several tasks, one after another in one dataset, such that each run of `batch_size` is of one
    task.

    Which one is drawn for every batch, with probability ∝ (the task's number of batches)^tau, as TextBrewer (Yang et
    al., 2020, arXiv:2002.12620) does it. An epoch has as many batches as all tasks together; of one task it may have
    more than a pass, or less. Within a task, passes are those of `LengthGroupedSampler`; a batch that is not full has
    the pass's first rows once more.

    Args:
        lengths: of each task, the length of each row, in tokens.
        batch_size: rows per micro-batch.
        tau: 1: by size; 0: all tasks alike.
        seed: together with the epoch (`set_epoch`) it determines the order.

    Raises:
        ValueError: no tasks, or one without rows; a negative tau.
    """

    PASSES = 1 << 20  # more than an epoch has of any task

    def __init__(self, lengths: Sequence[Sequence[int]], batch_size: int, tau: float = 1.0, seed: int = 0) -> None:
        if not lengths or not all(len(of) for of in lengths):
            raise ValueError(f"TaskSampler: lengths: expected rows of every task, got {[len(of) for of in lengths]}")
        if tau < 0:
            raise ValueError(f"TaskSampler: tau: expected a number that is not negative, got {tau}")
        self.lengths, self.batch_size, self.tau, self.seed, self.epoch = lengths, batch_size, tau, seed, 0
        self.batches = [math.ceil(len(of) / batch_size) for of in lengths]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.batches) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        chances = torch.tensor(self.batches, dtype=torch.float64) ** self.tau
        drawn = torch.multinomial(chances, sum(self.batches), replacement=True, generator=generator)
        rows = [self._rows(task) for task in range(len(self.lengths))]
        for task in drawn.tolist():
            yield from islice(rows[task], self.batch_size)

    def _rows(self, task: int) -> Iterator[int]:
        """Of one task, full batches without an end."""
        first = sum(map(len, self.lengths[:task]))
        sampler = LengthGroupedSampler(self.lengths[task], self.batch_size, self.seed)
        for passed in count():
            sampler.set_epoch(self.epoch * self.PASSES + passed)
            order = list(sampler)
            yield from (first + row for row in islice(cycle(order), self.batches[task] * self.batch_size))
