"""The stores of one run: found, verified, mended and filled. Knows no network."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefreeze.background import HeldStore, WritingStore
from cachefreeze.device import memory_for_rows
from cachefreeze.encoding import Encoding, as_array, name_of
from cachefreeze.errors import Interrupted
from cachefreeze.files import human_bytes, size_of_tree
from cachefreeze.moments import DeviceClock
from cachefreeze.rows import Indices, batches_of
from cachefreeze.sinks import Sink, sink_for
from cachefreeze.store import (
    VALUES,
    Damage,
    Description,
    Layout,
    Store,
    StoreError,
    StoreWriter,
    in_use,
    is_being_written,
    is_committed,
    kept_since,
    label,
    mend_chunk,
    open_store,
    read_description,
    remove_rubbish,
    remove_store,
    store_folders,
)
from cachefreeze.terminal import progress_bar
from cachefreeze.tiers import Memory, Tiers

# How often to look whether another run has written its store, and for how long nothing may come of
# it before that run is taken to have stopped.
POLL_SECONDS, STALLED_SECONDS = 0.2, 60.0
# How often a store is asked for that another run holds without writing it.
ATTEMPTS = 10
# Rows that the ranges of int8 are taken from.
RANGE_ROWS = 512

# The rows that a store is to hold: of a split, a batch for each array of row indices.
Source = Callable[[str, Sequence[Indices]], Iterator[Tensor]]


@dataclass(frozen=True)
class Filling:
    """What it took to come by a store. Rows that a killed run had written already are `held`; one
    that was there is `reused`. If its rows are in `memory`, they are to be served from there."""

    store: HeldStore
    held: int = 0
    compute_seconds: float = 0.0
    reused: bool = False
    memory: Memory | None = None


class Stores:
    """The stores of one run in a cache folder.

    Args:
        directory: of the cache, prepared.
        rows: of each split.
        batch_size: in which rows are computed.
        device: where they are computed.
        tiers: where rows may be held.
        threads: see `sink_for`.
        max_bytes, stored, network, details, warn, stopping: see `PrefixCache`.
    """

    def __init__(
        self,
        directory: Path,
        rows: Mapping[str, int],
        batch_size: int,
        device: torch.device,
        *,
        tiers: Tiers,
        threads: int,
        max_bytes: float,
        stored: str | None,
        network: str,
        details: Mapping[str, str],
        warn: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.directory = directory
        self.rows = dict(rows)
        self.batch_size = batch_size
        self.device = device
        self.tiers = tiers
        self.threads = threads
        self.max_bytes = max_bytes
        self.stored = stored
        self.network = network
        self.details = details
        self.warn = warn
        self.stopping = stopping
        # Those that another run did not come to an end with.
        self._given_up: set[str] = set()

    def take(
        self,
        fingerprint: str,
        boundary: int,
        unit: str,
        codec: str,
        source: Source,
        seconds_per_row: float,
        *,
        before_filling: Callable[[], None] | None,
    ) -> Filling | None:
        """A store that is there, or else one that is filled; None if neither can be had, which is
        told. What another run is writing is waited for.

        Args:
            fingerprint, boundary, unit, codec, source, seconds_per_row: see `fill`.
            before_filling: called then; None fills none.

        Raises:
            OSError, StoreError: it cannot be written; nothing is left of it.
            Interrupted: `stopping` says so.
        """
        for _ in range(ATTEMPTS):
            try:
                found = self.find(fingerprint, source)
                if found is not None:
                    return Filling(found, reused=True)
                if before_filling is None:
                    return None
                before_filling()
                return self.fill(fingerprint, boundary, unit, codec, source, seconds_per_row)
            except BlockingIOError:
                if fingerprint in self._given_up:
                    return None
                if not self._wait_for_writer(fingerprint, unit):
                    break
        # Or it is a whole store that others read, and of no use to this one.
        self._given_up.add(fingerprint)
        self.warn(
            f"another run is using the store after {unit}, and does not come to an end with it: "
            "not cached"
        )
        return None

    def find(self, fingerprint: str, source: Source) -> Store | None:
        """A committed store of these very rows, if there is one that can be used.

        It is verified from the first byte to the last. Damaged chunks are computed and written
        once more.

        Raises:
            BlockingIOError: another process is writing it.
            OSError: it cannot be written where it has to be.
            Interrupted: `stopping` says so.
        """
        try:
            store = open_store(self.directory, fingerprint)
        except StoreError as error:
            self.warn(f"the store {fingerprint} is not used: {error}")
            return None
        if store is None:
            return None
        usable = False
        try:
            usable = self._is_usable(store, source)
        finally:
            if not usable:
                store.close()
        return store if usable else None

    def _is_usable(self, store: Store, source: Source) -> bool:
        about = store.description
        if self.rows != {split: layout.rows for split, layout in about.splits.items()}:
            self.warn(f"the store after {about.unit} is not used: its rows are not the data set's")
            return False
        if about.memory_bytes > memory_for_rows():
            self.warn(
                f"the store after {about.unit} is not used: decoded it would take "
                f"{human_bytes(about.memory_bytes)} of memory"
            )
            return False
        try:
            if about.memory_bytes:
                store.load(self.stop_if_asked)  # verifies on the way
                return True
        except OSError:
            pass
        if not self.mend(store, list(store.damage(self.stop_if_asked)), source):
            return False
        try:
            store.load(self.stop_if_asked)
        except OSError as error:
            self.warn(f"the store after {about.unit} is not used: {error.strerror or error}")
            return False
        return True

    def mend(self, store: Store, damaged: Sequence[Damage], source: Source) -> bool:
        """Compute damaged chunks and write them once more; whether the store is whole now.

        Raises:
            OSError: they cannot be written.
            Interrupted: `stopping` says so.
        """
        if not damaged:
            return True
        about = store.description
        chunks = sum(layout.chunks for layout in about.splits.values())
        damage = f"{len(damaged)} of {chunks} chunks of the store after {about.unit}"
        damage += f" {'is' if len(damaged) == 1 else 'are'} damaged ({damaged[0]})"
        encoding = Encoding.described(about)
        for each in damaged:
            self.stop_if_asked()
            layout = about.splits[each.split]
            start = each.chunk * layout.rows_per_chunk
            rows = np.arange(start, min(start + layout.rows_per_chunk, layout.rows))
            batches = source(each.split, batches_of(rows, self.batch_size))
            computed = np.concatenate([as_array(encoding.encode(x)) for x in batches])
            if not mend_chunk(store, each, computed):
                self.warn(f"{damage}, and what is computed now is not what it held: not used")
                return False
        self.warn(f"{damage}: computed and written once more")
        return True

    def fill(
        self,
        fingerprint: str,
        boundary: int,
        unit: str,
        codec: str,
        source: Source,
        seconds_per_row: float,
    ) -> Filling | None:
        """Fill a new store, or go on where a killed run was filling it; None if it would not fit.

        Args:
            fingerprint, boundary, unit, codec: of the store.
            source: of its rows.
            seconds_per_row: that rows took on their way to `source`.

        Raises:
            BlockingIOError: another process is writing it.
            OSError: it cannot be written; nothing is left of it.
            Interrupted: `stopping` says so; what was written is left for the next attempt.
        """
        if in_use(self.directory / fingerprint):
            raise BlockingIOError  # before any row is computed
        clock = DeviceClock(self.device)
        start, written, seen = time.perf_counter(), 0, 0

        def rows_from(split: str, first: int) -> Iterator[Tensor]:
            order = batches_of(np.arange(first, self.rows[split]), self.batch_size)
            nonlocal seen
            for x in clock.around(source(split, order)):
                seen += len(x)
                yield x

        first_split = next(iter(self.rows))
        batches = rows_from(first_split, 0)
        # The ranges of int8 are taken from more rows than one batch may have.
        enough = RANGE_ROWS if self.stored == "int8" and boundary else 1
        waiting: list[Tensor] = []
        for x in batches:
            if name_of(x.dtype) not in VALUES:
                self.warn(
                    f"activations after {unit} are {x.dtype}, which no store holds: not cached"
                )
                return None
            waiting.append(x)
            if sum(map(len, waiting)) >= min(enough, self.rows[first_split]):
                break
        # (Concatenating may change the layout, where both are the same bytes.)
        seen_first = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        encoding = Encoding.of(seen_first, self.stored if boundary else None)
        shape = tuple(encoding.encode(waiting[0][:1]).shape[1:])
        sink = self._sink(fingerprint, boundary, unit, encoding, shape, codec)
        if sink is None:
            return None
        bar = progress_bar(f"caching {unit}", sum(self.rows.values()), "row")
        try:
            for split in self.rows:
                held = sink.held[split]
                bar.update(held)
                if split != first_split or held:
                    waiting, batches = [], rows_from(split, held)
                for x in itertools.chain(waiting, batches):
                    plain = encoding.encode(x)
                    sink.append(split, plain)
                    written += plain.nbytes
                    rate = written / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{human_bytes(rate)}/s", refresh=False)
                    bar.update(len(plain))
                    self.stop_if_asked()
            seconds_per_row += clock.seconds / seen
            store = sink.commit({"prefix_seconds_per_row": seconds_per_row})
        except (Interrupted, KeyboardInterrupt):
            sink.suspend()
            raise
        except BaseException:
            sink.abort()
            raise
        finally:
            bar.close()
        if isinstance(store, WritingStore) and codec != "raw":
            # How much room it takes nobody can know before.
            try:
                while not store.done:
                    self.stop_if_asked()
                    store.wait(POLL_SECONDS)
            except (Interrupted, KeyboardInterrupt):
                store.suspend()
                raise
            if store.error is not None:
                raise store.error
        if isinstance(store, Store):
            try:
                store.load(self.stop_if_asked)
            except OSError:
                store.remove()
                raise
            except BaseException:
                store.close()
                raise
        held = sum(sink.held.values())
        return Filling(store, held, clock.seconds, memory=sink.memory)

    def _wait_for_writer(self, fingerprint: str, unit: str) -> bool:
        """Until no other process is writing a store any more; whether it is worth another try, as
        it is not if that process does not get on.

        Raises:
            Interrupted: `stopping` says so.
        """
        folder = self.directory / fingerprint
        told, size, since = False, -1, time.monotonic()
        time.sleep(POLL_SECONDS)  # who only looks has the lock for less
        while is_being_written(folder):
            if not told:
                self.warn(f"another run is writing the store after {unit}: waiting for it")
                told = True
            now = size_of_tree(folder)
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > STALLED_SECONDS:
                return False
            self.stop_if_asked()
            time.sleep(POLL_SECONDS)
        return True

    def stop_if_asked(self) -> None:
        """Raises Interrupted if `stopping` says so."""
        if self.stopping():
            raise Interrupted

    def _sink(
        self,
        fingerprint: str,
        boundary: int,
        unit: str,
        encoding: Encoding,
        shape: tuple[int, ...],
        codec: str,
    ) -> Sink | None:
        """For a store that will fit, or may, if it is compressed; else None."""
        description = Description(
            fingerprint=fingerprint,
            network=label(self.network),
            boundary=boundary,
            unit=label(unit),
            values=name_of(encoding.values),
            stored=encoding.stored,
            created=time.time(),
            splits={
                split: Layout.of(
                    rows,
                    shape,
                    encoding.array_type,
                    codec,
                    channels_last=encoding.channels_last,
                )
                for split, rows in self.rows.items()
            },
            details={
                "batch_size": str(self.batch_size),
                "torch": torch.__version__,
                **{label(name): label(text) for name, text in self.details.items()},
            },
            quantization=encoding.quantization,
        )
        room = self._make_room(description)
        if room is None:
            return None
        writer = StoreWriter(self.directory, description, max_bytes=room)
        try:
            memory = None
            if not description.lossy:
                # What loses precision is to be on disk before a checkpoint names it: whoever goes
                # on from there could not make the same rows again.
                memory = self.tiers.memory_for(description, encoding)
            return sink_for(writer, encoding.tensor_type, self.device, memory, self.threads)
        except BaseException:
            writer.suspend()
            raise

    def _make_room(self, description: Description) -> float | None:
        """Bytes that the chunks of a new store may take beside the stores in use; None if that is
        too little. If it is not, what no run uses goes; but of what is kept for later runs only as
        much as has to, the least recently used first."""
        compressed = description.codec != "raw"
        if description.memory_bytes > memory_for_rows():
            self.warn(
                f"activations after {description.unit} are not cached: compressed rows are served "
                f"from memory, and {human_bytes(description.memory_bytes)} are too much for it"
            )
            return None
        own = description.fingerprint
        stores = {
            folder: in_use(folder)
            for folder in store_folders(self.directory)
            if folder.name != own  # what is there of it may be gone on with
        }
        taken = sum(bytes_in_the_end(folder) for folder, used in stores.items() if used)
        needed = 0 if compressed else description.bytes
        room = self.max_bytes - taken - description.overhead_bytes
        if room >= needed:
            remove_rubbish(self.directory, keep=own)
            kept = []
            for folder, used in stores.items():
                since = kept_since(folder) if is_committed(folder) else None
                if since is not None and not used:
                    kept.append((since, folder))
                elif not used:
                    remove_store(folder)
            while True:
                # What could not be removed is there, whose ever it is.
                held = size_of_tree(self.directory) - size_of_tree(self.directory / own)
                room = self.max_bytes - max(taken, held) - description.overhead_bytes
                # How small a codec makes the rest, nobody can know.
                if not kept or room >= description.bytes:
                    break
                oldest = min(kept)
                kept.remove(oldest)
                remove_store(oldest[1])
            taken = max(taken, held)
        if room >= needed:
            return room
        self.warn(
            f"activations after {description.unit} are not cached: "
            f"{human_bytes(description.bytes)} beside {human_bytes(taken)} in use would exceed "
            f"{human_bytes(self.max_bytes)} (--cache-max-gb)"
        )
        return None


def bytes_in_the_end(folder: Path) -> int:
    """What a store takes, or will take when it has been written."""
    size = size_of_tree(folder)
    try:
        about = read_description(folder)
    except StoreError:
        return size
    # How small a codec makes the rest, nobody can know.
    return size if about.codec != "raw" else max(size, about.bytes)
