"""The store: one boundary's activations on disk, as a zarr group that is whole or not used.

    CACHE_DIR/CACHEDIR.TAG             marks the folder as a cache (and as one of ours)
    CACHE_DIR/<fingerprint>/zarr.json  zarr v3 group; its attributes describe the store
                            train/     zarr array (rows, ...), uncompressed chunks with CRC32C
                            val/
                            manifest.json  checksum of every chunk and every zarr.json
                            COMMITTED      SHA-256 of the manifest; written last
                            lock           held shared by readers, exclusively by the writer

An uncompressed chunk file is its rows' bytes in C order, and the checksum in four bytes more. So
any zarr tool opens a store, and training reads rows straight from the files, with `pread`: as fast
as through memory maps for rows of some kB and more, and a failing disk raises an error here where
a map would kill the process.

This room takes arrays and bytes; it knows no network and no tensor.
"""

from cachefreeze.store.folder import (
    check_cache_dir,
    in_use,
    prepare_cache_dir,
    remove_rubbish,
    remove_store,
    store_folders,
)
from cachefreeze.store.format import FORMAT, Description, Layout, StoreError
from cachefreeze.store.inspect import CacheReport, StoreReport, inspect_cache
from cachefreeze.store.read import SplitReader, Store, open_store
from cachefreeze.store.write import StoreWriter

__all__ = [
    "FORMAT",
    "CacheReport",
    "Description",
    "Layout",
    "SplitReader",
    "Store",
    "StoreError",
    "StoreReport",
    "StoreWriter",
    "check_cache_dir",
    "in_use",
    "inspect_cache",
    "open_store",
    "prepare_cache_dir",
    "remove_rubbish",
    "remove_store",
    "store_folders",
]
