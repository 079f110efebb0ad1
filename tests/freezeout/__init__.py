"""Tests of `cachefreeze.freezeout`."""
