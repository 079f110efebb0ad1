"""Runs that are killed again and again: `python -m tests.chaos`, `make chaos N=200`."""
