"""PrefixCache: serves the data set's rows at the frontier, from a store where there is one."""

import hashlib
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachefreeze.device import autocast, memory_for_rows, numerics, synchronize
from cachefreeze.encoding import Encoding, name_of
from cachefreeze.files import human_bytes, size_of_tree
from cachefreeze.fingerprint import Sources, structure
from cachefreeze.models.units import Units
from cachefreeze.report import progress_bar
from cachefreeze.rows import Indices, PixelRows, Rows, batches_of
from cachefreeze.store import (
    FORMAT,
    Description,
    Layout,
    SplitReader,
    Store,
    StoreError,
    StoreTooLarge,
    StoreWriter,
    in_use,
    is_committed,
    open_store,
    prepare_cache_dir,
    remove_rubbish,
    remove_store,
    store_folders,
)

# Batches that the system is asked to have in memory before they are read.
READ_AHEAD = 2
# Batches whose reading is compared with computing them.
WATCHED_BATCHES = 20
# Rows that the ranges of int8 are taken from.
RANGE_ROWS = 512


@dataclass(frozen=True)
class Materialization:
    """What it took to move the boundary.

    `bytes` on disk. `seconds` in all, `compute_seconds` of them reading the rows before and running
    the units between. `reused`: a store of an earlier run held these very rows, and nothing was
    computed. `lossy`: the rows are not, to the last bit, those that would be computed.
    """

    boundary: int
    rows: int
    bytes: int
    seconds: float
    compute_seconds: float
    reused: bool
    codec: str
    lossy: bool


class PrefixCache:
    """The rows of a data set at the frontier of a network that freezes from the front.

    `batches` gives rows as the first unfrozen unit takes them. Up to the boundary they come from
    the store; the frozen units from there to the frontier are run, without gradient, in batches of
    the training batch size (shorter ones padded), so that a row's bits do not depend on where it
    came from. With no directory the boundary stays at the pixels, and this is FreezeOut as
    published.

    Args:
        units: of the network; its frontier says what is frozen.
        inputs: the rows at boundary 0, by the name of their split (lower-case letters). If they
            are `PixelRows`, boundary 0 can be kept too: their decoded pixels.
        batch_size: of training.
        device: that the network is on.
        autocast_dtype: that it is trained with, or None.
        directory: of the cache, made when missing; None switches the cache off.
        max_bytes: that the folder may take, this run's old and new store together.
        stored: keep activations as `bfloat16` or `int8` instead of in their own type. That takes
            less room and loses precision: results are no longer those of a run without a cache.
        network: its name, for people who look into the cache.
        warn: is given one sentence when a store cannot be used; training goes on without.

    Attributes:
        boundary: where rows come from: 0 is the pixels.
        rows_served: rows that came from a store so far.
        prefix_unit_rows_computed: forward computations of one row in one frozen unit so far,
            materialising included.
        prefix_seconds_per_row: what a row took up to the boundary, decoding included, measured
            while materialising.
        saved_seconds: an estimate from what materialising measured: time in the frozen units for
            the rows that were served, less the time that filling and reading the stores took.
        read_seconds: that reading those rows took (on a CPU; elsewhere it is not known).
        compute_seconds: that decoding and the frozen units took for the rows of training and
            validation, so far (likewise).
        unfrozen_rows: of training and validation before anything was frozen.

    Raises:
        UserError: the directory cannot be used.

    Example:
        >>> cache = PrefixCache(units, {"train": rows}, batch_size=64)  # doctest: +SKIP
        >>> for x in cache.batches("train", order):  # doctest: +SKIP
        ...     output = units.run(x, units.frontier)
    """

    def __init__(
        self,
        units: Units,
        inputs: Mapping[str, Rows],
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        autocast_dtype: torch.dtype | None = None,
        directory: Path | None = None,
        max_bytes: float = float("inf"),
        stored: str | None = None,
        network: str = "",
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.units = units
        self.inputs = dict(inputs)
        self.rows = {split: len(rows) for split, rows in inputs.items()}
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.autocast_dtype = autocast_dtype
        self.directory = directory
        self.max_bytes = max_bytes
        self.stored = stored
        self.network = network
        self.warn = warn
        self.boundary = 0
        self.rows_served = 0
        self.saved_seconds = 0.0
        self.prefix_unit_rows_computed = 0
        self.read_seconds = 0.0
        self.compute_seconds = 0.0
        self.unfrozen_rows = 0
        self._watched: deque[float] = deque(maxlen=WATCHED_BATCHES)
        self._last_watched: float | None = None
        self._sources = Sources(module for unit in units for module in unit.modules())
        self._store: Store | None = None
        self._rows: dict[str, Rows] = self.inputs
        self.prefix_seconds_per_row = 0.0
        if directory is not None:
            prepare_cache_dir(directory)

    @property
    def store(self) -> Store | None:
        """The store that rows are served from, if any."""
        return self._store

    @property
    def seconds_per_byte_read(self) -> float | None:
        """Of stored activations, decoding included: median of the last batches, also after their
        store was left; None before any. On a CPU only."""
        # Decoded pixels take more than reading.
        if self._watched and self._store is not None and self.boundary:
            layout = next(iter(self._store.description.splits.values()))
            return statistics.median(self._watched) / layout.row_bytes
        return self._last_watched

    @property
    def keeps_pixels(self) -> bool:
        """Whether boundary 0 can be materialised."""
        return all(isinstance(rows, PixelRows) for rows in self.inputs.values())

    def batches(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (n, ...) at `units.frontier` for each array of n row indices.

        The frontier and the boundary may move while this runs: the next batch follows them.
        """
        yield from self._serve(split, order, None)

    def materialize(
        self, stop: int | None = None, codec: str = "raw", *, fill: bool = True
    ) -> Materialization | None:
        """Move the boundary to `stop` (default: the frontier), through a store of all its rows.

        The store is filled from the present boundary, running only the units between; the store
        that served until now is removed afterwards. 0 keeps the decoded pixels. With `lz4` or
        `zstd` the store is compressed, and its rows are served from memory. Without `fill` only a
        store that is there already is taken. If a store cannot be had (disk full, over the budget,
        in the hands of another run) nothing changes, `warn` is told, and None is returned.
        """
        stop = self.units.frontier if stop is None else stop
        pixels = stop == 0 and self._store is None and self.keeps_pixels
        if self.directory is None or (stop <= self.boundary and not pixels):
            return None
        start = time.perf_counter()
        fingerprint = self.fingerprint(stop)
        computed = 0.0
        try:
            store = self._find(fingerprint)
            reused = store is not None
            if store is None and fill:
                store, computed = self._write(fingerprint, stop, codec)
            if store is not None and not self._load(store):
                store = None
        except BlockingIOError:
            self.warn(f"another run is using the store after {self._name(stop)}: not cached")
            return None
        except StoreTooLarge:
            self.warn(
                f"activations after {self._name(stop)} are not cached: compressed with {codec} "
                f"they are still larger than {human_bytes(self.max_bytes)} allow (--cache-max-gb)"
            )
            return None
        except (OSError, StoreError) as error:
            reason = getattr(error, "strerror", None) or error
            self.warn(
                f"the store after {self._name(stop)} cannot be written ({reason}): not cached"
            )
            return None
        finally:
            seconds = time.perf_counter() - start
            self.saved_seconds -= seconds
        if store is None:
            return None
        self._switch(store, stop)
        return Materialization(
            boundary=stop,
            rows=sum(self.rows.values()),
            bytes=store.bytes,
            seconds=seconds,
            compute_seconds=computed,
            reused=reused,
            codec=store.description.codec,
            lossy=store.description.lossy,
        )

    def leave(self) -> None:
        """Go back to computing rows from the network's input; the store is removed."""
        if self._store is not None:
            self._store.remove()
        self._leave_store()

    def has(self, stop: int) -> bool:
        """Whether a committed store of the rows at boundary `stop` is on disk already."""
        if self.directory is None:
            return False
        return is_committed(self.directory / self.fingerprint(stop))

    def fingerprint(self, stop: int) -> str:
        """Of all that the rows at boundary `stop` depend on, to the last bit."""
        digest = hashlib.sha256()

        def add(*parts: object) -> None:
            digest.update(repr(parts).encode() + b"\n")

        add("format", FORMAT)
        if stop == 0:
            for name, rows in sorted(self.inputs.items()):
                assert isinstance(rows, PixelRows)
                add("pixels", name, len(rows), rows.pixels_identity)
            return digest.hexdigest()[:32]
        add("numerics", sorted(numerics(self.device).items()))
        add("precision", self.autocast_dtype, "batch size", self.batch_size, "channels last")
        if self.stored is not None:
            add("stored as", self.stored)
        for name, rows in sorted(self.inputs.items()):
            add("split", name, len(rows), rows.identity)
        for name, unit in self.units.named(stop):
            add("unit", name, structure(unit, self._sources))
        return digest.hexdigest()[:32]

    def close(self) -> None:
        """Let go of the store. It stays on disk until a run with this folder needs the room."""
        if self._store is not None:
            self._store.close()
        self._leave_store()

    def _serve(self, split: str, order: Sequence[Indices], stop: int | None) -> Iterator[Tensor]:
        """Rows at boundary `stop`; None is the frontier, and counts as serving the run."""
        done = 0
        while done < len(order):
            boundary, store, source = self.boundary, self._store, self._rows
            try:
                mark = time.perf_counter()
                for x in source[split].batches(order[done:]):
                    if stop is None:
                        self._count(len(x), time.perf_counter() - mark)
                        mark = time.perf_counter()
                    x = self._run(x, boundary, self.units.frontier if stop is None else stop)
                    if stop is None and self.device.type == "cpu":
                        self.compute_seconds += time.perf_counter() - mark
                    yield x
                    done += 1
                    if stop is None:
                        self._watch()
                    if self._rows is not source:
                        break
                    mark = time.perf_counter()
            except OSError as error:
                if store is None:
                    raise
                self._give_up_store(error)

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        self.prefix_unit_rows_computed += len(x) * (stop - start)
        with autocast(self.device, self.autocast_dtype):
            return self.units.run_frozen(x, start, stop, self.batch_size)

    def _count(self, rows: int, seconds: float) -> None:
        """Of rows at the boundary, that they took so many seconds."""
        if self.units.frontier == 0:
            self.unfrozen_rows += rows
        if self.device.type != "cpu":
            # Work on a device is not done when it was asked for, and waiting would slow it down.
            seconds = 0.0
        if self._store is None:
            self.compute_seconds += seconds
            return
        self.rows_served += rows
        self.read_seconds += seconds
        self.saved_seconds += rows * self.prefix_seconds_per_row - seconds
        if seconds:
            self._watched.append(seconds / rows)

    def _watch(self) -> None:
        """Go back to computing rows if that is faster than reading them."""
        if len(self._watched) < WATCHED_BATCHES or not self.prefix_seconds_per_row:
            return
        reading = statistics.median(self._watched)
        if reading > self.prefix_seconds_per_row:
            self.warn(
                f"a row from the store after {self._name(self.boundary)} takes "
                f"{reading * 1e3:.3g} ms, computing it {self.prefix_seconds_per_row * 1e3:.3g} ms: "
                "rows are computed from here on"
            )
            self.leave()

    def _name(self, boundary: int) -> str:
        return self.units.names[boundary - 1] if boundary else "pixels"

    def _find(self, fingerprint: str) -> Store | None:
        """A committed store of these very rows, verified from the first byte to the last."""
        assert self.directory is not None
        try:
            store = open_store(self.directory, fingerprint)
        except StoreError as error:
            self.warn(f"the store {fingerprint} is not used: {error}")
            return None
        if store is None:
            return None
        damage = next(store.damage(), None)
        if damage is None and self.rows != {
            split: layout.rows for split, layout in store.description.splits.items()
        }:
            damage = "its rows are not those of the data set"
        if damage is not None:
            self.warn(f"the store {fingerprint} is damaged ({damage}): made anew")
            store.close()
            return None
        return store

    def _load(self, store: Store) -> bool:
        """Decode the rows of a compressed store into memory; whether that could be done."""
        about = store.description
        if about.memory_bytes > memory_for_rows():
            self.warn(
                f"the store after {about.unit} is not used: decoded it would take "
                f"{human_bytes(about.memory_bytes)} of memory"
            )
            store.close()
            return False
        try:
            store.load()
        except OSError as error:
            self.warn(f"the store after {about.unit} cannot be read ({error.strerror or error})")
            store.remove()
            return False
        return True

    def _write(self, fingerprint: str, stop: int, codec: str) -> tuple[Store | None, float]:
        """Fill a new store; None if it would not fit. Also the seconds for its rows."""
        writer = None
        written = 0
        compute_seconds = 0.0
        start = time.perf_counter()
        bar = progress_bar(f"caching {self._name(stop)}", sum(self.rows.values()), "row")
        try:
            for split, rows in self.rows.items():
                order = batches_of(np.arange(rows), self.batch_size)
                source = (
                    self._pixels(split, order) if stop == 0 else self._serve(split, order, stop)
                )
                mark = time.perf_counter()
                waiting: list[Tensor] = []
                for x in source:
                    synchronize(self.device)
                    compute_seconds += time.perf_counter() - mark
                    waiting.append(x)
                    if writer is None:
                        # The ranges of int8 are taken from more rows than one batch may have.
                        held = sum(map(len, waiting))
                        if self.stored == "int8" and stop and held < min(RANGE_ROWS, rows):
                            mark = time.perf_counter()
                            continue
                        encoding = Encoding.of(torch.cat(waiting), self.stored if stop else None)
                        shape = encoding.encode(x[:1]).shape[1:]
                        writer = self._writer(fingerprint, stop, encoding, shape, codec)
                        if writer is None:
                            return None, compute_seconds
                    for batch in waiting:
                        plain = encoding.encode(batch)
                        writer.append(split, plain)
                        written += plain.nbytes
                        rate = written / (time.perf_counter() - start)
                        bar.set_postfix_str(f"{human_bytes(rate)}/s", refresh=False)
                        bar.update(len(plain))
                    waiting = []
                    mark = time.perf_counter()
            assert writer is not None
            per_row = self.prefix_seconds_per_row + compute_seconds / sum(self.rows.values())
            return writer.commit({"prefix_seconds_per_row": per_row}), compute_seconds
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        finally:
            bar.close()

    def _pixels(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        rows = self.inputs[split]
        assert isinstance(rows, PixelRows)
        return rows.pixels(order)

    def _writer(
        self, fingerprint: str, stop: int, encoding: Encoding, shape: tuple[int, ...], codec: str
    ) -> StoreWriter | None:
        """A writer for a store that will fit, or may, if it is compressed; else None."""
        assert self.directory is not None
        description = Description(
            fingerprint=fingerprint,
            network=self.network,
            boundary=stop,
            unit=self._name(stop),
            values=name_of(encoding.values),
            stored=encoding.stored,
            created=time.time(),
            splits={
                split: Layout.of(rows, shape, encoding.array_type, codec)
                for split, rows in self.rows.items()
            },
            details={"batch_size": str(self.batch_size), "torch": torch.__version__},
            quantization=encoding.quantization,
        )
        room = self._make_room(description)
        if room is None:
            return None
        return StoreWriter(self.directory, description, max_bytes=room)

    def _make_room(self, description: Description) -> float | None:
        """Bytes that the chunks of a new store may take beside the stores in use; None if that is
        too little. What no run uses goes, if it is not."""
        assert self.directory is not None
        compressed = description.codec != "raw"
        if description.memory_bytes > memory_for_rows():
            self.warn(
                f"activations after {description.unit} are not cached: compressed rows are served "
                f"from memory, and {human_bytes(description.memory_bytes)} are too much for it"
            )
            return None
        stores = {folder: in_use(folder) for folder in store_folders(self.directory)}
        taken = sum(size_of_tree(folder) for folder, used in stores.items() if used)
        room = self.max_bytes - taken - description.overhead_bytes
        if room >= (0 if compressed else description.bytes):
            remove_rubbish(self.directory)
            for folder, used in stores.items():
                if not used:
                    remove_store(folder)
            return room
        self.warn(
            f"activations after {description.unit} are not cached: "
            f"{human_bytes(description.bytes)} beside {human_bytes(taken)} in use would exceed "
            f"{human_bytes(self.max_bytes)} (--cache-max-gb)"
        )
        return None

    def _switch(self, store: Store, boundary: int) -> None:
        self._forget_reading()
        old, self._store = self._store, store
        about = store.description
        encoding = Encoding(getattr(torch, about.values), about.stored, about.quantization)
        stored = {
            name: StoredRows(reader, encoding, self.device, about.fingerprint)
            for name, reader in store.readers.items()
        }
        self._rows = dict(stored)
        if boundary == 0:
            self._rows = {
                name: StoredPixels(rows, self.inputs[name])  # type: ignore[arg-type]
                for name, rows in stored.items()
            }
        self.boundary = boundary
        self.prefix_seconds_per_row = store.notes.get("prefix_seconds_per_row", 0.0)
        if old is not None:
            old.remove()

    def _give_up_store(self, error: OSError) -> None:
        self.warn(
            f"the store after {self._name(self.boundary)} cannot be read "
            f"({error.strerror or error}): its rows are computed instead"
        )
        self.leave()

    def _leave_store(self) -> None:
        self._forget_reading()
        self._store, self._rows, self.boundary, self.prefix_seconds_per_row = (
            None,
            self.inputs,
            0,
            0.0,
        )

    def _forget_reading(self) -> None:
        self._last_watched = self.seconds_per_byte_read
        self._watched.clear()


class StoredRows:
    """Rows of one split from a store, on the training device."""

    def __init__(
        self, reader: SplitReader, encoding: Encoding, device: torch.device, identity: str
    ) -> None:
        self.reader = reader
        self.encoding = encoding
        self.device = device
        self.identity = identity

    def __len__(self) -> int:
        return self.reader.layout.rows

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for rows in order[:READ_AHEAD]:
            self.reader.will_need(rows)
        for position, rows in enumerate(order):
            for coming in order[position + READ_AHEAD : position + READ_AHEAD + 1]:
                self.reader.will_need(coming)
            # A new tensor each time: whoever keeps a batch keeps its values.
            stored, room = self.encoding.empty(len(rows), self.reader.layout.row_shape)
            self.reader.read(rows, room)
            yield self.encoding.decode(stored, self.device)


class StoredPixels:
    """Network input from decoded pixels that are kept in a store."""

    def __init__(self, stored: StoredRows, inputs: PixelRows) -> None:
        self.stored = stored
        self.inputs = inputs
        self.identity = inputs.identity

    def __len__(self) -> int:
        return len(self.stored)

    def batches(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        return map(self.inputs.from_pixels, self.stored.batches(order))
