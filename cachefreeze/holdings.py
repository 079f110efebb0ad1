"""The store that rows come from, and those before it that something still wants."""

from collections.abc import Callable, Mapping

from cachefreeze.background import HeldStore, WritingStore
from cachefreeze.encoding import Encoding
from cachefreeze.rows import Rows
from cachefreeze.serving import loaded, serve
from cachefreeze.store import Store
from cachefreeze.stored_rows import StoredPixels
from cachefreeze.tiers import TIERS, Memory, Tiers


class Holdings:
    """The store that the rows of a run come from, in which tier they are held, and the stores out
    of use that a checkpoint names, or that are still being written for later runs.

    Args:
        inputs: of the network, for each split: where rows come from when there is no store.
        tiers, threads, warn, stopping: see `PrefixCache`.

    Attributes:
        store: that rows come from, if any.
        boundary: of those rows.
        rows: themselves, of each split.
        checkpointed: fingerprint of the store that the last checkpoint on disk names, if any.
    """

    def __init__(
        self,
        inputs: Mapping[str, Rows],
        tiers: Tiers,
        threads: int,
        warn: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.inputs = inputs
        self.tiers = tiers
        self.threads = threads
        self.warn = warn
        self.stopping = stopping
        self.store: HeldStore | None = None
        self.boundary = 0
        self.rows: Mapping[str, Rows] = inputs
        self.checkpointed: str | None = None
        self._memory: Memory | None = None
        self._retired: list[HeldStore] = []
        self._told_of_tier = False
        # Rows that are in a lower tier only while those before them have not left theirs.
        self._may_rise = False

    @property
    def fingerprint(self) -> str | None:
        """Of the store that rows come from."""
        return None if self.store is None else self.store.description.fingerprint

    @property
    def tier(self) -> str | None:
        """Where those rows are held; None without a store."""
        if self.store is None:
            return None
        return "disk" if self._memory is None else self._memory.tier

    @property
    def bytes(self) -> int:
        """Of all stores here."""
        return sum(store.bytes for store in self._stores)

    @property
    def has_retired(self) -> bool:
        """Whether there are stores that `release` would remove."""
        return not all(store.kept for store in self._retired)

    def take(self, store: HeldStore, boundary: int, memory: Memory | None) -> None:
        """Serve rows from another store, whose rows are in `memory`, if that is given.

        Raises:
            Interrupted: `stopping` says so, while rows are loaded into memory.
        """
        # What is loaded now may need the memory of the rows before; and if that goes wrong, rows
        # are computed.
        self.leave()
        self._close_written()
        try:
            if memory is None:
                assert isinstance(store, Store)
                memory = loaded(store, self.tiers, threads=self.threads, stopping=self.stopping)
            self._hold(store, boundary, memory)
        except BaseException:
            store.close()
            raise
        self._may_rise = self.tier != self.tiers.ladder[0]

    def leave(self, *, whole: bool = True) -> None:
        """Serve the network's input. The store goes, now or when no checkpoint names it any more,
        unless it is `whole` and kept for later runs."""
        store = self.store
        self._forget()
        if store is None:
            return
        if whole and store.kept:
            if _is_being_written(store):
                self._retired.append(store)
            else:
                store.close()
        elif store.description.fingerprint == self.checkpointed:
            store.put_away()
            self._retired.append(store)
        else:
            store.remove()

    def rise(self) -> None:
        """Once the rows before have left their memory: take it, if it does for these."""
        store = self.store
        if not self._may_rise or store is None:
            return
        self._may_rise = False
        there = self.tiers.now_with_room(store.description)
        if TIERS.index(there) < TIERS.index(self.tier or "disk"):
            self._take_room(store)
        elif self.tiers.asked not in ("auto", self.tier) and not self._told_of_tier:
            self._told_of_tier = True
            limit = ", --device-cache-gb" if self.tiers.asked == "device" else ""
            self.warn(
                f"the rows after {store.description.unit} do not fit where they were asked for "
                f"(--cache-tier {self.tiers.asked}{limit}): they are served from tier {self.tier}"
            )

    def _take_room(self, store: HeldStore) -> None:
        before = self._memory
        if before is None:
            assert isinstance(store, Store)
            memory = loaded(store, self.tiers, threads=self.threads, stopping=self.stopping)
        else:
            memory = self.tiers.memory_for(store.description, Encoding.described(store.description))
            if memory is not None:
                for split, rows in before.rows.items():
                    memory.rows[split].copy_(rows)
        if memory is not None:
            self._hold(store, self.boundary, memory)

    def release(self) -> None:
        """A checkpoint on disk names the present store: what only an earlier one names goes."""
        self.checkpointed = self.fingerprint
        kept = []
        for store in self._retired:
            if store.kept:
                kept.append(store)
            else:
                store.remove()
        self._retired = kept
        self._close_written()

    def wait(self) -> None:
        """Until all that is written in the background is on disk."""
        for store in self._stores:
            if isinstance(store, WritingStore):
                store.wait()
        self._close_written()

    def let_go_of(self, fingerprint: str) -> None:
        """Of a store that is out of use, for it may be taken again: it is written to its end."""
        others = []
        for store in self._retired:
            if store.description.fingerprint == fingerprint:
                store.close()
            else:
                others.append(store)
        self.tell_of_failures()
        self._retired = others

    def tell_of_failures(self) -> None:
        """Of what could not be written in the background; its rows are in memory."""
        for store in self._stores:
            if isinstance(store, WritingStore) and store.error is not None and not store.told:
                store.told = True
                reason = store.error.strerror or store.error
                self.warn(
                    f"the store after {store.description.unit} cannot be written ({reason}): its "
                    "rows are served from memory, and no later run will find them"
                )

    def close(self, *, wait: bool = True) -> None:
        """Let go of all stores. What is being written is waited for, or else left as it is, for a
        later run to go on with."""
        for store in self._stores:
            if isinstance(store, WritingStore) and not wait:
                store.suspend()
            store.close()
        self._retired = []
        self._forget()

    @property
    def _stores(self) -> list[HeldStore]:
        return self._retired if self.store is None else [self.store, *self._retired]

    def _close_written(self) -> None:
        """Nothing more is wanted of stores that were kept and have been written, or cannot be."""
        others = []
        for store in self._retired:
            if store.kept and not _is_being_written(store):
                store.close()
            else:
                others.append(store)
        self.tell_of_failures()
        self._retired = others

    def _hold(self, store: HeldStore, boundary: int, memory: Memory | None) -> None:
        rows: dict[str, Rows] = {
            name: serve(store, name, memory, self.tiers.device, self.threads)
            for name in store.description.splits
        }
        if boundary == 0:
            rows = {
                name: StoredPixels(each, self.inputs[name])  # type: ignore[arg-type]
                for name, each in rows.items()
            }
        self.store, self.boundary, self.rows, self._memory = store, boundary, rows, memory

    def _forget(self) -> None:
        self.store = self._memory = None
        self.boundary, self.rows = 0, self.inputs


def _is_being_written(store: HeldStore) -> bool:
    return isinstance(store, WritingStore) and not store.done
