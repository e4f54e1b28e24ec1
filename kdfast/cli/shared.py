"""What the commands share."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


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


def fail(message: str, code: int) -> NoReturn:
    print(f"kdfast: {message}", file=sys.stderr)
    sys.exit(code)
