"""PrefixCache: serves the data set's rows at the frontier, from a store where there is one."""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachefreeze.device import autocast, numerics
from cachefreeze.files import human_bytes, size_of_tree
from cachefreeze.fingerprint import Sources, structure
from cachefreeze.models.units import Units, canonical
from cachefreeze.report import progress_bar
from cachefreeze.rows import Indices, Rows, batches_of
from cachefreeze.store import (
    FORMAT,
    Description,
    Layout,
    SplitReader,
    Store,
    StoreError,
    StoreWriter,
    in_use,
    open_store,
    prepare_cache_dir,
    remove_rubbish,
    remove_store,
    store_folders,
)

# Batches that the system is asked to have in memory before they are read.
READ_AHEAD = 2


@dataclass(frozen=True)
class Materialization:
    """What it took to move the boundary.

    `seconds` in all, `compute_seconds` of them in the network. `reused`: a store of an earlier run
    held these very rows, and nothing was computed.
    """

    boundary: int
    rows: int
    bytes: int
    seconds: float
    compute_seconds: float
    reused: bool


class PrefixCache:
    """The rows of a data set at the frontier of a network that freezes from the front.

    `batches` gives rows as the first unfrozen unit takes them. Up to the boundary they come from
    the store; the frozen units from there to the frontier are run, without gradient, in batches of
    the training batch size (shorter ones padded), so that a row's bits do not depend on where it
    came from. With no directory the boundary stays at the pixels, and this is FreezeOut as
    published.

    Args:
        units: of the network; its frontier says what is frozen.
        inputs: the rows at boundary 0, by the name of their split (lower-case letters).
        batch_size: of training.
        device: that the network is on.
        autocast_dtype: that it is trained with, or None.
        directory: of the cache, made when missing; None switches the cache off.
        max_bytes: that the folder may take, this run's old and new store together.
        network: its name, for people who look into the cache.
        warn: is given one sentence when a store cannot be used; training goes on without.

    Attributes:
        boundary: where rows come from: 0 is the pixels.
        rows_served: rows that came from a store so far.
        prefix_unit_rows_computed: forward computations of one row in one frozen unit so far,
            materialising included.
        saved_seconds: an estimate from what materialising measured: time in the frozen units for
            the rows that were served, less the time that filling and reading the stores took.

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
        self.network = network
        self.warn = warn
        self.boundary = 0
        self.rows_served = 0
        self.saved_seconds = 0.0
        self.prefix_unit_rows_computed = 0
        self._sources = Sources(module for unit in units for module in unit.modules())
        self._store: Store | None = None
        self._rows: dict[str, Rows] = self.inputs
        # What the units before the boundary took for a row, measured while materialising.
        self._prefix_seconds = 0.0
        if directory is not None:
            prepare_cache_dir(directory)

    @property
    def store(self) -> Store | None:
        """The store that rows are served from, if any."""
        return self._store

    def batches(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (n, ...) at `units.frontier` for each array of n row indices.

        The frontier and the boundary may move while this runs: the next batch follows them.
        """
        yield from self._serve(split, order, None)

    def materialize(self, stop: int | None = None) -> Materialization | None:
        """Move the boundary to `stop` (default: the frontier), through a store of all its rows.

        The store is filled from the present boundary, running only the units between; the store
        that served until now is removed afterwards. If a store cannot be had (disk full, over the
        budget, in the hands of another run) nothing changes, `warn` is told, and None is returned.
        """
        stop = self.units.frontier if stop is None else stop
        if self.directory is None or stop <= self.boundary:
            return None
        start = time.perf_counter()
        fingerprint = self.fingerprint(stop)
        computed = 0.0
        try:
            store = self._find(fingerprint)
            reused = store is not None
            if store is None:
                store, computed = self._write(fingerprint, stop)
        except BlockingIOError:
            self.warn(f"another run is using the store after {self._name(stop)}: not cached")
            return None
        except OSError as error:
            self.warn(
                f"the store after {self._name(stop)} cannot be written "
                f"({error.strerror or error}): not cached"
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
            bytes=store.description.bytes,
            seconds=seconds,
            compute_seconds=computed,
            reused=reused,
        )

    def fingerprint(self, stop: int) -> str:
        """Of all that the rows at boundary `stop` depend on, to the last bit."""
        digest = hashlib.sha256()

        def add(*parts: object) -> None:
            digest.update(repr(parts).encode() + b"\n")

        add("format", FORMAT)
        add("numerics", sorted(numerics(self.device).items()))
        add("precision", self.autocast_dtype, "batch size", self.batch_size, "channels last")
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
            boundary, store = self.boundary, self._store
            try:
                mark = time.perf_counter()
                for x in self._rows[split].batches(order[done:]):
                    if store is not None and stop is None:
                        self.rows_served += len(x)
                        spared = len(x) * self._prefix_seconds
                        self.saved_seconds += spared - (time.perf_counter() - mark)
                    yield self._run(x, boundary, self.units.frontier if stop is None else stop)
                    done += 1
                    if self._store is not store:
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

    def _name(self, boundary: int) -> str:
        return self.units.names[boundary - 1]

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

    def _write(self, fingerprint: str, stop: int) -> tuple[Store | None, float]:
        """Fill a new store; None if it would not fit. Also the seconds in the network."""
        assert self.directory is not None
        writer = None
        written = 0
        compute_seconds = 0.0
        start = time.perf_counter()
        bar = progress_bar(f"caching {self._name(stop)}", sum(self.rows.values()), "row")
        try:
            for split, rows in self.rows.items():
                mark = time.perf_counter()
                for x in self._serve(split, batches_of(np.arange(rows), self.batch_size), stop):
                    values, plain = to_numpy(x)
                    compute_seconds += time.perf_counter() - mark
                    if writer is None:
                        description = self._describe(fingerprint, stop, plain, values)
                        if not self._make_room(description):
                            return None, compute_seconds
                        writer = StoreWriter(self.directory, description)
                    writer.append(split, plain)
                    written += plain.nbytes
                    rate = written / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{human_bytes(rate)}/s", refresh=False)
                    bar.update(len(plain))
                    mark = time.perf_counter()
            assert writer is not None
            per_row = self._prefix_seconds + compute_seconds / sum(self.rows.values())
            return writer.commit({"prefix_seconds_per_row": per_row}), compute_seconds
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        finally:
            bar.close()

    def _describe(
        self, fingerprint: str, stop: int, plain: NDArray[np.generic], values: torch.dtype
    ) -> Description:
        return Description(
            fingerprint=fingerprint,
            network=self.network,
            boundary=stop,
            unit=self._name(stop),
            values=str(values).removeprefix("torch."),
            created=time.time(),
            splits={
                split: Layout.of(rows, plain.shape[1:], plain.dtype.name)
                for split, rows in self.rows.items()
            },
            details={"batch_size": str(self.batch_size), "torch": torch.__version__},
        )

    def _make_room(self, description: Description) -> bool:
        """Whether a new store fits beside those in use. What no run uses goes, if it does."""
        assert self.directory is not None
        stores = {folder: in_use(folder) for folder in store_folders(self.directory)}
        taken = sum(size_of_tree(folder) for folder, used in stores.items() if used)
        if taken + description.bytes <= self.max_bytes:
            remove_rubbish(self.directory)
            for folder, used in stores.items():
                if not used:
                    remove_store(folder)
            return True
        self.warn(
            f"activations after {description.unit} are not cached: "
            f"{human_bytes(description.bytes)} beside {human_bytes(taken)} in use would exceed "
            f"{human_bytes(self.max_bytes)} (--cache-max-gb)"
        )
        return False

    def _switch(self, store: Store, boundary: int) -> None:
        old, self._store = self._store, store
        dtype = getattr(torch, store.description.values)
        self._rows = {
            name: StoredRows(reader, dtype, self.device, store.description.fingerprint)
            for name, reader in store.readers.items()
        }
        self.boundary = boundary
        self._prefix_seconds = store.notes.get("prefix_seconds_per_row", 0.0)
        if old is not None:
            old.remove()

    def _give_up_store(self, error: OSError) -> None:
        assert self._store is not None
        self.warn(
            f"the store after {self._name(self.boundary)} cannot be read "
            f"({error.strerror or error}): its rows are computed instead"
        )
        self._store.remove()
        self._leave_store()

    def _leave_store(self) -> None:
        self._store, self._rows, self.boundary, self._prefix_seconds = None, self.inputs, 0, 0.0


class StoredRows:
    """Rows of one split from a store, on the training device."""

    def __init__(
        self, reader: SplitReader, dtype: torch.dtype, device: torch.device, identity: str
    ) -> None:
        self.reader = reader
        self.dtype = dtype
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
            batch = torch.empty((len(rows), *self.reader.layout.row_shape), dtype=self.dtype)
            self.reader.read(rows, batch.view(torch.uint8).flatten(1).numpy())
            yield (batch.permute(0, 3, 1, 2) if batch.dim() == 4 else batch).to(self.device)


def to_numpy(x: Tensor) -> tuple[torch.dtype, NDArray[np.generic]]:
    """A tensor's type, and its rows as they are stored: channels last, bfloat16 as its bits."""
    plain = canonical(x.detach().cpu())
    if plain.dim() == 4:
        plain = plain.permute(0, 2, 3, 1)
    if plain.dtype == torch.bfloat16:
        plain = plain.view(torch.uint16)
    return x.dtype, plain.numpy()
