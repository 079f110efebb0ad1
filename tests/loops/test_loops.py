"""Holds `ActivationCache` against training loops as people write them."""

import pytest

from . import (
    beside,
    classification,
    dense,
    features,
    freezing,
    hugging_face,
    sequences,
    several_calls,
)
from .harness import Loop, Outcome, judge, train

LOOPS = (
    *classification.LOOPS,
    *freezing.LOOPS,
    *several_calls.LOOPS,
    *beside.LOOPS,
    *dense.LOOPS,
    *features.LOOPS,
    *sequences.LOOPS,
    *hugging_face.LOOPS,
)


PLAIN: dict[str, Outcome] = {}


def plain(loop: type[Loop]) -> Outcome:
    """The loop without a cache, run once for all tests."""
    if loop.__name__ not in PLAIN:
        PLAIN[loop.__name__] = train(loop)
    return PLAIN[loop.__name__]


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.__name__)
def loop(request: pytest.FixtureRequest) -> type[Loop]:
    found: type[Loop] = request.param
    for library in found.NEEDS:
        pytest.importorskip(library)
    return found


def test_a_plain_loop_learns(loop: type[Loop]) -> None:
    if loop.LEARNS:
        assert plain(loop).last < plain(loop).first


def test_a_loop_with_the_cache_ends_as_it_does_without(loop: type[Loop]) -> None:
    assert judge(loop, plain(loop)) == ""
