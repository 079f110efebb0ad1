"""Fixtures of the tests of faults."""

from ..cache.conftest import one_thread as one_thread
