"""Rows on disk and what they are found by. Knows no model and names no tensor."""

from cachefreeze.segments.directory import Directory
from cachefreeze.segments.format import Row
from cachefreeze.segments.index import Index
from cachefreeze.segments.rows import Rows

__all__ = ["Directory", "Index", "Row", "Rows"]
