"""`kdfast cache-teacher` and `kdfast check-cache`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli.shared import check_writable, fail, layer_numbers, names

TYPED = {"folder": "output", "rows": "data"}  # what the command calls arguments of `kdfast.teacher_cache.write`


def cache_teacher(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a transformers model.")],
    data: Annotated[
        str, typer.Argument(help="A .txt (a row per line), .jsonl, .json, .csv or .parquet file, or Hub name.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the cache.")],
    k: Annotated[int, typer.Option("--k", help="Entries per token.")] = 64,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    outputs: Annotated[
        str, typer.Option(help="topk of a language model, logits of a classifier, cls, hidden; several with commas.")
    ] = "topk",
    layers: Annotated[
        str | None, typer.Option(help="For hidden and cls, such as 0,6,12: 0 is the embeddings, N after N layers.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per row; longer ones are cut. Default: 1024, or the model's positions.", min=1),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Where the text is.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    shard_mb: Annotated[int, typer.Option(help="Megabytes per file, and in memory until it is written.", min=1)] = 512,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, of what is stored.")] = "float32",
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue the cache in the output folder, or remove it and start over."),
    ] = True,
) -> None:
    """Writes a teacher's outputs into a folder, to train from many times.

    topk are the k largest log-probabilities of every token at the temperature, with their indices; cls is the first
    token's hidden state, the last or those of the layers. Rows without text are left out.
    `kdfast.teacher_cache` reads the folder.

    Ctrl-C keeps the files that are finished. The same command continues after them; what is finished is not repeated.
    """
    command, cache_error = _import_cache_command()
    if not os.path.isfile(output):  # which is told otherwise
        check_writable(output)
    try:
        command.cache_teacher(
            model,
            data,
            output,
            text_column,
            max_length,
            names(outputs),
            k=k,
            temperature=temperature,
            layers=layer_numbers("layers", layers) if layers else (),
            batch_size=batch_size,
            shard_bytes=shard_mb * 2**20,
            dtype=dtype,
            resume=resume,
        )
    except cache_error as error:
        argument, _, mistake = _without_library(error).partition(": ")
        fail(f"{TYPED.get(argument, argument)}: {mistake}", 2)
    except ImportError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("stopped; the same command continues after the last finished file", 130)


def check_cache(folder: Annotated[Path, typer.Argument(help="Where cache-teacher put it.")]) -> None:
    """Reads a cache of cache-teacher, compares it with its sums, and tells what it holds. A damaged one:
    exit code 1."""
    command, cache_error = _import_cache_command()
    try:
        command.check_cache(folder)
    except cache_error as error:
        fail(_without_library(error), 1)


def _without_library(error: Exception) -> str:
    return str(error).removeprefix("teacher_cache: ")


def _import_cache_command() -> tuple[Any, Any]:
    try:
        from kdfast.runs import cache
        from kdfast.teacher_cache import CacheError
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    return cache, CacheError
