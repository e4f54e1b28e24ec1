"""What `kdfast cache-teacher` and `kdfast check-cache` do: load, write with a progress bar, and tell what is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from transformers import AutoConfig

from kdfast.models import pairing
from kdfast.models.loading import load_tokenizer, pretrained
from kdfast.results.disk import saving
from kdfast.teacher_cache._manifest import CacheError, Manifest, mismatch
from kdfast.teacher_cache._read import TeacherCache
from kdfast.teacher_cache._text import text_rows
from kdfast.teacher_cache._write import write

MAX_LENGTH = 1024  # tokens of a row, where nothing else is said


def cache_teacher(
    model: str,
    data: str,
    output: Path,
    text_column: str,
    max_length: int | None,
    outputs: Sequence[str],
    **options: Any,
) -> None:
    """Writes a cache of a model's outputs on a file of text; `options` are those of `write`.

    Args:
        max_length: None: `MAX_LENGTH`, or as many tokens as the model takes.

    Raises:
        CacheError, OSError, ImportError: as `write` and `text_rows`; the model cannot be loaded, lacks its head or its
            tokenizer, or takes fewer tokens than `max_length`.
    """
    _quiet()
    try:
        config = pretrained(AutoConfig, "model", model)  # first: of a folder that holds no model this is told
        tokenizer = load_tokenizer("model", model)
        teacher = _load(model, config, outputs)
        if max_length is None:
            max_length = min(MAX_LENGTH, tokenizer.model_max_length, pairing.positions(teacher) or MAX_LENGTH)
        pairing.check_length(model, teacher, max_length)
        if "logits" in outputs:
            pairing.pad_alike(model, teacher, tokenizer)
    except CacheError:
        raise
    except ValueError as error:
        raise CacheError(f"teacher_cache: {error}") from None
    notes: list[str] = []
    rows = text_rows(data, tokenizer, text_column=text_column, max_length=max_length, tell=notes.append)
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    before: list[tuple[int, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        bar = Progress(*columns, console=Console(stderr=True))
        task = bar.add_task("rows", total=len(rows))

        def progress(rows_done: int, tokens_done: int) -> None:
            if len(before) == 1:  # after the first batch: no bar above the message of a mistake
                stack.enter_context(bar)
            before.append((tokens_done, time.perf_counter()))
            bar.update(task, completed=rows_done)

        stack.enter_context(saving(output))
        cache = write(teacher, rows, output, tokenizer=tokenizer, outputs=outputs, progress=progress, **options)
    tokens, seconds = (last - first for first, last in zip(before[0], before[-1], strict=True))
    speed = {"seconds": f"{seconds:.1f}", "tokens/s": f"{tokens / seconds:,.0f}"} if tokens else {}
    for note in notes:
        print(note)
    _show(cache.manifest, f"{output}: {', '.join(cache.manifest.settings.outputs)} of {model}", speed)


def check_cache(folder: Path) -> None:
    """Compares all of a cache with its manifest, sha256 included, and tells what it holds.

    Raises:
        CacheError: it is damaged or not complete.
    """
    manifest = TeacherCache(folder, verify=True).manifest
    settings = manifest.settings
    facts = {"teacher": manifest.teacher, "outputs": ", ".join(settings.outputs), "dtype": settings.dtype}
    if settings.k is not None:
        facts |= {
            "k": str(settings.k),
            "temperature": str(settings.temperature),
            "vocabulary": str(manifest.vocab_size),
        }
    if settings.layers:
        facts["layers"] = ", ".join(map(str, settings.layers))
    if settings.positions != "all":
        facts["positions"] = settings.positions
    facts["shards"] = str(len(manifest.shards))
    facts["sha256 of tokenizer"] = settings.tokenizer_sha256
    facts["sha256 of rows"] = manifest.shards[-1].rows_sha256
    _show(manifest, f"{folder}: complete, all sums agree", facts)


def _load(name: str, config: Any, outputs: Sequence[str]) -> Any:
    """The model of the class that has the outputs, with none of its weights made up."""
    masked = any(architecture.endswith("ForMaskedLM") for architecture in config.architectures or ())
    if "topk" in outputs:
        kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModelForSequenceClassification if "logits" in outputs else transformers.AutoModel
    try:
        model, loaded = kind.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise mismatch("model", f"one that {kind.__name__} loads from {name}", _line(error)) from None
    # A head that is not in the checkpoint starts from random numbers; a pooler's are used by none of the other outputs.
    if loaded["missing_keys"] and {"topk", "logits"} & {*outputs}:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise mismatch("model", f"all weights of {type(model).__name__} in {name}", f"none for {missing}")
    return model


def _quiet() -> None:
    """One line per mistake, and one progress bar: this command's."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with suppress(ModuleNotFoundError):  # text_rows says what is missing
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _show(manifest: Manifest, title: str, facts: dict[str, str]) -> None:
    size = {
        "rows": f"{manifest.rows:,}",
        "tokens": f"{manifest.tokens:,}",
        "bytes": f"{manifest.bytes:,}",
        "bytes per token": f"{manifest.bytes / max(1, manifest.tokens):,.1f}",
    }
    table = Table("", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for name, value in (size | facts).items():
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(title, soft_wrap=True, markup=False)
    console.print(table)
