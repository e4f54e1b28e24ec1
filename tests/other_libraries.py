"""The losses of other libraries, as they are installed, without what their packages import beside them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

OFF = -100


def installed(package: str, file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of an installed package, run without the package's own `__init__`, which needs more than it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, package, bare)
    name = f"{package}.{Path(file).stem}"
    of_file = importlib.util.spec_from_file_location(name, Path(bare.__path__[0]) / file)
    assert of_file is not None
    assert of_file.loader is not None
    module = importlib.util.module_from_spec(of_file)
    of_file.loader.exec_module(module)
    return module


def same(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: Sequence[Tensor], rtol: float = 1e-5
) -> None:
    """The same value and the same gradients of all inputs; zeros would not do."""
    mine, its = ours(), theirs()
    assert its.isfinite().all()
    assert float(its.detach().abs().sum()) > 1e-3, "zeros would pass"
    torch.testing.assert_close(mine, its.to(mine.dtype), rtol=rtol, atol=rtol * 0.1)
    gradients = zip(*(torch.autograd.grad(x.sum(), inputs) for x in (mine, its)), strict=True)
    for mine, its in gradients:
        assert float(its.norm()) > 1e-5, "zeros would pass"
        assert float((mine - its).norm()) < rtol * float(its.norm())


def some_labels(rows: int, vocabulary: int) -> Tensor:
    """Class numbers, some rows of which do not count."""
    labels = torch.randint(0, vocabulary, (rows,))
    labels[1::3] = OFF
    return labels
