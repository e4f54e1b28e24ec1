"""What kdfast does without being asked: importing it, all of it, opens no connection and unpickles nothing; and nothing of it
reads a pickle at all."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

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


def public_modules() -> list[str]:
    """All but those with an underscore, and the library, which is no module of Python."""
    names = [module.name for module in pkgutil.walk_packages(kdfast.__path__, "kdfast.")]
    return [name for name in names if not any(part.startswith(("_", "lib")) for part in name.split("."))]


def seen(modules: list[str], after: str = "") -> str:
    program = AUDITED.format(modules=modules, after=after)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_import_opens_and_unpickles_nothing() -> None:
    assert seen(["kdfast"]) == "[]"


def test_nor_do_its_public_modules() -> None:
    found = public_modules()
    assert {"kdfast.integrations.trl", "kdfast.bench.harness", "kdfast.doctor", "kdfast.prune.criteria"} <= {*found}
    assert seen(found) == "[]"


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
