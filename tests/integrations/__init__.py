"""Tests of `cachefreeze.integrations`."""
