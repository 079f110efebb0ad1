"""Rows on disk, found by their keys. Knows no model and no tensor."""

from cachefreeze.store.directory import Directory
from cachefreeze.store.format import Row
from cachefreeze.store.index import Index
from cachefreeze.store.rows import Rows

__all__ = ["Directory", "Index", "Row", "Rows"]
