"""Fixtures that every test file may use."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast import _C
from kdfast.bench import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", default="0/1", help="i/n: every n-th test from the i-th on (kdfast/bench/evidence/tests.py)"
    )


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects (not skips) the GPU tests on a machine without one, and those of other shares."""
    share, of = map(int, config.getoption("share").split("/"))
    gpu = torch.cuda.is_available()
    kept = [item for item in items if gpu or not item.get_closest_marker("cuda")][share::of]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def a_round_of_each_time() -> Iterator[None]:
    """No test depends on how long something takes, and runs take many times at their end."""
    whole = timing.interleaved
    with pytest.MonkeyPatch.context() as patch:

        @wraps(whole)
        def once(calls: Any, device: str, **_: Any) -> Any:
            return whole(calls, device, rounds=1, warm=0)

        patch.setattr(timing, "interleaved", once)
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect_of_other_modules() -> None:
    """accelerate collects garbage after every training: of what is there already a fifth of such a test's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def a_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beside other processes the threads of so little work wait for one another most of the time."""
    imported = vars(request.module).values()
    names = [str(getattr(x, name, "")) for x in imported for name in ("__name__", "__module__")]
    if not any(name.startswith("tiny_") for name in names):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of processes that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=_C.cpu_variants())
def cpu_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test under every CPU variant that this processor has."""
    before = _C.cpu_variant()
    _C.set_cpu_variant(request.param)
    yield request.param
    _C.set_cpu_variant(before)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In place of the demonstration's model and reviews, by requirement; some files have others of their own."""
    import tiny_reviews  # imports transformers, which the operators' tests do not need

    return tiny_reviews.make(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def no_download(assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.data.demo.fetch", lambda package: assets[package.requirement])
