"""A short, seeded piece of the fuzzer: `make fuzz` runs more of it."""

import pytest

from tests.fuzz import Round


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_no_round_is_wrong_without_a_word(first: int) -> None:
    for seed in range(first, first + 10):
        one = Round(seed)
        assert not one.check().startswith("WRONG"), f"python -m tests.fuzz --seed {seed}: {one}"
