"""A look at a cache folder from outside: no network needed, nothing changed."""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.files import size_of_tree
from cachefreeze.store.folder import (
    Lock,
    in_use,
    is_cache_dir,
    is_committed,
    kept_since,
    rubbish,
    store_folders,
)
from cachefreeze.store.format import (
    Description,
    Layout,
    StoreError,
    read_description,
    read_manifest,
)
from cachefreeze.store.read import split_reader
from cachefreeze.store.usage import Usage, read_usage


@dataclass(frozen=True)
class StoreReport:
    """What is known of one store. Without a `description`, `damage` says why. `unused_seconds` is
    how long ago a run wrote down that it used it."""

    folder: Path
    description: Description | None
    committed: bool
    kept: bool
    in_use: bool
    bytes: int
    split_bytes: dict[str, int]
    age_seconds: float
    chunks_present: dict[str, int]
    damage: tuple[str, ...]
    usage: Usage | None
    unused_seconds: float | None

    @property
    def rows_present(self) -> dict[str, int]:
        """Rows of each split in chunks that are there."""
        splits = {} if self.description is None else self.description.splits
        return {
            name: min(self.chunks_present.get(name, 0) * split.rows_per_chunk, split.rows)
            for name, split in splits.items()
        }

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.damage:
            return "damaged"
        if not self.committed:
            return "being written" if self.in_use else "orphan"
        if self.in_use:
            return "in use"
        return "kept" if self.kept else "committed"


@dataclass(frozen=True)
class CacheReport:
    """All stores of a cache folder, what killed runs left there, and the disk."""

    folder: Path
    stores: tuple[StoreReport, ...]
    orphans: tuple[Path, ...]
    bytes: int
    free_bytes: int

    @property
    def damaged(self) -> bool:
        return any(store.damage for store in self.stores)


def inspect_cache(folder: Path, *, verify: bool = False) -> CacheReport:
    """Look at every store; with `verify`, read every chunk and check its checksum.

    Raises:
        UserError: the folder is no cache of ours.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the one given to --cache-dir")
    if not is_cache_dir(folder):
        raise UserError(f"{folder} is not a cache folder of cachefreeze: it has no CACHEDIR.TAG")
    reports = [_inspect(store, verify) for store in store_folders(folder)]
    return CacheReport(
        folder=folder,
        stores=tuple(found for found in reports if found is not None),
        orphans=tuple(rubbish(folder)),
        bytes=size_of_tree(folder),
        free_bytes=shutil.disk_usage(folder).free,
    )


def _inspect(folder: Path, verify: bool) -> StoreReport | None:
    """None if the store was removed by its run just now."""
    used = in_use(folder)
    lock = None
    # Held while looking, so that the run it belongs to leaves it in place; not to be had of one
    # that is being written.
    with contextlib.suppress(OSError):
        lock = Lock(folder, exclusive=False)
    try:
        return _look(folder, verify, used)
    except FileNotFoundError:
        return None
    finally:
        if lock is not None:
            lock.release()


def _look(folder: Path, verify: bool, used: bool) -> StoreReport:
    committed = is_committed(folder)
    description = None
    present: dict[str, int] = {}
    damage: list[str] = []
    try:
        description = read_description(folder)
        for split, layout in description.splits.items():
            present[split] = count_chunks(folder / split, layout)
        if committed:
            manifest = read_manifest(folder, description)
            for split, layout in description.splits.items():
                if present[split] < layout.chunks:
                    missing = layout.chunks - present[split]
                    damage.append(f"{split}: {missing} of {layout.chunks} chunks are missing")
                if verify:
                    reader = split_reader(folder / split, layout, manifest)
                    damage += map(str, reader.damage())
    except StoreError as error:
        # A store that is not complete may well lack its description: that is no damage.
        if committed:
            damage.append(str(error))
    usage, kept = read_usage(folder), kept_since(folder)
    uses = [] if kept is None else [kept]
    if usage is not None:
        uses.append(usage.time)
    created = description.created if description else folder.stat().st_mtime
    return StoreReport(
        folder=folder,
        description=description,
        committed=committed,
        kept=kept is not None,
        in_use=used,
        split_bytes={split: size_of_tree(folder / split) for split in present},
        bytes=size_of_tree(folder),
        age_seconds=max(time.time() - created, 0.0),
        chunks_present=present,
        damage=tuple(damage),
        usage=usage,
        unused_seconds=max(time.time() - max(uses), 0.0) if uses else None,
    )


def count_chunks(folder: Path, layout: Layout) -> int:
    """How many of the chunk files are there."""
    try:
        # The names that are there, not those that should be: a store may claim any number.
        return sum(map(layout.is_chunk_name, os.listdir(folder)))
    except OSError:
        return 0
