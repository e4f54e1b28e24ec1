"""Reading a cache: rows by number, out of mapped files, and batches for training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdfast.teacher_cache._identity import config_sha256, row_crc32, token_ids, tokenizer_sha256, weights_sha256
from kdfast.teacher_cache._manifest import NAME, Manifest, mismatch

PREFIX = "teacher_"  # of the teacher's columns beside a dataset's own
FILL = {"topk_logprobs": -torch.inf}  # where nothing is stored; everything else is 0 there


class TeacherCache(Dataset[dict[str, Tensor]]):
    """A finished cache: `cache[i]` is what the teacher made of row i of its dataset. See `kdfast.teacher_cache`.

    A row is a dict of the outputs that were stored, in the stored dtype, n being the row's stored tokens:

        topk_logprobs [n, k], topk_indices [n, k] int32  by falling probability, at `temperature`
        hidden_3 [n, D]                                  for every stored layer, here the fourth of `hidden_states`
        logits [C]                                       of the whole row
        cls_3 [D], or cls [D]                            first token's state of every stored layer, or the last layer's
        positions [n] int32, length [] int64             of outputs per token: where they stand, in how many input_ids

    Only the bytes of a row are read. The cache can be pickled; files are opened by the process that reads them.

    Args:
        folder: where `write` put it.
        tokenizer: the one to train with, compared with the one that it was written with.
        teacher: the teacher itself, of which config and weights are compared,
            or the name or path that it was loaded from.
        k: keep the k most probable entries; at most as many as are stored, which is the default.
        temperature: the one to train with, compared with the stored one.
        verify: compare the sha256 of the shards too, which reads all of them.
            Their sizes and headers are always compared.

    Raises:
        CacheError: something differs, a file is missing or cut short, or the cache is not complete.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        teacher: nn.Module | str | None = None,
        k: int | None = None,
        temperature: float | None = None,
        verify: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if not self.manifest.complete:
            got = f"one that was stopped after {self.manifest.rows} rows; the same write goes on there"
            raise mismatch("folder", f"a complete cache in {self.folder}", got)
        self._check_expected(tokenizer, teacher, k, temperature)
        self.manifest.check(self.folder, verify)
        self.k = self.manifest.settings.k if k is None else k
        self._first_rows = [shard.first_row for shard in self.manifest.shards]
        self._files: dict[int, dict[str, Any]] = {}

    def _check_expected(self, tokenizer: Any, teacher: Any, k: int | None, temperature: float | None) -> None:
        settings, path = self.manifest.settings, self.folder / NAME
        if tokenizer is not None and (found := tokenizer_sha256(tokenizer)) != settings.tokenizer_sha256:
            raise mismatch("tokenizer", f"the one with sha256 {settings.tokenizer_sha256} of {path}", found)
        if isinstance(teacher, str) and teacher != self.manifest.teacher:
            raise mismatch("teacher", f"{self.manifest.teacher!r}, as in {path}", repr(teacher))
        if isinstance(teacher, nn.Module):
            found = config_sha256(teacher) or "none"
            if found != (settings.teacher_config_sha256 or "none"):
                raise mismatch("teacher", f"a config with sha256 {settings.teacher_config_sha256}, as in {path}", found)
            if (found := weights_sha256(teacher)) != settings.teacher_weights_sha256:
                raise mismatch("teacher", f"weights with sha256 {settings.teacher_weights_sha256}, as in {path}", found)
        for name, value, stored in (("k", k, settings.k), ("temperature", temperature, settings.temperature)):
            if value is not None and stored is None:
                raise mismatch(name, f"None, as {path} is of a cache without topk", value)
        if k is not None and settings.k is not None and not 1 <= k <= settings.k:
            raise mismatch("k", f"1 to {settings.k}, as many as {path} has", k)
        if temperature is not None and temperature != settings.temperature:
            raise mismatch("temperature", f"{settings.temperature}, as in {path}", temperature)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        file, local = self._locate(row)
        item: dict[str, Tensor] = {}
        start, stop = file["row_offsets"][local : local + 2].tolist() if "row_offsets" in file else (0, 0)
        for name, stored in file.items():
            if _of_row(name):
                part = stored[local]
            elif name.startswith("topk"):
                part = stored[start:stop, : self.k]
            elif name == "positions" or name.startswith("hidden_"):
                part = stored[start:stop]
            else:
                continue
            item[name] = part.clone()  # a slice is a view of the whole file, and would be sent as such by a worker
        if "row_lengths" in file:
            item["length"] = file["row_lengths"][local].clone()
        return item

    def _locate(self, row: int) -> tuple[dict[str, Any], int]:
        """The tensors, as slices yet to be read, of the shard that holds a row, and the row's number in it."""
        row = range(len(self))[row]  # takes negative numbers, and raises IndexError as a sequence must
        number = bisect_right(self._first_rows, row) - 1
        shard = self.manifest.shards[number]
        if number not in self._files:
            file = safe_open(self.folder / shard.file, framework="pt")
            self._files[number] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return self._files[number], row - shard.first_row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @staticmethod
    def collate(
        items: Sequence[Mapping[str, Tensor]], length: int | None = None, padding_side: str = "right"
    ) -> dict[str, Tensor]:
        """Rows of a cache as a batch, padded to `length` tokens (default: the longest row's).

        Args:
            items: rows, B of them, as `cache[i]` gives them.
            length: L, the width of the student's batch.
            padding_side: "right" or "left", where that batch is padded.

        Returns:
            topk_logprobs [B, L, k] (-inf where nothing is stored) and topk_indices [B, L, k] int64 (0 there), as
            `kdfast.topk_kl_div` takes them; hidden_3 [B, L, D] (0 there), logits [B, C], cls_3 or cls [B, D];
            token_mask [B, L] bool, True where outputs per token are stored.
            Dtypes but that of the indices are the stored ones.

        Raises:
            CacheError: a row is longer than `length`.
        """
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if _of_row(name)}
        if "positions" not in items[0]:
            return batch
        longest = max(int(item["length"]) for item in items)
        length = longest if length is None else length
        if length < longest:
            raise mismatch("length", f"at least {longest}, as many tokens as the longest row has", length)
        shifts = [length - int(item["length"]) if padding_side == "left" else 0 for item in items]
        # One assignment for all rows: of many small ones, each would wait for threads where the machine is busy.
        columns = torch.cat([item["positions"].long() + shift for item, shift in zip(items, shifts, strict=True)])
        counts = torch.tensor([len(item["positions"]) for item in items])
        places = (torch.arange(len(items)).repeat_interleave(counts), columns)
        batch["token_mask"] = torch.zeros(len(items), length, dtype=torch.bool)
        batch["token_mask"][places] = True
        for name, first in items[0].items():
            if name.startswith(("topk", "hidden_")):
                dtype = torch.int64 if name == "topk_indices" else first.dtype
                padded = torch.full((len(items), length, *first.shape[1:]), FILL.get(name, 0), dtype=dtype)
                padded[places] = torch.cat([item[name] for item in items]).to(dtype)
                batch[name] = padded
        return batch

    def beside(self, dataset: Any) -> BesideDataset:
        """The items of a map-style dataset, rows as dicts with input_ids, with the columns of `cache[i]` added.

        Their names begin with "teacher_". Every row that is read is compared with the one that the teacher read.

        Raises:
            CacheError: the dataset has another number of rows; at reading, row i has other input_ids.
        """
        if len(dataset) != len(self):
            raise mismatch("dataset", f"{len(self)} rows, as in {self.folder / NAME}", len(dataset))
        return BesideDataset(self, dataset)

    def collator(self, inner: Callable[[list[dict[str, Any]]], Any]) -> Collator:
        """A collator for the items of `beside`: `inner` makes the batch, to which the teacher's columns are added.

        They are padded to the width of its input_ids, on the padding side of `inner.tokenizer` (without one, right).
        With a top-k come two numbers that objectives check: `teacher_temperature` and `teacher_vocab_size`.
        """
        temperature, vocabulary = self.manifest.settings.temperature, self.manifest.vocab_size
        numbers = {} if temperature is None else {"temperature": temperature, "vocab_size": vocabulary}
        return Collator(inner, {PREFIX + name: value for name, value in numbers.items()})


def _of_row(name: str) -> bool:
    """Whether an output has one value per row, not one per token."""
    return name in ("logits", "cls") or name.startswith("cls_")


class BesideDataset(Dataset[dict[str, Any]]):
    """See `TeacherCache.beside`."""

    def __init__(self, cache: TeacherCache, dataset: Any) -> None:
        self.cache = cache
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> dict[str, Any]:
        file, local = self.cache._locate(row)
        item = self.dataset[row]
        crc32 = row_crc32(token_ids(item, row))
        if crc32 != file["row_crc32"][local].item():
            raise mismatch(
                "dataset", f"row {row} with the input_ids that the teacher of {self.cache.folder} read", "others"
            )
        return {**item, **{PREFIX + name: value for name, value in self.cache[row].items()}}


class Collator:
    """`numbers` go into every batch. See `TeacherCache.collator`."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], numbers: Mapping[str, Any]) -> None:
        self.inner = inner
        self.numbers = numbers

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = [{name: value for name, value in row.items() if not name.startswith(PREFIX)} for row in features]
        cached = [
            {n.removeprefix(PREFIX): value for n, value in row.items() if n.startswith(PREFIX)} for row in features
        ]
        batch = dict(self.inner(own))
        side = getattr(getattr(self.inner, "tokenizer", None), "padding_side", "right")
        padded = TeacherCache.collate(cached, batch["input_ids"].shape[1], side)
        return {**batch, **{PREFIX + name: value for name, value in padded.items()}, **self.numbers}
