"""Tests of `cachefreeze.data`."""
