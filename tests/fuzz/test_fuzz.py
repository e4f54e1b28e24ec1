"""Every operator on random calls: it agrees with its reference, or refuses them in the one form of messages."""

from __future__ import annotations

import os

import pytest
from agreement import TALLY, check
from calls import Call, calls
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from kdfast.bench.registry import OPERATORS

# A whole number of calls of all operators; docs/reliability.md has what many more found.
COUNT = int(os.environ.get("KDFAST_FUZZ", "2000"))


@pytest.mark.parametrize("name", OPERATORS)
def test_agrees_or_refuses(name: str) -> None:
    @settings(
        max_examples=-(-COUNT // len(OPERATORS)),
        derandomize="KDFAST_FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        call: Call = data.draw(calls(name))
        note("; ".join([*call.story, repr(call)]))
        check(OPERATORS[name], call)

    TALLY.clear()
    run()
    assert TALLY["agreed"] > 0.1 * TALLY["refused"], TALLY
