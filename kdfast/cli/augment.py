"""`kdfast augment`: a dataset of a task's rows and variants of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.shared import check_writable, fail, names
from kdfast.data.augment import MANIFEST, Augmentation
from kdfast.results.disk import failure, told


def augment(
    output: Annotated[Path, typer.Argument(help="Folder for the rows, which `kdfast distill --data` reads.")],
    data: Annotated[
        str | None, typer.Option(help="Labelled text, as of distill. Default: movie reviews.", show_default=False)
    ] = None,
    variants: Annotated[int, typer.Option(help="Of each text; copies among them are dropped.", min=1)] = 20,
    probability: Annotated[float, typer.Option(help="Of a word to be exchanged.", min=0.0, max=1.0)] = 0.4,
    candidates: Annotated[int, typer.Option(help="Words that take its place, to draw from.", min=1)] = 15,
    model: Annotated[
        str | None,
        typer.Option(
            help="Masked language model that proposes them, a folder or Hub name; of another encoder, words of similar "
            "embeddings. Default: MiniLM, which is such a one.",
            show_default=False,
        ),
    ] = None,
    word_vectors: Annotated[
        str | None,
        typer.Option(help="Text file of GloVe's form, for words of several pieces.", show_default=False),
    ] = None,
    restore_pairs: Annotated[
        bool, typer.Option(help="Variants of a pair's second text come beside the first as it was.")
    ] = True,
    text_columns: Annotated[
        str | None, typer.Option(help="Column of the text, or two of pairs. Default: found by name.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: found by name.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="classification, regression or multi_label. Default: by the labels.")
    ] = None,
    train_rows: Annotated[int | None, typer.Option(help="Use no more, drawn with a fixed seed.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue the rows in the output folder, or remove them and start over."),
    ] = True,
) -> None:
    """Writes a task's training rows with variants of them, in which words are exchanged, as TinyBERT does it.

    Test rows stay as they are. `kdfast distill tinybert` does the same by itself.

    Ctrl-C keeps the files that are finished. The same command continues after them; what is finished is not repeated.
    """
    try:
        from rich.console import Console

        from kdfast.data import demo, tasks
        from kdfast.results import libraries
        from kdfast.runs.augment import AugmentedRows
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    check_writable(output)
    libraries.quiet()
    console = Console()
    columns = None if text_columns is None else names(text_columns)
    how = Augmentation(variants, probability, candidates, model, word_vectors, restore_pairs, seed)
    try:
        task = tasks.load(data, text_columns=columns, label_column=label_column, kind=kind, train_rows=train_rows)
        for note in task.notes:
            console.print(note, markup=False)
        base = model or str(demo.fetch(demo.MINILM))
        if not resume and (output / MANIFEST).is_file():
            shutil.rmtree(output)
        AugmentedRows(how, task, base, output).write(console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except demo.AssetError as error:
        fail(str(error), 1)
    except OSError as error:
        if failure(error, output) is None:
            raise
        fail(f"{told(error)}; the same command continues where this one was", 1)
    except KeyboardInterrupt:
        fail("stopped; the same command continues after the last finished file", 130)
