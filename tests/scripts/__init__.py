"""Tests of the scripts that users type."""
