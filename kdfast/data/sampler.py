"""Orders of rows, and batches of rows that two tokenizers made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
