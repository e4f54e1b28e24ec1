"""What kdfast does without being asked: importing it, all of it, opens no connection and unpickles nothing; and nothing of it
reads a pickle at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast

ROOT = Path(kdfast.__file__).parent
AUDITED = """
import importlib, sys
events = []
watched = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "urllib.Request")
sys.addaudithook(lambda event, args: events.append((event, str(args))) if event in watched else None)
for module in {modules}:
    importlib.import_module(module)
{after}
print([event for event, _ in events])
"""


def seen(modules: list[str], after: str = "") -> str:
    program = AUDITED.format(modules=modules, after=after)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("whole", [False, True])
def test_import_opens_and_unpickles_nothing(whole: bool) -> None:
    modules = ["kdfast"]
    if whole:
        late = (
            "objective",
            "prune",
            "students",
            "elastic",
            "early_exit",
            "on_policy",
            "teacher_cache",
            "hf",
            "cli.main",
        )
        modules += [
            f"kdfast.{name}" for name in (*late, "train.trainer", "recipes", "runs.classifier", "runs.causal_lm")
        ]
    assert seen(modules) == "[]"


def test_what_would_be_seen() -> None:
    after = "import pickle, collections; pickle.loads(pickle.dumps(collections.OrderedDict()))"
    assert "pickle.find_class" in seen(["kdfast"], after=after)


def test_reads_no_pickles() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) and {"pickle", "marshal", "shelve"} & {alias.name for alias in node.names}:
                wrong.append(f"{path.name}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                safe = [k for k in node.keywords if (k.arg, ast.unparse(k.value)) == ("weights_only", "True")]
                if not safe:
                    wrong.append(f"{path.name}: {ast.unparse(node)}")
    assert wrong == []
