"""Writing a cache: the teacher runs over the rows in their order, and shards are finished one after another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kdfast.teacher_cache import _identity as identity
from kdfast.teacher_cache._manifest import DTYPES, NAME, Manifest, Settings, Shard, file_sha256, mismatch
from kdfast.teacher_cache._read import TeacherCache
from kdfast.teacher_cache._teacher import Row, Teacher

OUTPUTS = ("topk", "logits", "cls", "hidden")
POSITIONS = ("all", "labels", "next_labels")


def write(
    model: nn.Module,
    rows: Iterable[Any],
    folder: str | Path,
    *,
    tokenizer: Any,
    k: int = 64,
    temperature: float = 1.0,
    outputs: Sequence[str] = ("topk",),
    layers: Sequence[int] = (),
    positions: str = "all",
    batch_size: int = 8,
    shard_bytes: int = 512 * 2**20,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Runs the teacher over the rows, in their order, and stores its outputs. See `kdfast.teacher_cache`.

    Args:
        model: the teacher, an encoder or decoder of transformers, or a module called and answering like one. Put into
            eval mode, in place.
        rows: a dataset or anything that gives the same rows at every pass; dicts with `input_ids` (a list or a tensor
            [L]) and, where there are any, `attention_mask`, `token_type_ids`, `labels` or `completion_mask` of the same
            length. Padding and the rest of what the attention mask leaves out is not stored.
        folder: a new or empty one, or one with a write to go on with.
        tokenizer: the rows' one; its hash is stored, and batches are padded with its padding token.
        k: entries per token, of logits [B, L, V]; at most V.
        temperature: that the logits are divided by before the log-softmax, in float32.
        outputs: any of "topk", "hidden" (states of `layers`, per token), "logits" [B, C] of a classifier, and "cls",
            the states of `layers` of a row's first token alone (Patient-KD) or, without layers, the last one.
        layers: for "hidden" and "cls": 0 is the embeddings, N what the last of N layers gives.
        positions: which tokens' outputs are stored: "all"; "labels", those whose label is not -100 (masked language
            models); "next_labels", those before such a label (causal ones, whose logits are of the next token). Rows
            without labels may have a `completion_mask` (1 = counts) for it.
        batch_size: rows per forward pass. Padding changes results by a rounding, so an interrupted write gives the same
            bytes as an uninterrupted one where it goes on with the same size.
        shard_bytes: a shard is finished before it grows beyond. Until then it is kept in memory,
            and half as much again while it is written.
        dtype: torch.float32, float16 or bfloat16, or its name, of all but the indices.
        device: moves the model there; None: where it is.
        resume: go on after the last complete shard in the folder; False: remove what is there and start over.
        progress: called with the rows and tokens that are done, first with those that were there.

    Returns:
        The cache, opened.

    Raises:
        CacheError: an argument is out of range, the folder holds a cache of something else, a row or the model's output
            is not as described.
        OSError: a file could not be written; finished shards stay, and the same call goes on after them.
    """
    dtype = str(dtype).removeprefix("torch.")
    _check(k, temperature, outputs, layers, positions, dtype, batch_size=batch_size, shard_bytes=shard_bytes)
    settings = Settings(
        teacher_config_sha256=identity.config_sha256(model),
        teacher_weights_sha256=identity.weights_sha256(model),
        tokenizer_sha256=identity.tokenizer_sha256(tokenizer),
        outputs=tuple(sorted(outputs)),
        positions=positions,
        k=k if "topk" in outputs else None,
        temperature=float(temperature) if "topk" in outputs else None,
        layers=tuple(sorted(set(layers))),
        dtype=dtype,
    )
    teacher = Teacher(model, settings, tokenizer, device)
    writer = _Writer(Path(folder), _begin(Path(folder), model, settings, resume), shard_bytes)
    source = enumerate(rows)
    writer.skip(source)
    report = progress or (lambda rows, tokens: None)
    report(writer.manifest.rows, writer.manifest.tokens)
    done_rows, done_tokens = writer.manifest.rows, writer.manifest.tokens
    while batch := [Row.of(row, number, positions) for number, row in islice(source, batch_size)]:
        if writer.manifest.complete:
            raise mismatch("rows", f"{done_rows}, as in the complete cache {folder}", "more")
        writer.add(batch, teacher(batch), teacher.vocab_size)
        done_rows, done_tokens = done_rows + len(batch), done_tokens + sum(len(row.kept) for row in batch)
        report(done_rows, done_tokens)
    if not done_rows:
        raise mismatch("rows", "at least one", "none")
    writer.finish()
    return TeacherCache(folder)


def _check(
    k: int,
    temperature: float,
    outputs: Sequence[str],
    layers: Sequence[int],
    positions: str,
    dtype: str,
    **sizes: int,
) -> None:
    for name, number in {"k": k, **sizes}.items():
        if number < 1:
            raise mismatch(name, "at least 1", number)
    if not temperature > 0:
        raise mismatch("temperature", "a positive number", temperature)
    if isinstance(outputs, str) or not outputs or not set(outputs) <= set(OUTPUTS):
        raise mismatch(
            "outputs", f"some of {', '.join(OUTPUTS)}", repr(outputs) if isinstance(outputs, str) else outputs
        )
    if {"topk", "logits"} <= set(outputs):
        raise mismatch("outputs", "'topk', of a language model, or 'logits', of a classifier", "both")
    if not layers and "hidden" in outputs:
        raise mismatch("layers", "layer numbers with output 'hidden'", "none")
    if layers and not {"hidden", "cls"} & set(outputs):
        raise mismatch("layers", "none without output 'hidden' or 'cls'", list(layers))
    if positions not in POSITIONS:
        raise mismatch("positions", f"one of {', '.join(POSITIONS)}", repr(positions))
    if dtype not in DTYPES:
        raise mismatch("dtype", f"one of {', '.join(DTYPES)}", dtype)


def _begin(folder: Path, model: nn.Module, settings: Settings, resume: bool) -> Manifest:
    """The manifest to go on with: the folder's, checked, or a new one."""
    if folder.exists() and not folder.is_dir():
        raise mismatch("folder", "a folder", f"the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).is_file() and resume:
        manifest = Manifest.load(folder)
        for name, value in asdict(manifest.settings).items():
            if value != asdict(settings)[name]:
                argument = {"teacher": "model", "tokenizer": "tokenizer"}.get(name.partition("_")[0], name)
                stored = value if argument == name else f"{name} {value}"
                hint = f"as the cache in {folder} was begun with (resume=False, or --fresh, starts over)"
                raise mismatch(argument, f"{stored}, {hint}", asdict(settings)[name])
        manifest.check(folder)
        return manifest
    for path in sorted(folder.iterdir()):
        if (folder / NAME).is_file() and path.match("shard-*.safetensors"):
            continue
        if path.name != NAME and path.suffix != ".partial":
            raise mismatch("folder", "a new folder, or one that holds a teacher cache and nothing else", path)
    manifest = Manifest(str(getattr(model, "name_or_path", "") or type(model).__name__), settings)
    manifest.save(folder)  # before the shards go: what is left of them belongs to no cache
    for path in folder.glob("shard-*.safetensors"):
        path.unlink()
    return manifest


class _Writer:
    """Collects batches and finishes shards, each before it would grow beyond `limit` bytes, between two batches."""

    def __init__(self, folder: Path, manifest: Manifest, limit: int) -> None:
        self.folder = folder
        self.manifest = manifest
        self.limit = limit
        self.digest = hashlib.sha256()
        self._restart()

    def _restart(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.lengths: list[int] = []  # of the input_ids of each row
        self.counts: list[int] = []  # of its stored tokens
        self.bytes = 0

    def skip(self, source: Iterator[tuple[int, Any]]) -> None:
        """Takes the rows that are there from the source, and compares them with those that the teacher read."""
        for shard in self.manifest.shards:
            count = 0
            for number, row in islice(source, shard.rows):
                self.digest.update(identity.row_bytes(identity.token_ids(row, number)))
                count += 1
            if count < shard.rows:
                there = f"at least {shard.first_row + shard.rows}, as many as {self.folder} holds"
                raise mismatch("rows", there, shard.first_row + count)
            if self.digest.hexdigest() != shard.rows_sha256:
                rows = f"rows {shard.first_row} to {shard.first_row + shard.rows - 1}"
                raise mismatch("rows", f"the input_ids of {rows} that {self.folder} was begun with", "others")

    def add(self, rows: list[Row], stored: dict[str, Tensor], vocab_size: int | None) -> None:
        per_token = bool({"topk", "hidden"} & {*self.manifest.settings.outputs})
        stored["row_crc32"] = torch.tensor([identity.row_crc32(row.input_ids) for row in rows])
        if per_token:
            stored["positions"] = torch.tensor([place for row in rows for place in row.kept], dtype=torch.int32)
        size = sum(tensor.nbytes for tensor in stored.values())
        if self.lengths and self.bytes + size > self.limit:
            self._finish_shard()
        self.manifest = replace(self.manifest, vocab_size=vocab_size)
        for name, tensor in stored.items():
            self.parts.setdefault(name, []).append(tensor)
        self.bytes += size
        for row in rows:
            self.digest.update(identity.row_bytes(row.input_ids))
            self.lengths.append(len(row.input_ids))
            self.counts.append(len(row.kept))

    def finish(self) -> None:
        if self.lengths:
            self._finish_shard()
        if not self.manifest.complete:
            self.manifest = replace(self.manifest, complete=True)
            self.manifest.save(self.folder)

    def _finish_shard(self) -> None:
        first_row = self.manifest.rows
        path = self.folder / f"shard-{len(self.manifest.shards):05d}.safetensors"
        tensors = {name: torch.cat(self.parts.pop(name)) for name in list(self.parts)}
        if "positions" in tensors:
            tensors["row_offsets"] = torch.tensor([0, *self.counts]).cumsum(0)
            tensors["row_lengths"] = torch.tensor(self.lengths)
        partial = path.with_suffix(".partial")
        try:
            # One entry of metadata: safetensors writes several in any order.
            save_file(tensors, partial, metadata={"kdfast": self.manifest.metadata(first_row)})
            partial.chmod((self.folder / NAME).stat().st_mode & 0o777)  # safetensors lets nobody else read it
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            size, sha256 = partial.stat().st_size, file_sha256(partial)
            shard = Shard(
                path.name, first_row, len(self.lengths), sum(self.counts), size, sha256, self.digest.hexdigest()
            )
            partial.replace(path)
            manifest = replace(self.manifest, shards=[*self.manifest.shards, shard])
            manifest.save(self.folder)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"teacher_cache: folder: cannot write {path}: {error}; {first_row} rows are finished, "
                "and the same write goes on after them"
            ) from error
        self.manifest = manifest
        self._restart()
