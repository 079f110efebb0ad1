"""The rows of a store, from wherever they are held."""

import numpy as np
import torch

from cachefreeze.background import HeldStore
from cachefreeze.encoding import Encoding
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


def loaded(store: Store, tiers: Tiers) -> Memory | None:
    """The rows of a store in memory, if that is where they belong."""
    encoding = Encoding.described(store.description)
    memory = tiers.memory_for(store.description, encoding)
    if memory is None:
        return None
    try:
        for split, layout in store.description.splits.items():
            for rows in batches_of(np.arange(layout.rows), layout.rows_per_chunk):
                stored, room = encoding.empty(
                    len(rows), layout.row_shape, pinned=tiers.device.type == "cuda"
                )
                store.readers[split].read(rows, room)
                memory.rows[split][rows[0] : rows[-1] + 1] = stored
    except OSError:
        return None  # whoever asks for a row will see to it
    store.put_away()
    return memory
