"""What the commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import typer

from kdfast.results.disk import check_output


def layer_numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{name}: expected layer numbers such as 0,2,4, got {text!r}") from None


def numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{name}: expected numbers such as 0.9,0.5, got {text!r}") from None


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def check_writable(folder: Path) -> None:
    """`check_output` of what a command writes, as a mistake in the command."""
    try:
        check_output(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def fail(message: str, code: int) -> NoReturn:
    print(f"kdfast: {message}", file=sys.stderr)
    sys.exit(code)
