"""Tests of `cachefreeze.report`."""
