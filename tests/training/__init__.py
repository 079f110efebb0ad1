"""Tests of `cachefreeze.training`."""
