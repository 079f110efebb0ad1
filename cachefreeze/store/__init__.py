"""The store: one boundary's activations on disk, as a zarr group that is whole or not used.

    CACHE_DIR/CACHEDIR.TAG             marks the folder as a cache (and as one of ours)
    CACHE_DIR/<fingerprint>/zarr.json  zarr v3 group; its attributes describe the store
                            train/     zarr array (rows, ...) in chunks with CRC32C
                            val/
                            manifest.json  checksum of every chunk and every zarr.json
                            COMMITTED      SHA-256 of the manifest; written last
                            journal        the chunks so far, until it is committed
                            lock           held shared by readers, exclusively by the writer
                            kept           if later runs may want it
                            usage.json     what the last run had of it, for people

An uncompressed chunk file is its rows' bytes in C order, and the checksum in four bytes more. So
any zarr tool opens a store, and training reads rows straight from the files, with `pread`: as fast
as through memory maps for rows of some kB and more, and a failing disk raises an error here where
a map would kill the process.

Chunks may be compressed instead, with codecs that zarr knows too, for when the disk is the limit:
rows are then served from memory, where all of them are decoded once.

This room takes arrays and bytes; it knows no network and no tensor.
"""

from cachefreeze.store.codecs import CODECS, Codec, codec_for, encoded_bytes
from cachefreeze.store.folder import (
    SCRATCH,
    check_cache_dir,
    default_budget,
    in_use,
    is_being_written,
    is_cache_dir,
    is_committed,
    kept_since,
    prepare_cache_dir,
    remove_rubbish,
    remove_store,
    store_folders,
)
from cachefreeze.store.format import (
    ARRAY_TYPES,
    FORMAT,
    VALUES,
    Description,
    Layout,
    Quantization,
    StoreError,
    label,
    read_description,
)
from cachefreeze.store.inspect import CacheReport, StoreReport, inspect_cache
from cachefreeze.store.read import Damage, SplitReader, Store, open_store
from cachefreeze.store.usage import Usage, note_usage, read_usage
from cachefreeze.store.write import StoreTooLarge, StoreWriter, mend_chunk

__all__ = [
    "ARRAY_TYPES",
    "CODECS",
    "FORMAT",
    "SCRATCH",
    "VALUES",
    "CacheReport",
    "Codec",
    "Damage",
    "Description",
    "Layout",
    "Quantization",
    "SplitReader",
    "Store",
    "StoreError",
    "StoreReport",
    "StoreTooLarge",
    "StoreWriter",
    "Usage",
    "check_cache_dir",
    "codec_for",
    "default_budget",
    "encoded_bytes",
    "in_use",
    "inspect_cache",
    "is_being_written",
    "is_cache_dir",
    "is_committed",
    "kept_since",
    "label",
    "mend_chunk",
    "note_usage",
    "open_store",
    "prepare_cache_dir",
    "read_description",
    "read_usage",
    "remove_rubbish",
    "remove_store",
    "store_folders",
]
