"""The files of a cache: manifest, shards, and the checks that need no teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FORMAT = 1
NAME = "manifest.json"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # and what safetensors calls them


class CacheError(ValueError):
    """An argument or a file of a cache is not what was expected; the message names it."""


def mismatch(argument: str, expected: object, got: object) -> CacheError:
    """The error in the one form that all of them have."""
    return CacheError(f"teacher_cache: {argument}: expected {expected}, got {got}")


@dataclass(frozen=True)
class Settings:
    """What a cache's contents depend on besides the rows. Compared before a write goes on; kept in every shard too."""

    teacher_config_sha256: str | None
    teacher_weights_sha256: str
    tokenizer_sha256: str
    outputs: tuple[str, ...]
    positions: str
    k: int | None
    temperature: float | None
    layers: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Shard:
    """One file. `rows_sha256` is of the input_ids of all rows up to its end, so the last one's is of the dataset."""

    file: str
    first_row: int
    rows: int
    tokens: int
    bytes: int
    sha256: str
    rows_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        teacher: name or path that the teacher was loaded from.
        settings: hashes of teacher and tokenizer, outputs, k, temperature, layers, dtype.
        vocab_size: width of the teacher's logits; None without "topk", and before the first shard.
        shards: the finished ones, in the order of their rows.
        complete: whether all rows are there.
    """

    teacher: str
    settings: Settings
    vocab_size: int | None = None
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens that the outputs per token are of."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Replaces the manifest in one step, so that it is whole whenever it is there."""
        values = {"format": FORMAT, "rows": self.rows, "tokens": self.tokens, **dataclasses.asdict(self)}
        partial = folder / f"{NAME}.partial"
        with partial.open("w") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / NAME)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads and checks it.

        Raises:
            CacheError: there is none, it is of another format, or edited into something that cannot be.
        """
        path = folder / NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise mismatch("folder", f"a teacher cache with {path}", "none") from None
        except (OSError, ValueError) as error:
            raise mismatch("folder", f"a manifest in JSON at {path}", error) from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise mismatch("folder", f"a manifest of format {FORMAT} at {path}", f"format {found}")
        try:
            values["settings"]["outputs"] = tuple(values["settings"]["outputs"])
            values["settings"]["layers"] = tuple(values["settings"]["layers"])
            manifest = cls(
                values["teacher"],
                Settings(**values["settings"]),
                values["vocab_size"],
                [Shard(**shard) for shard in values["shards"]],
                values["complete"],
            )
            counts = {"rows": manifest.rows, "tokens": manifest.tokens}
        except (KeyError, TypeError, AttributeError) as error:
            raise mismatch(
                "folder", f"the fields of format {FORMAT} in {path}", f"{type(error).__name__}: {error}"
            ) from None
        for name, count in counts.items():
            if values.get(name) != count:
                raise mismatch("folder", f"{name} {count}, the sum over the shards in {path}", values.get(name))
        return manifest

    def metadata(self, first_row: int) -> str:
        """What a shard says of itself, so that one from elsewhere, or an edited manifest, is found out."""
        values = {**dataclasses.asdict(self.settings), "vocab_size": self.vocab_size, "first_row": first_row}
        return json.dumps(values, sort_keys=True)

    def check(self, folder: Path, verify: bool = False) -> None:
        """Compares sizes, headers and row ranges of all shards with the manifest; with `verify`, their sha256 as well.

        Raises:
            CacheError: names the file, what was expected and what is there.
        """
        row = 0
        for shard in self.shards:
            path = folder / shard.file
            if shard.first_row != row:
                raise mismatch("folder", f"{shard.file} to begin at row {row} in {folder / NAME}", shard.first_row)
            row += shard.rows
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                raise mismatch(
                    "folder", f"{path} of {shard.bytes} bytes", "no file" if size is None else f"{size} bytes"
                )
            try:
                self._check_header(path, shard)
            except SafetensorError as error:
                raise mismatch("folder", f"{path} to be a safetensors file", error) from None
            if verify and (found := file_sha256(path)) != shard.sha256:
                raise mismatch("folder", f"{path} with sha256 {shard.sha256}", found)

    def _check_header(self, path: Path, shard: Shard) -> None:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get("kdfast", "{}"))
            for name, value in json.loads(self.metadata(shard.first_row)).items():
                if stored.get(name) != value:
                    raise mismatch("folder", f"{name} {value} in {path}, as in {NAME}", stored.get(name))
            expected = self._heads(shard)
            if sorted(file.keys()) != sorted(expected):
                raise mismatch("folder", f"tensors {sorted(expected)} in {path}", sorted(file.keys()))
            for name, (dtype, *shape) in expected.items():
                found = file.get_slice(name)
                head = [found.get_dtype(), *found.get_shape()[: len(shape)]]
                if head != [dtype, *shape]:
                    raise mismatch("folder", f"{name} to be {[dtype, *shape]} in {path}", head)

    def _heads(self, shard: Shard) -> dict[str, tuple[Any, ...]]:
        """Dtype and leading dimensions of a shard's tensors, in safetensors' terms."""
        settings, dtype = self.settings, DTYPES[self.settings.dtype]
        heads: dict[str, tuple[Any, ...]] = {"row_crc32": ("I64", shard.rows)}
        if set(settings.outputs) & {"topk", "hidden"}:
            heads |= {"row_offsets": ("I64", shard.rows + 1), "row_lengths": ("I64", shard.rows)}
            heads["positions"] = ("I32", shard.tokens)
        if "topk" in settings.outputs:
            heads["topk_logprobs"] = (dtype, shard.tokens, settings.k)
            heads["topk_indices"] = ("I32", shard.tokens, settings.k)
        if "logits" in settings.outputs:
            heads["logits"] = (dtype, shard.rows)
        if "cls" in settings.outputs:
            heads |= dict.fromkeys([f"cls_{layer}" for layer in settings.layers] or ["cls"], (dtype, shard.rows))
        if "hidden" in settings.outputs:
            heads |= {f"hidden_{layer}": (dtype, shard.tokens) for layer in settings.layers}
        return heads


def file_sha256(path: Path) -> str:
    """sha256 of a file (half a gigabyte to one and a half in a second)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
