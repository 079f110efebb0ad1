"""Rows on disk, found by their keys. Knows no model and no tensor.

A directory holds sets. A set holds the rows of one value of a model. It consists of segments, each
the rows of one writer in zarr arrays. A segment consists of chunk files of whole rows, and a
journal with one line for each complete chunk. If the directory is a URL, `Mirror` copies chunks
between a local folder and an object store. docs/store-format.md describes the files.
"""

from cachefreeze.store.directory import Directory, open_directory
from cachefreeze.store.format import Row
from cachefreeze.store.index import Index
from cachefreeze.store.rows import Rows

__all__ = ["Directory", "Index", "Row", "Rows", "open_directory"]
