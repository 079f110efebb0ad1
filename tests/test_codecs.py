"""Compressed stores hold the same rows, find damage before they decode, and keep to their limit."""

import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from cachefreeze.files import human_bytes
from cachefreeze.store import (
    ARRAY_TYPES,
    CODECS,
    Description,
    Layout,
    Quantization,
    Store,
    StoreError,
    StoreTooLarge,
    StoreWriter,
    codec_for,
    encoded_bytes,
    inspect_cache,
    open_store,
    prepare_cache_dir,
)
from cachefreeze.store import format as store_format
from cachefreeze.store.codecs import zstd_content_size
from cachefreeze.store.format import sha256
from cachefreeze.store.read import DecodedReader

from .test_store import NAME, delete_a_chunk, flip_a_bit, swap_two_chunks

SHAPE = (4, 4, 8)
ROW_BYTES = 4 * 4 * 8 * 4
CHUNK_ROWS = 20
COMPRESSED = [codec for codec in CODECS if codec != "raw"]
RANDOM = np.random.default_rng(0)
RELU = {
    "train": RANDOM.normal(size=(110, *SHAPE)).clip(0).astype(np.float32),
    "val": RANDOM.normal(size=(9, *SHAPE)).clip(0).astype(np.float32),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_format, "CHUNK_BYTES", CHUNK_ROWS * ROW_BYTES)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    prepare_cache_dir(tmp_path / "cache")
    return tmp_path / "cache"


def describe(codec: str, rows: dict[str, NDArray[Any]] = RELU, **about: Any) -> Description:
    splits = {
        split: Layout.of(len(array), array.shape[1:], array.dtype.name, codec)
        for split, array in rows.items()
    }
    return Description(
        **{
            "fingerprint": NAME,
            "network": "wrn16_2",
            "boundary": 3,
            "unit": "group1_block2",
            "values": "float32",
            "stored": "float32",
            "created": time.time(),
            "splits": splits,
            "details": {},
            **about,
        }
    )


def write(cache_dir: Path, codec: str, rows: dict[str, NDArray[Any]] = RELU, **about: Any) -> Store:
    writer = StoreWriter(cache_dir, describe(codec, rows, **about))
    for split, array in rows.items():
        for start in range(0, len(array), 9):  # no multiple of a chunk
            writer.append(split, array[start : start + 9])
    return writer.commit()


def read(store: Store, split: str, indices: NDArray[Any]) -> NDArray[Any]:
    layout = store.description.splits[split]
    out = np.empty((len(indices), layout.row_bytes), np.uint8)
    store.readers[split].read(indices, out)
    return out.view(layout.dtype).reshape(len(indices), *layout.row_shape)


def reopen(cache_dir: Path) -> Store:
    store = open_store(cache_dir, NAME)
    assert store is not None
    return store


def chunk_files(cache_dir: Path, split: str = "train") -> list[Path]:
    return sorted((cache_dir / NAME / split).glob("c.*"))


def chunk_bytes(cache_dir: Path) -> int:
    return sum(path.stat().st_size for path in cache_dir.glob("*/*/c.*"))


def int8_about(stored: str) -> dict[str, Any]:
    """Where the stored type is int8, what goes with it."""
    if stored != "int8":
        return {"values": stored, "stored": stored}
    quantization = Quantization((0.1,) * SHAPE[-1], (1.0,) * SHAPE[-1])
    return {"values": "float32", "stored": "int8", "quantization": quantization}


@pytest.mark.parametrize("stored", ARRAY_TYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_bit_of_every_type_comes_back_here_and_in_zarr(
    cache_dir: Path, codec: str, stored: str
) -> None:
    dtype = np.dtype(ARRAY_TYPES[stored])
    noise = RANDOM.integers(0, 256, (90, *SHAPE, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    rows = {"train": np.concatenate([noise, np.zeros_like(noise)]), "val": noise[:7]}
    store = write(cache_dir, codec, rows, **int8_about(stored))
    assert store.description.codec == codec
    group = zarr.open_group(store.folder, mode="r")
    for split, array in rows.items():
        indices = RANDOM.permutation(np.r_[: len(array), : len(array)])
        store.readers[split].will_need(indices)
        assert read(store, split, indices).tobytes() == array[indices].tobytes()
        assert group[split][:].tobytes() == array.tobytes()
        assert group[split].dtype == dtype
    assert list(store.damage()) == []
    assert len(chunk_files(cache_dir)) == store.description.splits["train"].chunks > 1
    store.close()


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_itself_would_write_the_same_files(cache_dir: Path, codec: str) -> None:
    store = write(cache_dir, codec)
    files = {path: path.read_bytes() for split in RELU for path in chunk_files(cache_dir, split)}
    group = zarr.open_group(store.folder, mode="r+")
    for split, array in RELU.items():
        group[split][:] = 1 - array
        assert all(path.read_bytes() != files[path] for path in chunk_files(cache_dir, split))
        group[split][:] = array
    assert {path: path.read_bytes() for path in files} == files
    store.close()


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_knows_the_size_of_its_files(cache_dir: Path, codec: str) -> None:
    writer = StoreWriter(cache_dir, describe(codec))
    writer.append("train", RELU["train"])
    assert writer.bytes == chunk_bytes(cache_dir) > 0
    writer.append("val", RELU["val"])
    writer.commit().close()
    store = reopen(cache_dir)
    assert store.bytes == writer.bytes == chunk_bytes(cache_dir)
    assert (store.bytes == store.description.bytes) == (codec == "raw")
    assert codec == "raw" or store.bytes < 0.9 * store.description.bytes, "half of it is zeros"
    store.close()


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_of_a_chunk_is_known_without_writing_it(cache_dir: Path, codec: str) -> None:
    write(cache_dir, codec).close()
    rows = describe(codec).splits["train"].rows_per_chunk
    first = chunk_files(cache_dir)[0]
    assert encoded_bytes(RELU["train"][:rows], codec) == first.stat().st_size
    every_other = np.repeat(RELU["train"][:rows], 2, axis=0)[::2]
    assert encoded_bytes(every_other, codec) == first.stat().st_size, "of rows with gaps too"


@pytest.mark.parametrize("codec", COMPRESSED)
def test_rows_are_decoded_once_and_served_from_memory(cache_dir: Path, codec: str) -> None:
    store = write(cache_dir, codec)
    store.load()
    for split in RELU:
        for path in chunk_files(cache_dir, split):
            path.unlink()
    store.load()
    for split, array in RELU.items():
        assert np.array_equal(read(store, split, np.arange(len(array))), array)
    with pytest.raises(AssertionError):
        read(store, "val", np.array([9]))
    store.close()


@pytest.mark.parametrize("codec", COMPRESSED)
def test_threads_that_ask_at_once_decode_once(
    cache_dir: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cache_dir, codec).close()
    store, decoded = reopen(cache_dir), []
    real = DecodedReader._decode

    def slow(*args: Any) -> NDArray[np.uint8]:
        decoded.append(threading.current_thread().name)
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(DecodedReader, "_decode", slow)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda n: read(store, "train", np.arange(n, n + 3)), range(4)))
    assert len(decoded) == 1
    assert all(np.array_equal(got, RELU["train"][n : n + 3]) for n, got in enumerate(rows))
    store.close()


@pytest.mark.parametrize("codec", CODECS)
def test_closing_frees_the_memory_that_loading_took(cache_dir: Path, codec: str) -> None:
    store = write(cache_dir, codec)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        store.load()
        loaded = tracemalloc.get_traced_memory()[0] - before
        peak = tracemalloc.get_traced_memory()[1] - before
        store.close()
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    expected = store.description.memory_bytes
    assert expected == (0 if codec == "raw" else (6 * 19 + 9) * ROW_BYTES)
    assert expected <= loaded < expected + 10_000
    assert peak < expected + 30_000, "one encoded chunk at a time"
    assert left < 10_000


def flip_a_bit_of_the_checksum(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[2]
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def cut_short(cache_dir: Path) -> None:
    path = chunk_files(cache_dir)[2]
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(cache_dir: Path) -> None:
    with chunk_files(cache_dir)[2].open("ab") as file:
        file.write(b"\0")


def empty(cache_dir: Path) -> None:
    chunk_files(cache_dir)[2].write_bytes(b"")


@pytest.mark.parametrize(
    "hurt",
    [
        flip_a_bit,
        flip_a_bit_of_the_checksum,
        cut_short,
        lengthen,
        empty,
        delete_a_chunk,
        swap_two_chunks,
    ],
)
@pytest.mark.parametrize("rows", ["compressible", "noise"])
@pytest.mark.parametrize("codec", CODECS)
def test_damaged_chunks_are_found_by_looking_and_by_loading(
    cache_dir: Path, codec: str, rows: str, hurt: Callable[[Path], None]
) -> None:
    noise = RANDOM.integers(0, 256, (110, 4, 4, 32), np.uint8)
    if rows == "noise":
        write(cache_dir, codec, {"train": noise}, values="uint8", stored="uint8").close()
        assert len({path.stat().st_size for path in chunk_files(cache_dir)[:-1]}) == 1
    else:
        write(cache_dir, codec).close()
    hurt(cache_dir)
    store = reopen(cache_dir)
    damage = list(store.damage())
    assert len(damage) == (2 if hurt is swap_two_chunks else 1)
    assert str(damage[0]).startswith("train: c.")
    if codec != "raw":
        with pytest.raises(OSError, match=r"^c\.\d") as caught:
            store.load()
        assert f"train: {caught.value}" == str(damage[0])
    store.close()
    (report,) = inspect_cache(cache_dir, verify=True).stores
    assert report.damage[-len(damage) :] == tuple(map(str, damage))


@pytest.mark.parametrize("codec", CODECS)
def test_what_would_exceed_its_limit_is_not_written(cache_dir: Path, codec: str) -> None:
    limit = sum(chunk_sizes(codec)) // 2
    writer = StoreWriter(cache_dir, describe(codec), limit)
    with pytest.raises(StoreTooLarge) as caught:
        writer.append("train", RELU["train"])
    assert isinstance(caught.value, OSError)
    assert caught.value.strerror == f"it would take more than {human_bytes(limit)}"
    held = chunk_bytes(cache_dir)
    assert limit - max(chunk_sizes(codec)) < held == writer.bytes <= limit
    assert not list(cache_dir.glob("*/*/*.partial"))
    writer.abort()
    assert [path.name for path in cache_dir.iterdir()] == ["CACHEDIR.TAG"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_of_exactly_its_limit_is_written(cache_dir: Path, codec: str) -> None:
    limit = sum(chunk_sizes(codec))
    for allowed in (limit, limit - 1):
        writer = StoreWriter(cache_dir, describe(codec), allowed)
        writer.append("train", RELU["train"])
        if allowed < limit:
            with pytest.raises(StoreTooLarge):
                writer.append("val", RELU["val"])
            writer.abort()
        else:
            writer.append("val", RELU["val"])
            writer.commit().remove()


def chunk_sizes(codec: str) -> list[int]:
    sizes = []
    for split, layout in describe(codec).splits.items():
        rows, step = RELU[split], layout.rows_per_chunk
        for start in range(0, len(rows), step):
            chunk = np.full((step, *SHAPE), np.nan, np.float32)
            chunk[: len(rows) - start] = rows[start : start + step]
            sizes.append(encoded_bytes(chunk, codec))
    return sizes


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Of the description, as one who can sign it."""

    def hurt(cache_dir: Path) -> None:
        path = cache_dir / NAME / "zarr.json"
        content = json.loads(path.read_text())
        change(content["attributes"]["cachefreeze"])
        path.write_text(json.dumps(content))
        sign(cache_dir, lambda manifest: None)

    return hurt


def sign(cache_dir: Path, change: Callable[[dict], object]) -> None:
    """Rewrite manifest and marker, so that all hashes fit."""
    folder = cache_dir / NAME
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = sha256((folder / name).read_bytes())
    change(manifest)
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_text(sha256(content))


def signed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda cache_dir: sign(cache_dir, change)


def set_scale(numbers: object) -> Callable[[Path], None]:
    return edit(lambda about: about["quantization"].update(scale=numbers))


NOT_DESCRIBED, NOT_WRITTEN, NOT_QUANTIZED = "does not describe", "does not write", "int8"
CHANNELS = SHAPE[-1]


@pytest.mark.parametrize(
    ("hurt", "sentence"),
    [
        (edit(lambda a: a["splits"]["val"].update(codec="gzip")), NOT_WRITTEN),
        (edit(lambda a: a["splits"]["val"].update(codec="raw")), NOT_WRITTEN),
        (edit(lambda a: [s.update(codec="gzip") for s in a["splits"].values()]), NOT_WRITTEN),
        (edit(lambda a: a["splits"]["val"].update(codec=["lz4"])), NOT_DESCRIBED),
        (edit(lambda a: a["splits"]["val"].pop("codec")), NOT_DESCRIBED),
        (edit(lambda a: a["splits"]["val"].update(dtype="float32")), NOT_WRITTEN),
        (edit(lambda a: a["splits"]["val"].update(rows_per_chunk=2**39)), NOT_WRITTEN),
        (edit(lambda a: a["splits"]["val"].update(row_shape=[2**35, CHANNELS])), NOT_WRITTEN),
        (edit(lambda a: a.update(splits={})), NOT_WRITTEN),
        (edit(lambda a: a.update(stored="float32")), NOT_WRITTEN),
        (edit(lambda a: a.update(stored="int4")), NOT_WRITTEN),
        (edit(lambda a: a.update(stored=["int8"])), NOT_WRITTEN),
        (edit(lambda a: a.pop("stored")), NOT_DESCRIBED),
        (edit(lambda a: a.update(values="uint8")), NOT_WRITTEN),
        (edit(lambda a: a.update(values="int8")), NOT_WRITTEN),
        (edit(lambda a: a.update(created=10**400)), NOT_DESCRIBED),
        (edit(lambda a: a.update(created="now")), NOT_DESCRIBED),
        (edit(lambda a: a.pop("quantization")), NOT_DESCRIBED),
        (edit(lambda a: a.update(quantization=[])), NOT_DESCRIBED),
        (edit(lambda a: a["quantization"].pop("offset")), NOT_DESCRIBED),
        (edit(lambda a: a["quantization"].update(more=[])), NOT_DESCRIBED),
        (edit(lambda a: a.update(quantization=None)), NOT_QUANTIZED),
        (edit(lambda a: a["splits"]["val"].update(row_shape=[4, 4, 1])), NOT_QUANTIZED),
        (edit(lambda a: a["splits"]["val"].update(row_shape=[])), NOT_QUANTIZED),
        (edit(lambda a: a["quantization"].update(offset=[1.0] * (CHANNELS + 1))), NOT_QUANTIZED),
        (set_scale([0.1] * (CHANNELS - 1)), NOT_QUANTIZED),
        (set_scale([0.1] * 100_000), NOT_QUANTIZED),
        (set_scale([float("nan")] * CHANNELS), NOT_DESCRIBED),
        (set_scale([float("inf")] * CHANNELS), NOT_DESCRIBED),
        (set_scale([10**400] * CHANNELS), NOT_DESCRIBED),
        (set_scale([True] * CHANNELS), NOT_DESCRIBED),
        (set_scale(["1"] * CHANNELS), NOT_DESCRIBED),
        (set_scale("12345678"), NOT_DESCRIBED),
        (set_scale(0.1), NOT_DESCRIBED),
        (signed(lambda m: m.pop("bytes")), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"].pop("val")), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"].update(val=7)), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"].update(val=[0])), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"].update(val=[1.5])), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"].update(val=[2**30])), "not one of cachefreeze"),
        (signed(lambda m: m["bytes"]["train"].pop()), "does not list the chunks of train"),
        (signed(lambda m: m["notes"].update(seconds=10**400)), "not one of cachefreeze"),
    ],
)
def test_metadata_that_are_not_ours_are_refused(
    cache_dir: Path, hurt: Callable[[Path], None], sentence: str
) -> None:
    rows = {split: np.ones((n, *SHAPE), np.int8) for split, n in (("train", 200), ("val", 9))}
    write(cache_dir, "lz4", rows, **int8_about("int8")).close()
    sign(cache_dir, lambda manifest: None)
    reopen(cache_dir).close()  # it was the change that is refused, not the signature
    hurt(cache_dir)
    with pytest.raises(StoreError, match=sentence):
        open_store(cache_dir, NAME)


def test_quantization_of_rows_that_are_not_int8_is_refused(cache_dir: Path) -> None:
    write(cache_dir, "raw").close()
    about = {"scale": [1.0] * CHANNELS, "offset": [0.0] * CHANNELS}
    edit(lambda content: content.update(quantization=about))(cache_dir)
    with pytest.raises(StoreError, match="int8"):
        open_store(cache_dir, NAME)


def test_quantization_comes_back_to_the_last_bit(cache_dir: Path) -> None:
    scale, offset = RANDOM.normal(size=(2, CHANNELS)).astype(np.float32).tolist()
    quantization = Quantization(tuple(scale), tuple(offset))
    rows = {"train": np.ones((9, *SHAPE), np.int8)}
    store = write(cache_dir, "zstd", rows, stored="int8", quantization=quantization)
    assert store.description.quantization == quantization
    assert store.description.lossy
    store.close()


def forge(cache_dir: Path, frame: bytes) -> Store:
    """Put a frame in the place of the first chunk, with checksums and signatures that fit."""
    checksum = CRC32C.checksum(frame)
    chunk_files(cache_dir)[0].write_bytes(frame + checksum.to_bytes(4, "little"))

    def change(manifest: dict) -> None:
        manifest["crc32c"]["train"][0] = checksum
        manifest["bytes"]["train"][0] = len(frame) + 4

    sign(cache_dir, change)
    return reopen(cache_dir)


def blosc_frame(size: int, **header: int) -> bytes:
    frame = bytearray(numcodecs.Blosc("lz4", clevel=5, typesize=4).encode(bytes(size)))
    for name, position in (("decoded", 4), ("encoded", 12)):
        if name in header:
            frame[position : position + 4] = header[name].to_bytes(4, "little")
    return bytes(frame)


def zstd_frame(size: int, **header: int) -> bytes:
    frame = bytearray(numcodecs.Zstd(level=1, checksum=True).encode(bytes(size)))
    if "decoded" in header:
        assert frame[4] >> 6 == 1, "its size is in two bytes"
        frame[5:7] = (header["decoded"] - 256).to_bytes(2, "little")
    return bytes(frame)


# What a chunk of 114 rows in six chunks decodes to.
RIGHT = 19 * ROW_BYTES


@pytest.mark.parametrize(
    ("codec", "frame", "sentence"),
    [
        ("lz4", blosc_frame(2**20), "claims to hold 1048576 bytes"),
        ("lz4", blosc_frame(RIGHT - 4), "claims to hold 9724 bytes"),
        ("lz4", blosc_frame(2**20, decoded=RIGHT), "cannot be decoded"),
        ("lz4", blosc_frame(RIGHT, encoded=2**24), "not as long as it claims"),
        ("lz4", blosc_frame(RIGHT)[:-9], "not as long as it claims"),
        ("lz4", b"\2", "claims to hold 0 bytes"),
        ("zstd", zstd_frame(2**24), "claims to hold 16777216 bytes"),
        ("zstd", zstd_frame(RIGHT - 4), "claims to hold 9724 bytes"),
        ("zstd", zstd_frame(RIGHT - 4, decoded=RIGHT), "cannot be decoded"),
        ("zstd", zstd_frame(RIGHT + 4, decoded=RIGHT), "cannot be decoded"),
        ("zstd", zstd_frame(RIGHT)[:-9], "cannot be decoded"),
        ("zstd", zstd_frame(RIGHT) + zstd_frame(2**24), "cannot be decoded"),
        ("zstd", b"\x28\xb5\x2f\xfd\x00\x58", "claims to hold None bytes"),
        ("zstd", b"\2", "claims to hold None bytes"),
    ],
)
def test_a_chunk_that_decodes_to_anything_else_is_refused_without_taking_memory(
    cache_dir: Path, codec: str, frame: bytes, sentence: str
) -> None:
    rows = {"train": np.zeros((114, *SHAPE), np.float32)}
    write(cache_dir, codec, rows).close()
    assert describe(codec, rows).splits["train"].chunk_bytes == RIGHT
    store = forge(cache_dir, frame)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match=rf"^c\.0\.0\.0\.0 is damaged: it.*({sentence})"):
            store.load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < store.description.memory_bytes + len(frame) + 100_000
    store.close()


def test_too_little_memory_is_an_error_that_can_be_caught(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    store = write(cache_dir, "lz4")
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", full)
        with pytest.raises(OSError, match=r"take .* kB of memory, more than there is"):
            store.load()
    store.load()
    store.close()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 2**20])
def test_the_size_in_a_zstd_frame_is_understood(size: int) -> None:
    frame = numcodecs.Zstd(level=1, checksum=True).encode(bytes(size))
    assert zstd_content_size(frame) == size
    assert zstd_content_size(frame[:5]) is None


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_encode_and_decode_alone(codec: str) -> None:
    rows = RELU["train"]
    tool = codec_for(codec, "float32")
    out = np.empty(rows.nbytes, np.uint8)
    tool.decode(tool.encode(rows), out)
    assert out.tobytes() == rows.tobytes()
    with pytest.raises(ValueError, match="instead of"):
        tool.decode(tool.encode(rows), out[:-4])
