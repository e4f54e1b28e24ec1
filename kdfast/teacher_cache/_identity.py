"""What tells one teacher, tokenizer or row from another: hashes that cost little beside running the teacher."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdfast.data.text import as_list
from kdfast.teacher_cache._manifest import mismatch

SAMPLES = 256  # values of each tensor that are hashed
KEPT = "_kdfast_sha256"  # where a model in 4 bits has what it was first found to be

# Entries of a config that say how a model is stored and called, not what it computes (its dtype is among the weights).
USAGE = {
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "transformers_version",
    "use_cache",
}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that turns text into numbers: vocabulary, rules and special tokens.

    Truncation and padding are left out, and the padding token with them: transformers changes them from call to call,
    and what the teacher makes of a row does not depend on them.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: the vocabulary is all that can be compared
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode()).hexdigest()


def config_sha256(model: nn.Module) -> str | None:
    """Hash of a transformers config without what loading, saving or a Trainer changes in it; None without one."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in USAGE and not name.startswith("_") and not name.endswith("_token_id")
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of name, shape, dtype and up to 256 evenly spaced values of every parameter and stored buffer.

    Of the model in memory, as it computes: a model fine-tuned or cast after loading is another teacher. Training
    changes all values of a matrix, so samples tell; an edit of single values may go unseen.
    Milliseconds for most models. In 4 bits of bitsandbytes, as they were when first asked for: on CPUs it packs them anew
    when it runs them, and `state_dict` would not put them back.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return _sha256_of(model.state_dict())
    kept: dict[str, Any] = vars(model)
    if KEPT not in kept:
        kept[KEPT] = _sha256_of(dict(model.named_parameters()))
    return str(kept[KEPT])


def _sha256_of(weights: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        # torchao's have no view.
        plain = tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor
        flat = plain.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def token_ids(row: Any, number: int) -> list[int]:
    """The input_ids of a row, as a list.

    Raises:
        CacheError: there are none, or they are not one sequence of integers.
    """
    ids = as_list(row["input_ids"]) if "input_ids" in row else None
    if not isinstance(ids, list) or not ids or not all(isinstance(one, int) for one in ids):
        got = f"{ids!r:.40}" if ids else "none"
        raise mismatch("rows", f"input_ids in row {number}, a list or tensor of integers [L]", got)
    return ids


def row_bytes(input_ids: list[int]) -> bytes:
    """A row as it is hashed: its length and its numbers, 64 bits each."""
    return array("q", [len(input_ids), *input_ids]).tobytes()


def row_crc32(input_ids: list[int]) -> int:
    """Checksum by which a row of another dataset, or another row, is told at once."""
    return zlib.crc32(row_bytes(input_ids))
