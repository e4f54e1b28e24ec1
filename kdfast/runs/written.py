"""Targets that a teacher writes of sources: sequence-level distillation (Kim & Rush, 2016, arXiv:1606.07947)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, DynamicCache, EncoderDecoderCache

from kdfast.data.text import Row
from kdfast.models.student_parts import count_name
from kdfast.results.disk import saving
from kdfast.results.measure import length
from kdfast.results.progress import bar
from kdfast.train.on_policy import until_end

ROWS_OF_A_SEARCH = 16


def outgrows_cache(model: Any) -> bool:
    """Whether `generate` makes a cache of fewer layers than the decoder has: of T5 transformers counts the encoder's."""
    layers = getattr(model.config, count_name(model.config, "decoder"), 0)
    return bool(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", layers) < layers)


def _growing_cache(model: Any) -> dict[str, Any]:
    """The cache that `generate` is given of such a model. Other models have their own kinds."""
    if not outgrows_cache(model):
        return {}
    newer = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if newer else "past_key_values"
    return {name: EncoderDecoderCache(DynamicCache(), DynamicCache())}


@torch.inference_mode()
def rows(model: Any, given: Sequence[Row], tokenizer: Any, path: Path, beams: int, longest: int) -> list[Row]:
    """The rows, in the order of their lengths, with what the model writes as `labels`, without those of which it writes
    special tokens alone.

    Args:
        model: an encoder-decoder; how it writes, but for the beams and the length, its generation_config says.
        given: rows with `input_ids`.
        path: a file of JSON lines, to which every search adds its targets: tokens, and the text that they are. Those
            that are there are not searched for again.
        beams: of the beam search.
        longest: tokens of a target.
    """
    given = sorted(given, key=length)  # hardly any padding
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    begun = len(lines) if len(lines) == len(given) else len(lines) // ROWS_OF_A_SEARCH * ROWS_OF_A_SEARCH
    made = [json.loads(line) for line in lines[:begun]]
    collate = DataCollatorWithPadding(tokenizer)
    with saving(path), path.open("a", encoding="utf-8") as file, bar("targets", len(given)) as shown:
        file.truncate(sum(len(line.encode()) + 1 for line in lines[:begun]))  # without a search that was cut short
        shown.update(begun)
        for start in range(begun, len(given), ROWS_OF_A_SEARCH):
            some = [{"input_ids": row["input_ids"]} for row in given[start : start + ROWS_OF_A_SEARCH]]
            batch = collate(some).to(model.device)
            search = {"num_beams": beams, "do_sample": False, "max_new_tokens": longest}
            found = model.generate(**batch, **search, **_growing_cache(model))
            for tokens in (until_end(row, [tokenizer.eos_token_id]) for row in found[:, 1:].tolist()):
                made.append({"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens})
                file.write(json.dumps(made[-1], ensure_ascii=False) + "\n")
            file.flush()
            shown.update(len(some))
    return [{**row, "labels": of["tokens"]} for row, of in zip(given, made, strict=True) if of["text"].strip()]
