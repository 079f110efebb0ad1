"""PrefixCache: serves the data set's rows at the frontier, from a store where there is one."""

import re
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cachefreeze.background import HeldStore
from cachefreeze.datasets import DatasetRows, joined, rows_of, split_rows
from cachefreeze.device import autocast
from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes
from cachefreeze.holdings import Holdings
from cachefreeze.models.units import Units
from cachefreeze.moments import Lapses, Moments
from cachefreeze.provenance import Provenance
from cachefreeze.rows import Indices, PixelRows, Rows, batches_of, epoch_order
from cachefreeze.staging import default_threads
from cachefreeze.store import (
    Store,
    StoreError,
    StoreTooLarge,
    Usage,
    is_committed,
    note_usage,
    prepare_cache_dir,
    read_usage,
)
from cachefreeze.stores import Source, Stores
from cachefreeze.tiers import Tiers

# Batches whose reading is compared with computing them.
WATCHED_BATCHES = 20
# Of the largest value: what a row that is computed again may differ by, but for on a CPU.
VERIFY_TOLERANCE = 0.02
# Rows that the units are compared with their model on.
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Materialization:
    """What it took to move the boundary.

    `bytes` on disk. `seconds` in all, `compute_seconds` of them reading the rows before and running
    the units between. `reused`: a store of an earlier run held these very rows, and nothing was
    computed. `held`: rows that a killed run had written already. `lossy`: the rows are not, to the
    last bit, those that would be computed. `tier`: where they are held, see `PrefixCache.tier`.
    """

    boundary: int
    rows: int
    bytes: int
    seconds: float
    compute_seconds: float
    reused: bool
    held: int
    codec: str
    lossy: bool
    tier: str = "disk"


class PrefixCache:
    """The rows of a data set at the frontier of a network that freezes from the front.

    `batch`, `epoch` and `batches` give rows as the first unfrozen unit takes them. Up to the
    boundary they come from the store that `materialize` fills; the frozen units from there to the
    frontier are run, without gradient, in batches of the training batch size (shorter ones padded),
    so that a row's bits do not depend on where it came from. With no directory the boundary stays
    at the input, and this is FreezeOut as published.

    Args:
        units: of the network, see `partition`; their frontier says what is frozen.
        dataset: a map-style PyTorch data set or an `IndexedDataset`, which is the split `train`; or
            several by the name of their split (lower-case letters). Instead of a data set there may
            be `Rows`: if they are `PixelRows`, boundary 0 can be kept too, their decoded pixels.
        batch_size: of training.
        device: that the network is on; None is where its parameters are.
        autocast_dtype: that it is trained with, or None.
        directory: of the cache, made when missing; None switches the cache off.
        max_bytes: that the folder may take, this run's old and new store together.
        stored: keep activations as `bfloat16` or `int8` instead of in their own type. That takes
            less room and loses precision: results are no longer those of a run without a cache.
        keep: keep all stores for later runs, or none. None keeps those of units that are frozen
            when this is made. What is not kept goes when the next is made, or when another run
            fills one.
        tier: where rows are held: `device` (in its memory, if they fit there), `host` (in the
            host's), `disk`, or `auto`, see `Tiers`. From the host and the disk they come to a GPU
            ahead of time, by threads. What is held in memory is written to the directory in the
            background.
        device_bytes: of the device's memory that rows may take; None is 60 % of what is free when
            the first are kept, beside the most that the process had in use by then (so let that be
            after a training step).
        threads: that read and write beside the device's work; None is a few with a GPU, and none
            with a CPU, which has no time that is not taken.
        workers: processes that load items of a data set when rows are computed from them.
        network: its name, for people who look into the cache.
        details: likewise, whatever else they may want to know, by name.
        warn: is given one sentence when a store cannot be used; training goes on without.
        stopping: asked while a store is filled, verified or loaded into memory; if it says so,
            `materialize` raises `Interrupted`, and what was written is left for the next attempt.

    Attributes:
        rows_served: rows that came from a store so far.
        rows_verified: rows that `verify` has compared so far.
        prefix_unit_rows_computed: forward computations of one row in one frozen unit so far,
            materialising included.
        saved_seconds: an estimate from what materialising measured: time in the frozen units for
            the rows that were served, less the time that filling and reading the stores took.
        read_seconds: that training waited for those rows to be read.
        compute_seconds: that decoding and the frozen units took for the rows of training and
            validation, so far. (Neither is known on MPS.)
        unfrozen_rows: of training and validation before anything was frozen.

    Raises:
        UserError: the directory or a data set cannot be used.

    Example:
        >>> import tempfile
        >>> from cachefreeze import partition
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), head)
        >>> dataset = TensorDataset(torch.zeros(10, 3, 8, 8), torch.arange(10) % 2)
        >>> units = partition(model)
        >>> units.freeze(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = PrefixCache(units, dataset, batch_size=4, directory=folder)
        ...     rows = cache.materialize().rows
        ...     for x, y in cache.epoch(0):
        ...         loss = nn.functional.cross_entropy(units.suffix(x), y)
        ...     cache.close()
        >>> rows, x.shape, cache.prefix_unit_rows_computed, cache.rows_served
        (10, torch.Size([2, 4, 6, 6]), 10, 10)

        With checkpoints of one's own:

        >>> state = {"model": model.state_dict(), "frontier": units.frontier,
        ...          "cache": cache.state_dict()}  # doctest: +SKIP
        >>> torch.save(state, path)  # doctest: +SKIP
        >>> cache.release()  # what only older checkpoints named may go  # doctest: +SKIP

        And to go on:

        >>> model.load_state_dict(state["model"])  # doctest: +SKIP
        >>> units.freeze(state["frontier"])  # doctest: +SKIP
        >>> cache.load_state_dict(state["cache"])  # doctest: +SKIP
    """

    def __init__(
        self,
        units: Units,
        dataset: Dataset[Any] | Rows | Mapping[str, Dataset[Any] | Rows],
        *,
        batch_size: int,
        device: torch.device | str | None = None,
        autocast_dtype: torch.dtype | None = None,
        directory: Path | str | None = None,
        max_bytes: float = float("inf"),
        stored: str | None = None,
        keep: bool | None = None,
        tier: str = "auto",
        device_bytes: float | None = None,
        threads: int | None = None,
        workers: int = 0,
        network: str = "",
        details: Mapping[str, str] | None = None,
        warn: Callable[[str], None] = warnings.warn,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.units = units
        self.device = torch.device(device or device_of(units) or "cpu")
        splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
        if not splits or not all(re.fullmatch("[a-z]+", split) for split in splits):
            raise UserError(
                f"the splits are named {', '.join(map(repr, splits)) or 'nothing'}: they need "
                "names of lower-case letters, such as train and val"
            )
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it has to be 1 or more")
        channels_last = units.channels_last
        self.inputs = {
            split: rows_of(each, self.device, channels_last, workers)
            for split, each in splits.items()
        }
        self.rows = {split: len(rows) for split, rows in self.inputs.items()}
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype
        self.directory = directory = None if directory is None else Path(directory)
        self.max_bytes = max_bytes
        self.stored = stored
        self.keep = keep
        self.warn = warn
        # Units that were frozen from the start: what they give, the next run may want too.
        self._from_start = units.frontier
        self._checked = False
        self.rows_served = 0
        self.rows_verified = 0
        self.saved_seconds = 0.0
        self._costs = False  # whether time is being taken from what was saved
        self.prefix_unit_rows_computed = 0
        self.read_seconds = 0.0
        self.compute_seconds = 0.0
        self.unfrozen_rows = 0
        self._watched: deque[float] = deque(maxlen=WATCHED_BATCHES)
        self._last_watched: float | None = None
        self._provenance = Provenance(
            units, self.inputs, self.device, autocast_dtype, batch_size, stored
        )
        self._weights = self._provenance.weights(0)
        self.tiers = Tiers(self.device, tier, device_bytes)
        self.threads = default_threads(self.device) if threads is None else threads
        self._moments = Moments(self.device)
        self._lapses = Lapses(self._moments)
        self._holdings = Holdings(self.inputs, self.tiers, self.threads, warn, stopping)
        self._mended: Store | None = None
        # Rows served before the present store was, and rows computed to fill it.
        self._served_before = self._missed = 0
        if directory is not None:
            prepare_cache_dir(directory)
            self._stores = Stores(
                directory,
                self.rows,
                batch_size,
                self.device,
                tiers=self.tiers,
                threads=self.threads,
                max_bytes=max_bytes,
                stored=stored,
                network=network or type(units.model).__name__,
                details=details or {},
                warn=warn,
                stopping=stopping,
            )

    @property
    def boundary(self) -> int:
        """Where rows come from: 0 is the pixels."""
        return self._holdings.boundary

    @property
    def store(self) -> HeldStore | None:
        """The store that rows are served from, if any."""
        return self._holdings.store

    @property
    def tier(self) -> str | None:
        """Where those rows are held: `device`, `host` or `disk`; None without a store."""
        return self._holdings.tier

    @property
    def prefix_seconds_per_row(self) -> float:
        """What a row of that store took up to the boundary, decoding included, measured while it
        was filled; 0 without a store."""
        return 0.0 if self.store is None else self.store.notes.get("prefix_seconds_per_row", 0.0)

    @property
    def unit(self) -> str:
        """Whose output rows come as from where they come; `pixels` if no unit's."""
        return self._name(self.boundary)

    @property
    def seconds_per_byte_read(self) -> float | None:
        """Of stored activations, decoding included: median of the last batches, also after their
        store was left; None before any."""
        # Decoded pixels take more than reading, and rows in memory none.
        if self._watched and self.store is not None and self.boundary and self.tier == "disk":
            layout = next(iter(self.store.description.splits.values()))
            return statistics.median(self._watched) / layout.row_bytes
        return self._last_watched

    @property
    def keeps_pixels(self) -> bool:
        """Whether boundary 0 can be materialised."""
        return all(isinstance(rows, PixelRows) for rows in self.inputs.values())

    def batches(self, split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
        """One tensor (n, ...) at `units.frontier` for each array of n row indices.

        The frontier and the boundary may move while this runs: the next batch follows them.
        Weights that are written over after their rows were kept are noticed when this is called
        (not if they are written through a parameter's `.data`), and rows are computed from there.

        Raises:
            Interrupted: `stopping` says so while a damaged store is mended, or rows are loaded into
                memory.
        """
        yield from self._serve(split, order, None)

    def batch(self, rows: Any, x: Tensor | None = None, split: str = "train") -> Tensor:
        """Some rows at `units.frontier`, (n, ...), on the device.

        Args:
            rows: their n indices: an integer tensor (as a loader of an `IndexedDataset` gives
                them), array or list.
            x: their network input, if it is at hand; an empty tensor counts as none. Whatever is
                missing is loaded.
            split: that they are of.

        Raises:
            ValueError: there are no such rows, `x` is of another number of them, or autocast is on
                with another type than `autocast_dtype`.
        """
        self._refuse_other_autocast()
        self._refuse_unknown(split)
        indices = split_rows(split, rows, self.rows[split])
        order = batches_of(indices, self.batch_size)
        given = self.inputs[split]
        if x is None or x.numel() == 0 or self.store is not None:
            return joined(list(self._serve(split, order, None)))
        if len(x) != len(indices):
            raise ValueError(f"the input is of {len(x)} rows, and {len(indices)} are named")
        if isinstance(given, DatasetRows):
            x = given.as_input(x)
        return joined([self._computed(part) for part in x.split(self.batch_size)])

    def epoch(
        self,
        number: int = 0,
        *,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Any]]:
        """An epoch over a split that was given as a data set: batches at `units.frontier`,
        (n, ...), on the device, and their targets, as a loader collates them.

        Rows that a store serves are neither loaded nor decoded, if the data set knows its targets
        (`IndexedDataset`).

        Args:
            number: of the epoch; the order of its rows depends on it and on `seed` alone.
            split: of which.
            seed: see `number`.
            shuffle: False takes the rows in their order.
            drop_last: leave out a last batch that is not full.
        """
        self._refuse_unknown(split)
        source, count = self.inputs[split], self.rows[split]
        if not isinstance(source, DatasetRows):
            raise ValueError(f"{split} has no targets: give PrefixCache a data set, or use batches")
        order = batches_of(
            epoch_order(count, seed, number) if shuffle else np.arange(count), self.batch_size
        )
        if drop_last and order and len(order[-1]) < self.batch_size:
            order = order[:-1]
        if source.dataset.targets is not None:
            for rows, x in zip(order, self.batches(split, order), strict=True):
                yield x, source.targets(rows)
        else:
            for rows, x, targets in source.items(order):
                yield self.batch(rows, x, split), targets

    def materialize(
        self, stop: int | None = None, codec: str = "raw", *, fill: bool = True
    ) -> Materialization | None:
        """Move the boundary to `stop` (default: the frontier), through a store of all its rows.

        The store is filled from the present boundary, running only the units between; the store
        that served until now is removed afterwards, unless it is kept or a checkpoint names it
        (`release`). 0
        keeps the decoded pixels. With `lz4` or `zstd` the store is compressed, and its rows are
        served from memory. Without `fill` only a store that is there already is taken. If another
        run is writing these very rows, they are waited for. If a store cannot be had (disk full,
        over the budget) nothing changes, `warn` is told, and None is returned.

        To fill a store, every row goes through the units between once: it pays if more than one
        epoch is left to use it.

        Raises:
            ValueError: `stop` lies beyond the frontier, or the units are not the model that they
                were cut out of (`Units.check`).
            Interrupted: `stopping` says so.
        """
        stop = self.units.frontier if stop is None else stop
        if not 0 <= stop <= self.units.frontier:
            raise ValueError(f"boundary {stop}: {self.units.frontier} units are frozen")
        pixels = stop == 0 and self.store is None and self.keeps_pixels
        if self.directory is None or (stop <= self.boundary and not pixels):
            return None
        with self._costing():
            return self._materialize(stop, codec, fill)

    def _materialize(self, stop: int, codec: str, fill: bool) -> Materialization | None:
        start = time.perf_counter()
        taken, name, knowable = None, self._name(stop), False
        try:
            fingerprint, knowable = self._provenance.fingerprint(stop)
            self._holdings.let_go_of(fingerprint)
            taken = self._stores.take(
                fingerprint,
                stop,
                name,
                codec,
                self._source(stop),
                self.prefix_seconds_per_row,
                before_filling=self._check if fill else None,
            )
        except StoreTooLarge:
            self.warn(
                f"activations after {name} are not cached: compressed with {codec} "
                f"they are still larger than {human_bytes(self.max_bytes)} allow (--cache-max-gb)"
            )
        except (OSError, StoreError) as error:
            reason = getattr(error, "strerror", None) or error
            self.warn(f"the store after {name} cannot be written ({reason}): not cached")
        if taken is None:
            return None
        store = taken.store
        keep = 0 < stop <= self._from_start if self.keep is None else self.keep
        # What hangs on something that cannot be written down, no run will find again.
        if (keep and knowable) or store.kept:
            store.keep()
        elif keep:
            self.warn(
                f"no later run will find the rows after {name}: what they depend on cannot be "
                "written down (for a data set of your own: IndexedDataset(..., identity=...))"
            )
        self._before_leaving()
        try:
            self._holdings.take(store, stop, taken.memory)
        finally:
            self._tell_datasets()
        self._weights = self._provenance.weights(stop)
        self._served_before = self.rows_served
        self._missed = 0 if taken.reused else sum(self.rows.values()) - taken.held
        return Materialization(
            boundary=stop,
            rows=sum(self.rows.values()),
            bytes=store.bytes,
            seconds=time.perf_counter() - start,
            compute_seconds=taken.compute_seconds,
            reused=taken.reused,
            held=taken.held,
            codec=store.description.codec,
            lossy=store.description.lossy,
            tier=self.tier or "disk",
        )

    def leave(self) -> None:
        """Go back to computing rows from the network's input; the store is removed, unless it is
        kept or a checkpoint names it."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to say of the cache: where rows come from. No rows."""
        return {"boundary": self.boundary, "store": self._holdings.fingerprint}

    def release(self) -> None:
        """To be called when a checkpoint with the present `state_dict` is on disk: stores that only
        an earlier one names are removed. A store that a checkpoint names stays until then, so
        that whoever goes on from there finds it."""
        self._note_usage()
        self._holdings.tell_of_failures()
        self._holdings.release()

    def finish(self) -> None:
        """Wait until what is written in the background is on disk (as `close` does, too), and all
        times are known."""
        self.settle()
        with self._costing():
            self._holdings.wait()
        self._holdings.tell_of_failures()

    def settle(self) -> None:
        """Wait until the device has done its work, so that all times are known."""
        self._lapses.collect(wait=True)

    @property
    def bytes_in_use(self) -> int:
        """Of the store that rows come from, and of those that `release` would remove."""
        return self._holdings.bytes

    @property
    def holds_retired(self) -> bool:
        """Whether there are stores that would be removed by `release`."""
        return self._holdings.has_retired

    def load_state_dict(self, state: Mapping[str, Any]) -> Materialization | None:
        """Go on with the store that a checkpoint names; None if it names none, or that one is not
        there any more. Call it with the weights of the checkpoint loaded, and their units frozen.
        """
        if state["store"] is None:
            return None
        found = self.materialize(state["boundary"], fill=False)
        if self.store is not None and (usage := read_usage(self.store.folder)) is not None:
            self._served_before, self._missed = self.rows_served - usage.hits, usage.misses
        self._holdings.checkpointed = self._holdings.fingerprint
        return found

    def verify(self, split: str, rows: Indices) -> None:
        """Compute rows, at most a batch of them, from the network's input, and compare them with
        those that are served: bit by bit on a CPU; elsewhere kernels may sum in another order, and
        `VERIFY_TOLERANCE` of the largest value is allowed. Rows of a lossy store are not compared.

        Raises:
            UserError: they differ; names row, boundary, and the size of the difference.
        """
        store = self.store
        if store is None or store.description.lossy:
            return
        x = next(iter(self.inputs[split].batches([rows])))
        with autocast(self.device, self.autocast_dtype):
            computed = self.units.run_frozen(x, 0, self.boundary, self.batch_size).cpu()
        try:
            served = next(iter(self._holdings.rows[split].batches([rows]))).cpu()
        except OSError as error:
            if not isinstance(store, Store):
                raise
            self._mend_or_leave(store, error)
            return
        wrong = "the cache is wrong: "
        if (served.shape, served.dtype) != (computed.shape, computed.dtype):
            raise UserError(
                f"{wrong}rows of {split} after {self.unit} are {tuple(served.shape[1:])} "
                f"{served.dtype} and should be {tuple(computed.shape[1:])} {computed.dtype}: "
                f"remove {store.folder}"
            )
        self.rows_verified += len(rows)
        tolerance = 0.0
        if self.device.type != "cpu":
            tolerance = VERIFY_TOLERANCE * float(computed.abs().max())
        # Equal, or both not a number; what is infinite on one side only is far away.
        gaps = (served.double() - computed.double()).abs().nan_to_num(torch.inf)
        same = (served == computed) | (served.isnan() & computed.isnan())
        gaps = gaps.masked_fill(same, 0).flatten(1).amax(1)
        if (gaps > tolerance).any():
            row = int((gaps > tolerance).nonzero()[0])
            raise UserError(
                f"{wrong}row {rows[row]} of {split} at boundary {self.boundary} (after "
                f"{self.unit}) differs by up to {float(gaps[row]):.3g} from what is computed: "
                f"remove {store.folder}, or use --no-cache"
            )

    def has(self, stop: int) -> bool:
        """Whether a committed store of the rows at boundary `stop` is on disk already."""
        if self.directory is None:
            return False
        return is_committed(self.directory / self.fingerprint(stop))

    def fingerprint(self, stop: int) -> str:
        """Of all that the rows at boundary `stop` depend on, to the last bit."""
        return self._provenance.fingerprint(stop)[0]

    def __enter__(self) -> "PrefixCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(wait=kind is not KeyboardInterrupt)

    def close(self, *, wait: bool = True) -> None:
        """Let go of the store. One that is kept stays on disk until the room is needed, any other
        until a run with this folder fills its own. Without `wait`, and on Ctrl-C, one that is being
        written is left as it is: a later run goes on with it."""
        try:
            if wait:
                self.finish()
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            self._before_leaving()
            self._holdings.close(wait=wait)
            self._tell_datasets()

    def _source(self, stop: int, inputs: bool = False) -> Source:
        """The rows that a store of boundary `stop` is to hold: made of those that come from the
        present source, or of the network's `inputs`."""

        def pixels(split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
            rows = self.inputs[split]
            assert isinstance(rows, PixelRows)
            return rows.pixels(order)

        def computed(split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
            for x in self.inputs[split].batches(order):
                yield self._run(x, 0, stop)

        def served(split: str, order: Sequence[Indices]) -> Iterator[Tensor]:
            return self._serve(split, order, stop)

        if stop == 0:
            return pixels
        return computed if inputs else served

    def _serve(self, split: str, order: Sequence[Indices], stop: int | None) -> Iterator[Tensor]:
        """Rows at boundary `stop`; None is the frontier, and counts as serving the run."""
        done = 0
        self._leave_if_other_weights()
        self._holdings.tell_of_failures()
        while done < len(order):
            with self._costing():
                self._holdings.rise()
            boundary, store, source = self.boundary, self.store, self._holdings.rows
            try:
                mark = self._mark()
                for x in source[split].batches(order[done:]):
                    if stop is None:
                        self._count(len(x))
                        mark = self._since(mark, partial(self._add_reading, store, len(x)))
                    x = self._run(x, boundary, self.units.frontier if stop is None else stop)
                    if stop is None:
                        self._since(mark, self._add_computing)
                    yield x
                    done += 1
                    if stop is None:
                        self._watch()
                    if self._holdings.rows is not source:
                        break
                    mark = self._mark()
                del source  # which may be the last to hold rows in memory
            except OSError as error:
                if not isinstance(store, Store):
                    raise
                if self.store is store:
                    with self._costing():
                        self._mend_or_leave(store, error)

    def _computed(self, x: Tensor) -> Tensor:
        """Rows at the frontier from network input."""
        self._count(len(x))
        mark = self._mark()
        x = self._run(x, 0, self.units.frontier)
        self._since(mark, self._add_computing)
        return x

    @contextmanager
    def _costing(self) -> Iterator[None]:
        """What is done inside would not be done without the cache."""
        start, outermost, self._costs = time.perf_counter(), not self._costs, True
        try:
            yield
        finally:
            if outermost:
                self._costs = False
                self.saved_seconds -= time.perf_counter() - start

    def _mark(self) -> Any:
        return self._moments.now() if self._moments.free else None

    def _since(self, mark: Any, tell: Callable[[float], None]) -> Any:
        """`tell` of the device's time since a mark, sooner or later; returns another mark. Time in
        which the device waits for the host is in it, and what the host does while the device is at
        work is not: between asking for rows and having them it is what training waits for."""
        if mark is None:
            return None
        now = self._moments.now()
        self._lapses.add(mark, now, tell)
        return now

    def _check(self) -> None:
        """Before anything is kept: the units are the model."""
        if self._checked or self.units.are_whole:
            return
        split, rows = next(iter(self.rows.items()))
        x = next(iter(self.inputs[split].batches([np.arange(min(CHECKED_ROWS, rows))])))
        tolerance = 0.0 if self.device.type == "cpu" else VERIFY_TOLERANCE
        with autocast(self.device, self.autocast_dtype):
            self.units.check(x, tolerance)
        self._checked = True

    def _refuse_unknown(self, split: str) -> None:
        if split not in self.rows:
            raise ValueError(f"there is no split {split!r}, but {', '.join(self.rows)}")

    def _refuse_other_autocast(self) -> None:
        """Rows are always computed with `autocast_dtype`, whatever surrounds them: what is kept
        must not depend on where in a loop it was made."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if dtype != self.autocast_dtype:
                raise ValueError(
                    f"autocast is on here with {dtype}: give PrefixCache autocast_dtype={dtype}"
                )

    def _leave_if_other_weights(self) -> None:
        """Rows of weights that were loaded over since are none of this network any more."""
        weights = self._provenance.weights(self.boundary)
        if self.store is None or weights.are(self._weights):
            return
        self._weights = weights
        if self.fingerprint(self.boundary) != self.store.description.fingerprint:
            self.warn(
                f"units before the store after {self.unit} have other weights than when it was "
                "filled: rows are computed from here on"
            )
            self.leave()

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        if stop > start:
            here = device_of(self.units)
            if here is not None and here.type != self.device.type:
                raise ValueError(
                    f"the network is on {here.type}, and PrefixCache serves rows on "
                    f'{self.device.type}: give it device="{here.type}"'
                )
        self.prefix_unit_rows_computed += len(x) * (stop - start)
        with autocast(self.device, self.autocast_dtype):
            return self.units.run_frozen(x, start, stop, self.batch_size)

    def _count(self, rows: int) -> None:
        """Of rows at the boundary, that they have come."""
        if self.units.frontier == 0:
            self.unfrozen_rows += rows
        if self.store is not None:
            self.rows_served += rows
            self.saved_seconds += rows * self.prefix_seconds_per_row

    def _add_reading(self, store: HeldStore | None, rows: int, seconds: float) -> None:
        if store is None:
            self.compute_seconds += seconds
            return
        self.read_seconds += seconds
        self.saved_seconds -= seconds
        if store is self.store:
            self._watched.append(seconds / rows)

    def _add_computing(self, seconds: float) -> None:
        self.compute_seconds += seconds

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

    def _note_usage(self) -> None:
        """Beside the store in use, for people: what this run had of it so far."""
        if self.store is not None:
            hits = self.rows_served - self._served_before
            note_usage(self.store.folder, Usage(hits, self._missed, time.time()))

    def _mend_or_leave(self, store: Store, error: OSError) -> None:
        """A row could not be read. What is damaged is mended, once; a disk that goes on failing is
        not read from any more."""
        reason = error.strerror or error
        if self._mended is not store:
            self._mended = store
            try:
                damaged = list(store.damage(self._stores.stop_if_asked))
                source = self._source(self.boundary, inputs=True)
                if damaged and self._stores.mend(store, damaged, source):
                    return
            except OSError as failure:
                reason = failure.strerror or failure
        self.warn(
            f"the store after {self._name(self.boundary)} cannot be read ({reason}): its rows are "
            "computed instead"
        )
        self._leave(whole=False)

    def _leave(self, *, whole: bool = True) -> None:
        self._before_leaving()
        self._holdings.leave(whole=whole)
        self._tell_datasets()

    def _before_leaving(self) -> None:
        self._note_usage()
        self._last_watched = self.seconds_per_byte_read
        self._watched.clear()

    def _tell_datasets(self) -> None:
        """Whether they need not load inputs."""
        for rows in self.inputs.values():
            if isinstance(rows, DatasetRows):
                rows.dataset.serve(self.store is not None)


def device_of(units: Units) -> torch.device | None:
    """Where the first of the network's parameters is; None if it has none."""
    return next((p.device for unit in units for p in unit.parameters()), None)
