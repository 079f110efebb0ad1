"""Stores that somebody forged, with checksums that agree: nothing in them is run, followed or
believed, and the rows that are served are right."""

import json
import math
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs.checksum32 import CRC32C

from cachefreeze.store import format as store_format
from cachefreeze.store import prepare_cache_dir

from .chaos import fuzz
from .chaos.fuzz import Kind, Subject, as_zarr_reads, everything, hangs_are_noticed, same, sign
from .chaos.fuzz import snapshot as contents

SCRIPT = Path(__file__).parents[1] / "scripts" / "cache_stats.py"
MOST_MEMORY = 300 * 10**6
DEEP = 100_000

# To a store and a folder outside of the cache.
Forge = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "CHUNK_BYTES", fuzz.CHUNK_BYTES)
        kinds = (Kind("raw"), Kind("zstd", codec="zstd"), Kind("int8", stored="int8"))
        yield {kind.name: Subject(kind, tmp_path_factory.mktemp(kind.name)) for kind in kinds}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def edited(file: str, change: Callable[[Any], object]) -> Forge:
    """`change` is given what the file says."""

    def forge(store: Path, outside: Path) -> None:
        content = json.loads((store / file).read_text())
        change(content)
        (store / file).write_text(json.dumps(content))
        sign(store)

    return forge


def about(change: Callable[[dict[str, Any]], object]) -> Forge:
    return edited("zarr.json", lambda content: change(content["attributes"]["cachefreeze"]))


def array(change: Callable[[dict[str, Any]], object]) -> Forge:
    return edited("train/zarr.json", change)


def with_codecs(*names: str) -> Forge:
    """The array's metadata name these codecs, and a chunk holds a pickle with a payload."""

    def forge(store: Path, outside: Path) -> None:
        chunk = next((store / "train").glob("c.0.*"))
        content = np.zeros(chunk.stat().st_size - 4, np.uint8)
        pickled = np.frombuffer(pickle.dumps(Payload(outside / "ran")), np.uint8)
        content[: len(pickled)] = pickled
        write_chunk(store, chunk, content)
        codecs = [{"name": name, "configuration": {}} for name in names]
        array(lambda found: found.update(codecs=codecs))(store, outside)

    return forge


def write_chunk(store: Path, chunk: Path, content: np.ndarray) -> None:
    """With checksums that agree, in the chunk and in the manifest."""
    checksum = CRC32C.checksum(content)
    chunk.write_bytes(content.tobytes() + checksum.to_bytes(4, "little"))
    split, number = chunk.parent.name, int(chunk.name.split(".")[1])
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["crc32c"][split][number] = checksum
    if split in manifest["bytes"]:
        manifest["bytes"][split][number] = chunk.stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))
    sign(store)


def of_shape(rows: int, row_shape: list[int], rows_per_chunk: int) -> Forge:
    """Group and array agree on the shape of `train`."""

    def forge(store: Path, outside: Path) -> None:
        split = {"rows": rows, "row_shape": row_shape, "rows_per_chunk": rows_per_chunk}
        about(lambda found: found["splits"]["train"].update(split))(store, outside)
        grid = {"name": "regular", "configuration": {"chunk_shape": [rows_per_chunk, *row_shape]}}
        shape = [rows, *row_shape]
        array(lambda found: found.update(shape=shape, chunk_grid=grid))(store, outside)

    return forge


def with_split_named(name: str) -> Forge:
    """Instead of `train`, with the very files of `train` in the place that the name leads to; in
    the name, OUTSIDE is the folder outside."""

    def forge(store: Path, outside: Path) -> None:
        new = name.replace("OUTSIDE", str(outside))
        if not (store / new).exists():
            shutil.copytree(store / "train", store / new)
        about(lambda found: found["splits"].update({new: found["splits"].pop("train")}))(
            store, outside
        )
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["crc32c"][new] = manifest["crc32c"].pop("train")
        manifest["sha256"][f"{new}/zarr.json"] = manifest["sha256"].pop("train/zarr.json")
        (store / "manifest.json").write_text(json.dumps(manifest))
        sign(store)

    return forge


def holding(file: str, content: bytes) -> Forge:
    """In place of what the file said."""

    def forge(store: Path, outside: Path) -> None:
        (store / file).write_bytes(content)
        if file == "manifest.json":
            (store / "COMMITTED").write_text(sha256(content).hexdigest())
        elif file != "COMMITTED":
            sign(store)

    return forge


def with_raw_json(file: str, old: str, new: str) -> Forge:
    """Text that `json` would not write."""

    def forge(store: Path, outside: Path) -> None:
        text = json.dumps(json.loads((store / file).read_text()))
        assert old in text
        holding(file, text.replace(old, new, 1).encode())(store, outside)

    return forge


def with_long_manifest(item: str, count: int) -> Forge:
    def forge(store: Path, outside: Path) -> None:
        text = (store / "manifest.json").read_text().removesuffix("}")
        text += f', "more": [{", ".join([item] * count)}]}}'
        holding("manifest.json", text.encode())(store, outside)

    return forge


def instead_of(name: str, put: Callable[[Path, Path], object]) -> Forge:
    """`put` is given the place and what was there, which lies outside now."""

    def forge(store: Path, outside: Path) -> None:
        path = next(store.glob(name))
        path.rename(outside / path.name)
        put(path, outside / path.name)

    return forge


def with_fewer_rows(store: Path, outside: Path) -> None:
    """A store that is whole, and lacks the last row."""
    of_shape(40, [8, 8, 16], 4)(store, outside)
    edited("manifest.json", lambda found: found["crc32c"]["train"].pop())(store, outside)


def with_fewer_splits(store: Path, outside: Path) -> None:
    about(lambda found: found["splits"].pop("val"))(store, outside)


def with_huge_rows(store: Path, outside: Path) -> None:
    """Of 1.6 GB each; the file of the first is that long, and takes no room."""
    of_shape(41, [3 * 2**9, 2**10, 2**8], 1)(store, outside)
    os.truncate(next(store.glob("train/c.0.*")), 3 * 2**29 + 4)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["crc32c"]["train"] = [0] * 41
    (store / "manifest.json").write_text(json.dumps(manifest))
    sign(store)


def resized(size: int) -> Forge:
    return lambda store, outside: os.truncate(next(store.glob("train/c.1.*")), size)


def in_turn(*forges: Forge) -> Forge:
    def forge(store: Path, outside: Path) -> None:
        for each in forges:
            each(store, outside)

    return forge


def uncommitted(store: Path, outside: Path) -> None:
    (store / "COMMITTED").unlink()


def damaged(store: Path, outside: Path) -> None:
    os.truncate(next(store.glob("train/c.0.*")), 5)


def link_partial_files(store: Path, outside: Path) -> None:
    """Where this very process would write files before it renames them."""
    target = outside / "target"
    target.write_text("mine")
    for path in [*store.rglob("c.*"), *store.rglob("*.json"), store / "COMMITTED"]:
        path.with_name(f"{path.name}.{os.getpid()}.partial").symlink_to(target)


def expand(store: Path, outside: Path) -> None:
    """A chunk of a few kB that decodes to a GB, and says it decodes to what it should."""
    layout_bytes = 4 * 8 * 8 * 16 * 4  # of a chunk's rows
    header = b"\x28\xb5\x2f\xfd\xe0" + layout_bytes.to_bytes(8, "little")
    # Of RFC 8878: blocks of 128 kB, each one byte repeated.
    block = ((128 * 1024) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    content = np.frombuffer(header + block * 8000, np.uint8)
    assert len(content) <= 2 * layout_bytes
    write_chunk(store, next(store.glob("train/c.0.*")), content)


def nest_folders(store: Path, outside: Path) -> None:
    """Deeper than Python's stack."""
    here = os.getcwd()
    os.chdir(store)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(here)


def become_a_link(store: Path, outside: Path) -> None:
    store.rename(outside / store.name)
    store.symlink_to(outside / store.name)


def become_a_link_to_nothing(store: Path, outside: Path) -> None:
    shutil.rmtree(store)
    store.symlink_to(outside / "nothing")


def become_a_link_to_an_empty_folder(store: Path, outside: Path) -> None:
    shutil.rmtree(store)
    (outside / "empty").mkdir()
    store.symlink_to(outside / "empty")


def become_the_folder_of_others(store: Path, outside: Path) -> None:
    shutil.rmtree(store)
    store.mkdir()
    (store / "thesis.txt").write_text("mine")


# What becomes of a forged store: it is made anew, mended, used as it is, or left as it is, and rows
# are computed.
REFUSED, MENDED, TAKEN, LEFT = {"refused"}, {"mended"}, {"taken"}, {"left"}


@dataclass(frozen=True)
class Case:
    """A forged store, and what may become of it. Not `visible`: it agrees with its checksums, and
    only decoding finds that it is none."""

    name: str
    forge: Forge
    fates: set[str] = field(default_factory=lambda: REFUSED)
    kind: str = "raw"
    visible: bool = True


NESTED = ("[" * DEEP + "]" * DEEP).encode()
LONG = ("[" + "0, " * (17 * 2**20 // 3) + "0]").encode()
EMPTY_LISTS = ", ".join(["[]"] * 10)

CASES = [
    Case("array with a pickling codec", with_codecs("numcodecs.pickle")),
    Case("array with a pickling codec before ours", with_codecs("pickle", "bytes", "crc32c")),
    Case("array with an unknown codec", with_codecs("bytes", "os.system", "crc32c")),
    Case("array with sharding", with_codecs("sharding_indexed")),
    Case("array of objects", array(lambda found: found.update(data_type="object"))),
    Case(
        "array of an extension's type",
        array(lambda found: found.update(data_type={"name": "numpy.object", "configuration": {}})),
    ),
    Case(
        "array of another endianness",
        array(lambda found: found["codecs"][0].update(configuration={"endian": "big"})),
    ),
    Case(
        "array with storage transformers",
        array(lambda found: found.update(storage_transformers=[{"name": "pickle"}])),
    ),
    Case(
        "array with other chunk names",
        array(lambda found: found["chunk_key_encoding"]["configuration"].update(separator="/")),
    ),
    Case("array with a fill value that is none", array(lambda found: found.update(fill_value="x"))),
    Case(
        "array with a key that readers must understand",
        array(lambda found: found.update(run={"must_understand": True})),
    ),
    Case("array without endianness", array(lambda found: found["codecs"][0].pop("configuration"))),
    Case(
        "group whose consolidated metadata are of other arrays",
        edited(
            "zarr.json",
            lambda found: found.update(
                consolidated_metadata={
                    "kind": "inline",
                    "must_understand": False,
                    "metadata": {
                        split: {
                            "zarr_format": 3,
                            "node_type": "array",
                            "shape": [5],
                            "data_type": "int8",
                            "chunk_grid": {
                                "name": "regular",
                                "configuration": {"chunk_shape": [5]},
                            },
                            "chunk_key_encoding": {"name": "default"},
                            "fill_value": 7,
                            "codecs": [{"name": "bytes"}],
                            "attributes": {},
                        }
                        for split in fuzz.ROWS
                    },
                }
            ),
        ),
    ),
    Case(
        "group that says it is an array", edited("zarr.json", lambda c: c.update(node_type="array"))
    ),
    Case(
        "group with a pickling codec", about(lambda c: c["splits"]["train"].update(codec="pickle"))
    ),
    Case("group of objects", about(lambda c: c["splits"]["train"].update(dtype="object"))),
    Case("group of values that torch would load", about(lambda c: c.update(values="load"))),
    Case("group with another attribute", about(lambda c: c.update(__class__="os.system"))),
    Case("2^60 rows", of_shape(2**60, [8, 8, 16], 4)),
    Case("2^39 rows, one a chunk", of_shape(2**39, [8, 8, 16], 1)),
    Case("2^39 rows in one chunk", of_shape(2**39, [8, 8, 16], 2**39)),
    Case("2^39 rows of one byte", of_shape(2**39, [1], 2**28)),
    Case("5000 dimensions", of_shape(41, [1] * 5000, 4)),
    Case("8 dimensions of 2^39", of_shape(41, [2**39] * 8, 1)),
    Case("rows of 1.6 GB", with_huge_rows),
    Case("a row less than there are", with_fewer_rows, visible=False),
    Case("a split less than there are", with_fewer_splits, visible=False),
    Case("rows of nothing", of_shape(41, [8, 8, 0], 4)),
    Case("no rows in a chunk", of_shape(41, [8, 8, 16], 0)),
    Case("fewer than no rows", of_shape(-41, [8, 8, 16], 4)),
    Case("a split beside the store", with_split_named("../x")),
    Case("a split outside", with_split_named("../../outside/train")),
    Case("a split by its whole path", with_split_named("OUTSIDE/train")),
    Case("a split without a name", with_split_named("")),
    Case("a split that is the cache", with_split_named("..")),
    Case("a split with a slash", with_split_named("train/")),
    Case("a split with a line end", with_split_named("train\n")),
    Case("one split more", about(lambda c: c["splits"].update(more=c["splits"]["train"]))),
    Case("no splits", about(lambda c: c.update(splits={}))),
    Case(
        "int8 of strings", about(lambda c: c["quantization"].update(scale=["x"] * 16)), kind="int8"
    ),
    Case(
        "int8 of one channel", about(lambda c: c["quantization"].update(scale=[1.0])), kind="int8"
    ),
    Case(
        "int8 of NaN",
        about(lambda c: c["quantization"].update(offset=[math.nan] * 16)),
        kind="int8",
    ),
    Case("int8 of nothing known", about(lambda c: c.update(quantization=None)), kind="int8"),
    *(
        Case(f"{file} nested 100,000 deep", holding(file, NESTED))
        for file in ("zarr.json", "train/zarr.json", "manifest.json")
    ),
    *(
        Case(f"{file} with a list of 17 MiB", holding(file, LONG))
        for file in ("zarr.json", "train/zarr.json", "manifest.json", "COMMITTED")
    ),
    *(
        Case(f"{file} of 2 GiB", lambda store, outside, file=file: os.truncate(store / file, 2**31))
        for file in ("zarr.json", "train/zarr.json", "manifest.json", "COMMITTED")
    ),
    Case("manifest with millions of empty lists", with_long_manifest(EMPTY_LISTS, 400_000)),
    Case(
        "a number of 100,000 digits",
        with_raw_json("zarr.json", '"rows": 41', f'"rows": {"9" * 100_000}'),
    ),
    Case("a time of 1e999", with_raw_json("zarr.json", '"created": ', '"created": 1e999, "x": ')),
    Case("1e999 rows", with_raw_json("zarr.json", '"rows": 41', '"rows": 1e999')),
    Case("a boundary of NaN", with_raw_json("zarr.json", '"boundary": 2', '"boundary": NaN')),
    Case("rows said twice", with_raw_json("zarr.json", '"rows": 41', '"rows": 41, "rows": 42')),
    Case(
        "notes that are not finite",
        edited("manifest.json", lambda c: c.update(notes={"prefix_seconds_per_row": math.inf})),
    ),
    Case(
        "notes that are not numbers",
        edited("manifest.json", lambda c: c.update(notes={"prefix_seconds_per_row": "nan"})),
    ),
    Case("a format of a million letters", about(lambda c: c.update(format="x" * 10**6))),
    *(
        Case(
            f"details nested {depth} deep",
            in_turn(
                about(lambda c: c.update(details="here")),
                with_raw_json("zarr.json", '"here"', "[" * depth + "]" * depth),
            ),
            REFUSED | TAKEN,
        )
        for depth in (700, 2000)
    ),
    Case(
        "a network's name that is no text",
        about(lambda c: c.update(network="\ud800")),
        REFUSED | TAKEN,
    ),
    Case(
        "a unit's name that rings the bell",
        about(lambda c: c.update(unit="\x1b[2J\a\n")),
        REFUSED | TAKEN,
    ),
    Case("a chunk that expands to a GB", expand, kind="zstd", visible=False),
    Case(
        "folders deeper than the stack in a store to be replaced",
        in_turn(nest_folders, about(lambda c: c.update(format=1))),
    ),
    Case("metadata that are a link", instead_of("zarr.json", Path.symlink_to)),
    Case(
        "a manifest that is a pipe", instead_of("manifest.json", lambda path, old: os.mkfifo(path))
    ),
    Case("a split that is a link", instead_of("val", Path.symlink_to)),
    Case("a chunk that is a link", instead_of("train/c.1.*", Path.symlink_to), MENDED),
    Case(
        "a chunk that is a link to a device",
        instead_of("train/c.1.*", lambda path, old: path.symlink_to("/dev/zero")),
        MENDED,
    ),
    Case(
        "a chunk that is a pipe",
        instead_of("train/c.1.*", lambda path, old: os.mkfifo(path)),
        MENDED,
    ),
    Case(
        "a chunk that is a folder",
        instead_of("train/c.1.*", lambda path, old: path.mkdir()),
        MENDED | REFUSED | LEFT,
    ),
    Case("a chunk of a TiB", resized(2**40), MENDED),
    Case("a chunk of a TiB, compressed", resized(2**40), MENDED, kind="zstd"),
    Case("a chunk of nothing", resized(0), MENDED),
    Case("a chunk of three bytes", resized(3), MENDED, kind="zstd"),
    Case("links where files are written", in_turn(damaged, link_partial_files), MENDED),
    Case(
        "links where files are written, in a store to be replaced",
        in_turn(link_partial_files, about(lambda c: c.update(format=1))),
    ),
    Case("a lock that is a link", instead_of("lock", Path.symlink_to), LEFT),
    Case(
        "a lock that is a link to nothing",
        instead_of("lock", lambda path, old: path.symlink_to(old.with_name("new"))),
        LEFT,
    ),
    Case(
        "a lock that is a pipe", instead_of("lock", lambda path, old: os.mkfifo(path)), LEFT | TAKEN
    ),
    Case(
        "a lock that is a link, of a store to be replaced",
        in_turn(instead_of("lock", Path.symlink_to), uncommitted),
        LEFT,
    ),
    Case(
        "a lock that is a link to nothing, of a store to be replaced",
        in_turn(
            instead_of("lock", lambda path, old: path.symlink_to(old.with_name("new"))), uncommitted
        ),
        LEFT,
    ),
    Case("a store that is a link", become_a_link, LEFT),
    Case("a store that is a link, to be replaced", in_turn(uncommitted, become_a_link), LEFT),
    Case("a store that is a link to nothing", become_a_link_to_nothing, LEFT),
    Case("a store that is a link to an empty folder", become_a_link_to_an_empty_folder, LEFT),
    Case("a folder of others", become_the_folder_of_others, LEFT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_forged_store_changes_no_row_and_nothing_outside(
    subjects: dict[str, Subject], tmp_path: Path, case: Case
) -> None:
    subject = subjects[case.kind]
    cache_dir, outside = tmp_path / "cache", tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    shutil.copytree(subject.whole, cache_dir)
    store = subject.folder(cache_dir)
    try:
        case.forge(store, outside)
        before = [sorted(cache_dir.iterdir()), contents(outside)]
        told: list[str] = []
        with hangs_are_noticed(), memory_stays_bounded():
            cache = subject.cache(cache_dir, warn=told.append)
            done = cache.materialize(2, subject.kind.codec)
            found = everything(cache)
            saved = cache.saved_seconds
            cache.close()
        fate = LEFT
        if done is not None:
            fate = (MENDED if told else TAKEN) if done.reused else REFUSED
        assert same(found, subject.computed if fate == LEFT else subject.served)
        assert fate <= case.fates, told
        assert len(told) == (fate != TAKEN)
        assert all(len(sentence) < 400 for sentence in told)
        assert math.isfinite(saved)
        assert [sorted(cache_dir.iterdir()), contents(outside)] == before
        assert sorted(tmp_path.iterdir()) == [cache_dir, outside]
        if fate != LEFT:
            assert as_zarr_reads(store) == subject.arrays
        if case.forge is become_the_folder_of_others:
            assert (store / "thesis.txt").read_text() == "mine"
    finally:
        remove_deep_folders(tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_forged_store_is_told_by_whoever_looks_at_the_cache(
    subjects: dict[str, Subject],
    tmp_path: Path,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    look = runpy.run_path(str(SCRIPT))["main"]
    cache_dir, outside = tmp_path / "cache", tmp_path / "outside"
    outside.mkdir()
    shutil.copytree(subjects[case.kind].whole, cache_dir)
    try:
        case.forge(Subject.folder(cache_dir), outside)
        before = contents(outside)
        codes = []
        for option in ("--verify", "--json"):
            monkeypatch.setattr(sys, "argv", ["", str(cache_dir), "--verify", option])
            with hangs_are_noticed(), memory_stays_bounded():
                codes.append(look())
            said = capsys.readouterr()
            # No name of a store's own making goes to a terminal as it is.
            assert said.out.replace("\n", "").isprintable()
            assert len(said.out) < 5000 or case.name.startswith("details")
            assert said.err == ""
        if case.visible and not case.fates & (TAKEN | LEFT):
            assert codes == [1, 1]
            (store,) = json.loads(said.out)["stores"]
            assert store["state"] == "damaged"
            assert store["damage"]
        assert set(codes) <= {0, 1}
        assert contents(outside) == before
    finally:
        remove_deep_folders(tmp_path)


@pytest.mark.parametrize("option", ["--verify", "--json"])
def test_a_cache_full_of_forged_stores_can_be_looked_at_in_one_go(
    subjects: dict[str, Subject], tmp_path: Path, option: str
) -> None:
    prepare_cache_dir(tmp_path / "cache")
    (tmp_path / "outside").mkdir()
    try:
        for number, case in enumerate(CASES):
            store = tmp_path / "cache" / f"{number:032x}"
            shutil.copytree(Subject.folder(subjects[case.kind].whole), store)
            about(lambda found, name=store.name: found.update(fingerprint=name))(store, tmp_path)
            outside = tmp_path / "outside" / store.name
            outside.mkdir()
            case.forge(store, outside)
        before = contents(tmp_path / "outside")
        result = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path / "cache"), "--verify", option],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.stderr == ""
        assert result.returncode == 1
        assert result.stdout.count("\n") > len(CASES)
        assert contents(tmp_path / "outside") == before
    finally:
        remove_deep_folders(tmp_path)


@contextmanager
def memory_stays_bounded() -> Iterator[None]:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_memory()
    yield
    assert peak_memory() - before < MOST_MEMORY


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def remove_deep_folders(folder: Path) -> None:
    # As `shutil.rmtree` cannot, before Python 3.12.
    for deep in folder.rglob("d/d"):
        subprocess.run(["rm", "-rf", str(deep)], check=True)
        break
