"""Lists, checks and prunes the contents of an object store."""

import time
from collections.abc import Iterator

from cachefreeze.store.commits import Record
from cachefreeze.store.format import NAME
from cachefreeze.store.inspect import Pruned, SetReport
from cachefreeze.store.objects import Entry
from cachefreeze.store.places import BucketPlace, opened_store
from cachefreeze.store.reading import Damaged

# Objects of a chunk that no commit names belong to a run that was killed if they are older.
_OLD_SECONDS = 86400.0


def inspect_objects(url: str) -> list[SetReport]:
    """Returns the contents of each set in an object store. Writes nothing.

    The time of the last use is that of the last writing: an object store does not know who reads.

    Raises:
        UserError: The object store has no rows or does not work.
    """
    reports = []
    with opened_store(url) as place:
        entries = _by_segment(place)
        for name in sorted({name for name, _ in entries}):
            report = SetReport(name)
            reports.append(report)
            for (one, _), objects in entries.items():
                if one == name:
                    report.nbytes += sum(entry.nbytes for entry in objects)
            for segment in place.segments(name):
                if isinstance(segment, str):
                    report.segments += 1
                    report.problems.append(segment)
                    continue
                times = [entry.time for entry in entries.get((name, segment.name), [])] or [0.0]
                report.segments += 1
                report.rows += sum(
                    chunk.rows
                    for chunk in segment.chunks
                    if not place.is_hole(name, segment, chunk)
                )
                if max(times) >= report.last_use:
                    report.row, report.about = segment.head.layout.row, segment.head.about
                report.last_use = max(report.last_use, *times)
                report.first_use = min(report.first_use or min(times), *times)
    return reports


def _by_segment(place: BucketPlace) -> dict[tuple[str, str], list[Entry]]:
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in place.bucket.objects.entries():
        name, _, rest = entry.path.partition("/")
        segment = rest.partition("/")[0]
        if NAME.fullmatch(name) and (NAME.fullmatch(segment) or segment == "commits"):
            found.setdefault((name, segment), []).append(entry)
    return found


def verify_objects(url: str) -> Iterator[str]:
    """Reads everything. Yields a message for each segment or chunk that is damaged.

    Raises:
        UserError: The object store has no rows or does not work.
    """
    with opened_store(url) as place:
        for name in place.sets():
            for segment in place.segments(name):
                if isinstance(segment, str):
                    yield segment
                    continue
                for chunk in segment.chunks:
                    if place.is_hole(name, segment, chunk):
                        continue
                    try:
                        place.read(name, segment, chunk)
                    except Damaged as error:
                        yield str(error)


def prune_objects(url: str, older_than: float) -> Pruned:
    """Removes segments that were written long ago, and objects that no commit names.

    Args:
        url: URL of the object store.
        older_than: Seconds since the last writing. 0 removes all segments, and infinity only
            objects that no run can read.

    Raises:
        UserError: The object store has no rows or does not work.
    """
    pruned, now = Pruned(), time.time()
    with opened_store(url) as place:
        for (name, segment), entries in _by_segment(place).items():
            if segment == "commits":
                continue
            commits = place.commits(name)
            chunks, last = commits.chunks.get(segment), max(entry.time for entry in entries)
            if chunks and segment not in commits.removed:
                if now - last < older_than:
                    continue
                # First the commit: no process asks for objects that are missing.
                place.bucket.commit(name, commits, [Record(segment, None)])
                pruned.segments += 1
                rows = sum(chunk.rows for chunk in chunks.values())
                pruned.rows[name] = pruned.rows.get(name, 0) + rows
            elif not chunks and now - last < min(older_than, _OLD_SECONDS):
                continue
            place.bucket.objects.remove([entry.path for entry in entries])
            pruned.nbytes += sum(entry.nbytes for entry in entries)
    return pruned
