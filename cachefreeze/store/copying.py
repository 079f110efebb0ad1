"""Copies rows between folders and object stores."""

import logging
import os

from cachefreeze.errors import UserError
from cachefreeze.store.bucket import at_once, together
from cachefreeze.store.journal import Chunk, Content
from cachefreeze.store.places import Place, Segment, opened
from cachefreeze.store.reading import Damaged

_log = logging.getLogger("cachefreeze")


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Copies all rows of a directory that another one does not have.

        cachefreeze.copy("cache", "s3://bucket/cache")
        cachefreeze.copy("s3://bucket/cache", "/scratch/cache")

    Every chunk is checked. Damaged ones are left out, and the logger "cachefreeze" gets a warning.
    Runs may use both directories at the same time. A copy that was interrupted goes on where it
    stopped if it is made again.

    Args:
        source: Folder of an `ActivationCache`, or URL of an object store.
        target: Folder or URL. It is made if it does not exist.

    Returns:
        Number of copied rows.

    Raises:
        UserError: The source has no rows of cachefreeze, or one of the two cannot be used. The
            message says why.
    """
    if os.fspath(source) == os.fspath(target):
        raise UserError(f"{target} is the source of the copy: give another target")
    rows = 0
    with opened(source) as one, opened(target, create=True) as other:
        for name in one.sets():
            for segment in one.segments(name):
                if isinstance(segment, str):
                    _log.warning("%s", segment)
                    continue
                try:
                    rows += _copy_segment(name, segment, one, other)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise UserError(f"{target} cannot be written to ({reason})") from error
    return rows


def _copy_segment(name: str, segment: Segment, source: Place, target: Place) -> int:
    known = target.chunks(name, segment.name)
    if known is None:  # its rows were found to be wrong, or were removed
        return 0
    missing = [chunk for chunk in segment.chunks if chunk.number not in known]
    rows, step = 0, at_once(segment.head.layout)
    for start in range(0, len(missing), step):
        chunks = missing[start : start + step]

        def read(chunk: Chunk) -> Content | None:
            if source.is_hole(name, segment, chunk):
                return None
            try:
                return source.read(name, segment, chunk)
            except Damaged as error:
                _log.warning("%s: not copied", error)
                return None

        contents = together([lambda chunk=chunk: read(chunk) for chunk in chunks])  # type: ignore[misc]
        target.write(name, segment, list(zip(chunks, contents, strict=True)))
        rows += sum(
            chunk.rows for chunk, one in zip(chunks, contents, strict=True) if one is not None
        )
    return rows
