"""Tests of `cachefreeze.plan`."""
