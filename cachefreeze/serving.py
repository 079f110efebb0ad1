"""The rows of a store, from wherever they are held."""

from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch

from cachefreeze.background import HeldStore
from cachefreeze.encoding import Encoding
from cachefreeze.errors import Interrupted
from cachefreeze.rows import Rows, batches_of
from cachefreeze.staging import RowReader, StagedRows
from cachefreeze.store import Store
from cachefreeze.stored_rows import ResidentRows, StoredRows
from cachefreeze.tiers import Memory, MemoryReader, Tiers


def serve(
    store: HeldStore, split: str, memory: Memory | None, device: torch.device, threads: int
) -> Rows:
    """The rows of one split of a store, on the training device.

    Args:
        store: to read from, unless all rows are in memory.
        memory: all rows, if they are there.
        device: of training.
        threads: that may gather rows ahead of time; 0 has whoever asks for rows read them, which on
            a CPU is as fast.
    """
    about = store.description
    encoding, layout = Encoding.described(about), about.splits[split]
    if memory is not None and memory.rows[split].device.type == device.type:
        return ResidentRows(memory.rows[split], encoding, about.fingerprint)
    if memory is not None:
        reader: RowReader = MemoryReader(memory.rows[split])
        threads = max(threads, 1)
    else:
        assert isinstance(store, Store), "a store that is being written has its rows in memory"
        reader = store.readers[split]
        if not threads:
            return StoredRows(store.readers[split], encoding, device, about.fingerprint)
    return StagedRows(
        reader, layout.row_shape, layout.rows, encoding, device, about.fingerprint, threads=threads
    )


def loaded(
    store: Store,
    tiers: Tiers,
    *,
    threads: int = 0,
    stopping: Callable[[], bool] = lambda: False,
) -> Memory | None:
    """The rows of a store in memory, if that is where they belong.

    Args:
        store: to read from; its files are let go of.
        tiers: of the run.
        threads: that read; 0 has whoever calls do it.
        stopping: asked before every chunk.

    Raises:
        Interrupted: `stopping` says so.
    """
    about = store.description
    encoding = Encoding.described(about)
    memory = tiers.memory_for(about, encoding)
    if memory is None:
        return None
    try:
        for split, layout in about.splits.items():
            rows = memory.rows[split]
            staged = StagedRows(
                store.readers[split],
                layout.row_shape,
                layout.rows,
                encoding,
                rows.device,
                about.fingerprint,
                threads=threads,
            )
            order = batches_of(np.arange(layout.rows), layout.rows_per_chunk)
            # (Closed at once: no thread may read any more when the store is.)
            with closing(staged.stored(order)) as chunks:
                for room, chunk in zip(rows.split(layout.rows_per_chunk), chunks, strict=False):
                    if stopping():
                        raise Interrupted
                    room.copy_(chunk)
    except OSError:
        return None  # whoever asks for a row will see to it
    store.put_away()
    return memory
