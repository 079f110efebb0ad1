"""Fixtures of the loops."""

import pytest


@pytest.fixture(autouse=True)
def any_share() -> None:
    """Leaves the share of the time that must be frozen as it is."""
