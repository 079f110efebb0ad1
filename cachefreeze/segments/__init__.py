"""Rows on disk and what they are found by. Knows no model and names no tensor."""

from cachefreeze.segments.index import Index

__all__ = ["Index"]
