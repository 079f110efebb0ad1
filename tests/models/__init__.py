"""Tests of `cachefreeze.models`."""
