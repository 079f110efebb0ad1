"""Tests of `cachefreeze.probing`."""
