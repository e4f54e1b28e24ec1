"""What a caller got wrong is told in one form, "name: argument: expected …, got …" (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kdfast

ROOT = Path(kdfast.__file__).parent
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
BUILT_IN = {"ValueError", "TypeError", "BadParameter"}
# How messages begin that are of no caller's input.
OTHERS = {
    "cannot fetch ": "a download failed",
    "to unpack ": "a package is missing",
    "cannot unpack ": "a program failed",
    "cannot write the cache folder ": "a disk failed",
}


def own_errors() -> set[str]:
    """kdfast's classes of errors, by what they are called or derive from."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {one.name for one in classes if any(ast.unparse(base).endswith("Error") for base in one.bases)}


def errors() -> Iterator[tuple[str, ast.AST]]:
    """The message of every error that a file makes, raised there or elsewhere; a name stands for all it is set to."""
    classes = BUILT_IN | own_errors()
    for file, tree in TREES.items():
        set_to: dict[str, list[ast.AST]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                set_to.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                called = {ast.unparse(part).split(".")[-1] for part in ast.walk(node.func)}
                message = node.args[0]
                if called & classes:
                    named = set_to.get(message.id, [message]) if isinstance(message, ast.Name) else [message]
                    yield from ((f"{file}:{node.lineno}", one) for one in named)


def text(message: ast.AST) -> str:
    """Its literal part."""
    return "".join(
        node.value for node in ast.walk(message) if isinstance(node, ast.Constant) and type(node.value) is str
    )


def passes_on(message: ast.AST) -> bool:
    """Whether it is another error's, with something before it."""
    parts = [ast.unparse(part.value) for part in ast.walk(message) if isinstance(part, ast.FormattedValue)]
    return "error" in parts or ast.unparse(message).startswith("str(error)")


def test_messages_have_one_form() -> None:
    found = list(errors())
    assert len(found) > 150
    assert own_errors() == {"AssetError", "CacheError", "Missing", "TaskError"}
    wrong = [
        f"{place}: {text(message)}"
        for place, message in found
        if not (": expected " in text(message) and "got " in text(message))
        and not text(message).startswith(tuple(OTHERS))
        and not passes_on(message)
    ]
    assert wrong == []


def test_no_exception_is_out_of_use() -> None:
    texts = [text(message) for _, message in errors()]
    assert [begin for begin in OTHERS if not any(one.startswith(begin) for one in texts)] == []
