"""`python -m tests.chaos.fuzz [N] [--seed S]`: damage stores at random, and compare what is served.

Every damage is done to a fresh copy of a store, committed or half written, on which a new
`PrefixCache` is then opened. Prints how often each kind of damage was harmless, mended, or cost the
store; exits with 1 if a wrong row was served, an exception escaped, or damage was passed over.
Damage number n of seed S is damage 0 of seed S + n.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs.checksum32 import CRC32C
from torch import Tensor

from cachefreeze import PrefixCache, batches_of, partition
from cachefreeze.data import ArrayImages, InputRows
from cachefreeze.errors import Interrupted
from cachefreeze.models import build
from cachefreeze.report.summary_text import format_table
from cachefreeze.store import Description, codec_for, store_folders
from cachefreeze.store import format as store_format

BATCH = 8
ROWS = {"train": 41, "val": 13}
ORDERS = {split: np.random.default_rng(0).permutation(rows) for split, rows in ROWS.items()}
# So that these few rows make several chunks.
CHUNK_BYTES = 2**14
PAGE = 4096
# Batches of 6 and 2 after which a run was killed: in the first split, in the second, at the end.
KILLED_AFTER = (4, 7, 8)
# Of the damages: every so many is one of a half-written store.
HALF_WRITTEN = 4
HANGS_SECONDS = 10
HARMLESS, MENDED, ANEW, GONE_ON, REFUSED, WRONG = OUTCOMES = (
    "harmless",
    "mended",
    "made anew",
    "gone on with",
    "not cached",
    "WRONG",
)


class Hang(BaseException):
    """No OSError, which would be taken for one of the disk's."""


@dataclass(frozen=True)
class Kind:
    """A kind of store: what it holds, and how. Images of `size` pixels square."""

    name: str
    boundary: int = 2
    codec: str = "raw"
    autocast_dtype: torch.dtype | None = None
    stored: str | None = None
    size: int = 8


KINDS = (
    Kind("float32"),
    Kind("bfloat16", autocast_dtype=torch.bfloat16),
    Kind("zstd", codec="zstd"),
    Kind("lz4", codec="lz4", autocast_dtype=torch.bfloat16),
    Kind("int8", stored="int8"),
    Kind("int8 zstd", codec="zstd", stored="int8"),
    Kind("pixels", boundary=0, size=16),
)


class Subject:
    """Stores of one kind that nobody has touched.

    Attributes:
        whole, other: cache folders with a committed store each, `other` of other images.
        halves: cache folders with a store whose run was killed while filling it.
        served, computed: all rows, from the store and without one.
        arrays: what zarr reads, by split.
    """

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        torch.manual_seed(0)
        self.units = partition(build("wrn", 3, depth=10, width=1))
        self.units.freeze(kind.boundary)
        self.images = {seed: self._inputs(seed) for seed in (1, 2)}
        self.computed = everything(self.cache(None))
        self.whole, self.other = folder / "whole", folder / "other"
        for directory, seed in ((self.whole, 1), (self.other, 2)):
            cache = self.cache(directory, seed=seed)
            assert cache.materialize(kind.boundary, kind.codec) is not None
            if seed == 1:
                self.served = everything(cache)
                self.arrays = as_zarr_reads(self.folder(directory))
                assert cache.store is not None
                self.description: Description = cache.store.description
            cache.close()
        assert kind.stored or same(self.served, self.computed)
        self.halves = [folder / f"half{batches}" for batches in KILLED_AFTER]
        for directory, batches in zip(self.halves, KILLED_AFTER, strict=True):
            self._kill(directory, batches)

    @staticmethod
    def folder(directory: Path) -> Path:
        """The one store of a cache folder."""
        (store,) = store_folders(directory)
        return store

    def cache(
        self,
        directory: Path | None,
        warn: Callable[[str], None] = print,
        stopping: Callable[[], bool] = lambda: False,
        seed: int = 1,
    ) -> PrefixCache:
        return PrefixCache(
            self.units,
            self.images[seed],
            batch_size=BATCH,
            autocast_dtype=self.kind.autocast_dtype,
            directory=directory,
            stored=self.kind.stored,
            warn=warn,
            stopping=stopping,
        )

    def _inputs(self, seed: int) -> dict[str, InputRows]:
        generator = np.random.default_rng(seed)
        inputs = {}
        for split, rows in ROWS.items():
            pixels = generator.integers(0, 256, (rows, self.kind.size, self.kind.size, 3), np.uint8)
            images = ArrayImages(pixels, np.zeros(rows, np.int64))
            inputs[split] = InputRows(images, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
        return inputs

    def _kill(self, directory: Path, batches: int) -> None:
        left = batches

        def stopping() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        cache = self.cache(directory, stopping=stopping)
        try:
            cache.materialize(self.kind.boundary, self.kind.codec)
        except Interrupted:
            assert (self.folder(directory) / "journal").exists()
        else:
            raise AssertionError("it was to be killed before the end")


def everything(cache: PrefixCache) -> dict[str, Tensor]:
    """All rows at the frontier, in shuffled batches."""
    return {
        split: torch.cat(list(cache.batches(split, batches_of(order, BATCH))))
        for split, order in ORDERS.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the last bit, and of one type."""
    return all(
        one[split].dtype == other[split].dtype
        and torch.equal(*(x[split].contiguous().view(torch.uint8) for x in (one, other)))
        for split in ROWS
    )


def as_zarr_reads(store: Path) -> dict[str, bytes]:
    group = zarr.open_group(store, mode="r")
    return {split: group[split][:].tobytes() for split in ROWS}  # type: ignore[index,union-attr]


@dataclass
class Scene:
    """A copy of a store that may be damaged.

    Attributes:
        store: its folder.
        outside: a folder that is none of the cache's.
        what: was damaged, for people.
    """

    subject: Subject
    store: Path
    outside: Path
    dice: random.Random
    what: list[str] = field(default_factory=list)

    def file(self, least: int = 0) -> Path:
        """Any file of at least so many bytes, as often a chunk as another."""
        files = sorted(path for path in self.store.rglob("*") if path.is_file())
        files = [path for path in files if path.stat().st_size >= least]
        chunks = self.dice.random() < 0.5
        some = [path for path in files if path.name.startswith("c.") == chunks]
        return self.noted(self.dice.choice(some or files))

    def chunks(self, split: str = "*") -> list[Path]:
        return sorted(self.store.glob(f"{split}/c.*"))

    def noted(self, path: Path) -> Path:
        self.what.append(str(path.relative_to(self.store)))
        return path


# A damage to a store; False if it is none that this store can have.
DamageTo = Callable[[Scene], bool]


def flip_a_bit(scene: Scene) -> bool:
    return _flip(scene, 1)


def flip_many_bits(scene: Scene) -> bool:
    return all(_flip(scene, scene.dice.randint(1, 20)) for _ in range(scene.dice.randint(1, 3)))


def _flip(scene: Scene, bits: int) -> bool:
    path = scene.file(least=1)
    content = bytearray(path.read_bytes())
    # No bit twice: it would be as it was.
    for bit in scene.dice.sample(range(8 * len(content)), min(bits, 8 * len(content))):
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return True


def cut_short(scene: Scene) -> bool:
    path = scene.file(least=1)
    os.truncate(path, scene.dice.randrange(path.stat().st_size))
    return True


def make_longer(scene: Scene) -> bool:
    with scene.file().open("ab") as file:
        file.write(scene.dice.randbytes(scene.dice.choice([1, 4, 100, 5000])))
    return True


def delete_a_file(scene: Scene) -> bool:
    scene.file().unlink()
    return True


def swap_chunks(scene: Scene) -> bool:
    return _swap(scene, scene.chunks("train"))


def swap_between_splits(scene: Scene) -> bool:
    train, val = scene.chunks("train"), scene.chunks("val")
    if not train or not val:
        return False
    return _swap(scene, [scene.dice.choice(train), scene.dice.choice(val)])


def _swap(scene: Scene, among: list[Path]) -> bool:
    if len(among) < 2:
        return False
    one, two = map(scene.noted, scene.dice.sample(among, 2))
    contents = one.read_bytes(), two.read_bytes()
    # Sizes that differ are found without looking at a byte.
    if contents[0] == contents[1] or (len(contents[0]) != len(contents[1]) and _is_raw(scene)):
        return False
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    return True


def _is_raw(scene: Scene) -> bool:
    return scene.subject.kind.codec == "raw"


def copy_a_chunk_over_another(scene: Scene) -> bool:
    if len(chunks := scene.chunks()) < 2:
        return False
    one, two = map(scene.noted, scene.dice.sample(chunks, 2))
    shutil.copyfile(one, two)
    return True


def take_a_file_from_another_store(scene: Scene) -> bool:
    path = scene.file(least=1)
    other = scene.subject.folder(scene.subject.other) / path.relative_to(scene.store)
    if not other.exists():
        return False
    shutil.copyfile(other, path)
    return True


def take_a_split_from_another_store(scene: Scene) -> bool:
    split = scene.dice.choice(list(ROWS))
    shutil.rmtree(scene.noted(scene.store / split))
    shutil.copytree(scene.subject.folder(scene.subject.other) / split, scene.store / split)
    return True


def fill_a_page_with_zeros(scene: Scene) -> bool:
    path = scene.file(least=1)
    content = bytearray(path.read_bytes())
    start = scene.dice.randrange(-(-len(content) // PAGE)) * PAGE
    length = len(content[start : start + PAGE])
    content[start : start + PAGE] = bytes(length)
    path.write_bytes(content)
    return True


def write_other_rows_with_their_checksum(scene: Scene) -> bool:
    """Only the manifest can tell."""
    if not (chunks := scene.chunks()):
        return False
    path = scene.noted(scene.dice.choice(chunks))
    layout = scene.subject.description.splits[path.parent.name]
    rows = np.frombuffer(bytearray(scene.dice.randbytes(layout.chunk_bytes)), layout.dtype)
    content = codec_for(layout.codec, layout.dtype).encode(rows)
    if layout.codec == "raw":
        content = np.frombuffer(path.read_bytes()[:-4], np.uint8).copy()
        content[scene.dice.randrange(len(content))] ^= 1 << scene.dice.randrange(8)
    path.write_bytes(content.tobytes() + CRC32C.checksum(content).to_bytes(4, "little"))
    return True


def edit_metadata(scene: Scene) -> bool:
    return _edit(scene, set()) is not None


def edit_metadata_and_sign(scene: Scene) -> bool:
    """As whoever may write to the cache can. Some edits then make another store, as valid as the
    first: what the elements mean is left alone."""
    about = ("attributes", "cachefreeze")
    path = _edit(scene, {(*about, "values"), (*about, "quantization")})
    if path is not None:
        sign(scene.store)
    return path is not None


def _edit(scene: Scene, spared: set[tuple[object, ...]]) -> Path | None:
    files = ["zarr.json", "train/zarr.json", "val/zarr.json", "manifest.json"]
    files = [name for name in files if (scene.store / name).exists()]
    path = scene.noted(scene.store / scene.dice.choice(files))
    before = path.read_text()
    content = json.loads(before)
    places = [
        (where, inside, key)
        for where, inside, key in _places(content)
        if not any(where[: len(each)] == each for each in spared)
    ]
    where, inside, key = scene.dice.choice(places)
    scene.what.append("/".join(map(str, where)))
    _change(inside, key, scene.dice)
    if content == json.loads(before):
        return None
    path.write_text(json.dumps(content))
    return path


def _places(
    value: Any, where: tuple[object, ...] = ()
) -> Iterator[tuple[tuple[object, ...], Any, Any]]:
    """Every value below: its path, and where it is kept under which key or number."""
    below = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in below:
        yield (*where, key), value, key
        if isinstance(item, dict | list):
            yield from _places(item, (*where, key))


def _change(inside: Any, key: Any, dice: random.Random) -> None:
    value = inside[key]
    how = dice.choice(["drop", "insert", "duplicate", "type", "value", "value", "value"])
    if how == "drop":
        del inside[key]
    elif how in ("insert", "duplicate"):
        added = value if how == "duplicate" else dice.choice([None, 0, -1, "x", [], {}])
        if isinstance(inside, list):
            inside.insert(key, added)
        else:
            inside[f"{key}_"] = added
    elif how == "value" and type(value) in (int, float):
        other = [value + 1, value - 1, -value, 2 * value, value + 0.5, 0, 1, 2**31, 2**39, 2**64]
        inside[key] = dice.choice([*other, 10.0**300, float("nan"), float("inf")])
    elif how == "value" and isinstance(value, str):
        other = [value[:-1], value + "x", value.upper(), value[::-1], "", "../x", "/", "\0"]
        other += ["\ud800", "x" * 5000, "f" * 32, "float16", "uint16", "int8", "zstd", "blosc"]
        inside[key] = dice.choice(other)
    else:
        other = [None, True, False, 0, 1, -1, 0.5, "", "x", [], {}, [value], {"x": value}]
        inside[key] = dice.choice([*other, str(value)])


def sign(store: Path) -> None:
    """Make checksums and marker agree with what the metadata say now."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    if isinstance(manifest, dict) and isinstance(listed := manifest.get("sha256"), dict):
        for name in listed:
            if (store / name).is_file():
                listed[name] = hashlib.sha256((store / name).read_bytes()).hexdigest()
        path.write_text(json.dumps(manifest))
    (store / "COMMITTED").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def put_a_folder_instead(scene: Scene) -> bool:
    path = scene.file()
    path.unlink()
    path.mkdir()
    if scene.dice.random() < 0.5:
        (path / "file").write_text("mine")
    return True


def put_a_link_instead(scene: Scene) -> bool:
    path = scene.file()
    path.rename(scene.outside / path.name)
    path.symlink_to(scene.outside / path.name)
    return True


def put_a_pipe_instead(scene: Scene) -> bool:
    path = scene.file()
    path.unlink()
    os.mkfifo(path)
    return True


def put_a_link_to_a_split_instead(scene: Scene) -> bool:
    path = scene.noted(scene.store / scene.dice.choice(list(ROWS)))
    path.rename(scene.outside / path.name)
    path.symlink_to(scene.outside / path.name)
    return True


def remove_a_split(scene: Scene) -> bool:
    shutil.rmtree(scene.noted(scene.store / scene.dice.choice(list(ROWS))))
    return True


def add_foreign_files(scene: Scene) -> bool:
    names = ["notes.txt", "c.99.0.0.0", "train/c.99.0.0.0", "val/c.0.0.0.0.7.partial", ".zgroup"]
    names += ["val/.zarray", "manifest.json.7.partial", "test/zarr.json", "train/c/0", "x/y/z"]
    names += ["journal", "COMMITTED", "train/journal"]
    for name in scene.dice.sample(names, 3):
        path = scene.store / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        how = scene.dice.choice(["file", "folder", "link", "pipe"])
        scene.noted(path)
        if how == "file":
            path.write_bytes(scene.dice.randbytes(100))
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(scene.outside)
        else:
            os.mkfifo(path)
    return True


def edit_the_journal(scene: Scene) -> bool:
    path, dice = scene.store / "journal", scene.dice
    lines = path.read_text().splitlines()
    place = dice.randrange(len(lines))
    words = lines[place].split()
    how = dice.choice(["drop", "duplicate", "swap", "number", "insert", "end"])
    scene.what.append(f"journal: {how} {place}")
    if how == "drop":
        del lines[place]
    elif how == "duplicate":
        lines.insert(dice.randrange(len(lines) + 1), lines[place])
    elif how == "swap":
        other = dice.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    elif how == "number":
        number = dice.randrange(1, len(words))
        words[number] = str(dice.choice([0, 1, 4, int(words[number]) + 1, 2**32, 10**11, 10**30]))
        lines[place] = " ".join(words)
    elif how == "insert":
        lines.insert(place, dice.choice(["", "\0", "x", "val 0 0 0", "train 0 0 4", "../x 0 0 0"]))
    elif words[0] == "train":
        # Chunks that were never written, as if they had been.
        lines.append(" ".join(["train", str(len(lines)), *words[2:]]))
    path.write_text("\n".join(lines) + dice.choice(["\n", "", "\ntrain 1"]))
    return True


DAMAGES: dict[str, DamageTo] = {
    "one bit flipped": flip_a_bit,
    "many bits flipped": flip_many_bits,
    "cut short": cut_short,
    "made longer": make_longer,
    "file deleted": delete_a_file,
    "chunks swapped": swap_chunks,
    "swapped between splits": swap_between_splits,
    "chunk over another": copy_a_chunk_over_another,
    "file of another store": take_a_file_from_another_store,
    "split of another store": take_a_split_from_another_store,
    "page of zeros": fill_a_page_with_zeros,
    "other rows, own checksum": write_other_rows_with_their_checksum,
    "metadata edited": edit_metadata,
    "folder instead of file": put_a_folder_instead,
    "link instead of file": put_a_link_instead,
    "pipe instead of file": put_a_pipe_instead,
    "link instead of split": put_a_link_to_a_split_instead,
    "split removed": remove_a_split,
    "foreign files": add_foreign_files,
}
COMMITTED = DAMAGES | {"metadata edited and signed": edit_metadata_and_sign}
HALF = DAMAGES | {"journal edited": edit_the_journal}


@dataclass(frozen=True)
class Result:
    """What came of one damage; `problem` is empty if all was well."""

    number: int
    kind: str
    damage: str
    what: str
    half_written: bool
    outcome: str
    problem: str

    def __str__(self) -> str:
        state = "half-written " if self.half_written else ""
        return f"{self.number}: {state}{self.kind}, {self.damage} ({self.what}): {self.problem}"


class Fuzzer:
    """Damages copies of stores of all kinds, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.subjects = [Subject(kind, folder / kind.name) for kind in KINDS]

    def run(self, numbers: Iterable[int], seed: int) -> Iterator[Result]:
        for number in numbers:
            yield self._damage(number, random.Random(seed + number))

    def _damage(self, number: int, dice: random.Random) -> Result:
        half_written = dice.randrange(HALF_WRITTEN) == 0
        subject = dice.choice(self.subjects)
        pristine = dice.choice(subject.halves) if half_written else subject.whole
        work = self.folder / "work"
        done = False
        while not done:
            shutil.rmtree(work, ignore_errors=True)
            (work / "outside").mkdir(parents=True)
            shutil.copytree(pristine, work / "cache")
            scene = Scene(subject, subject.folder(work / "cache"), work / "outside", dice)
            damage = dice.choice(list(HALF if half_written else COMMITTED))
            done = (HALF | COMMITTED)[damage](scene)
        outside = snapshot(scene.outside)
        open_files = len(os.listdir("/proc/self/fd"))
        outcome, problem = WRONG, ""
        try:
            with hangs_are_noticed():
                outcome, problem = judge(scene, pristine, half_written)
            if snapshot(scene.outside) != outside:
                problem = "what is outside the cache was changed"
            # (Fewer are open if what else ran in this process is only let go of now.)
            elif (left := len(os.listdir("/proc/self/fd")) - open_files) > 0 and not problem:
                problem = f"{left} files were left open"
        except Hang as hang:
            problem = f"it hangs\n{_last_lines(hang)}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}\n{_last_lines(error)}"
        what = ", ".join(scene.what)
        if problem:
            outcome = WRONG
        return Result(number, subject.kind.name, damage, what, half_written, outcome, problem)


def _last_lines(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-3:])


def judge(scene: Scene, pristine: Path, half_written: bool) -> tuple[str, str]:
    """What a new cache makes of a damaged store, and what is wrong with that, if anything."""
    subject, kind = scene.subject, scene.subject.kind
    hurt = changed_chunks(scene.store, subject.folder(pristine))
    told: list[str] = []
    cache = subject.cache(scene.store.parent, warn=told.append)
    done = cache.materialize(kind.boundary, kind.codec)
    found = everything(cache)
    store = cache.store
    damaged = [] if store is None else list(store.damage())
    cache.close()
    if done is None:
        outcome = REFUSED
    elif not done.reused:
        outcome = GONE_ON if done.held else ANEW
    else:
        outcome = MENDED if told else HARMLESS
    # Rows that are kept as int8 are others than those that are computed.
    right = subject.computed if done is None else subject.served
    if not same(found, right):
        return outcome, "WRONG ROWS were served"
    if damaged:
        return outcome, f"still damaged: {damaged[0]}"
    if hurt and not told and not half_written:
        return outcome, f"{hurt} was changed, and nobody was told"
    if done is None and not told:
        return outcome, "not cached, and nobody was told"
    if outcome == MENDED and "computed and written once more" not in told[0]:
        return outcome, f"not mended: {told}"
    if len(told) > 2 or any(len(each) > 300 or not each.isprintable() for each in told):
        return outcome, f"told too much: {told}"
    if outcome != HARMLESS and done is not None:
        again: list[str] = []
        cache = subject.cache(scene.store.parent, warn=again.append)
        second = cache.materialize(kind.boundary, kind.codec)
        cache.close()
        if second is None or not second.reused or again:
            return outcome, f"not whole afterwards: {again}"
        try:
            if as_zarr_reads(scene.store) != subject.arrays:
                return outcome, "zarr reads other rows"
        except Exception as error:
            return outcome, f"zarr cannot read it: {type(error).__name__}: {error}"
    return outcome, ""


def changed_chunks(store: Path, pristine: Path) -> str:
    """The first chunk that is not what was written, or nothing."""
    for whole in sorted(pristine.glob("*/c.*")):
        name = whole.relative_to(pristine)
        path = store / name
        if path.is_symlink() or not path.is_file() or path.read_bytes() != whole.read_bytes():
            return str(name)
    return ""


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """What is in a folder: kinds of files, contents, and when they were written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


@contextmanager
def hangs_are_noticed() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, HANGS_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tables(results: Iterable[Result]) -> list[str]:
    """How often each kind of damage had which outcome."""
    counts: dict[bool, dict[str, Counter[str]]] = {False: {}, True: {}}
    for result in results:
        of_kind = counts[result.half_written].setdefault(result.damage, Counter())
        of_kind[result.outcome] += 1
    lines = []
    for half_written, title in ((False, "committed stores"), (True, "half-written stores")):
        by_damage = dict(sorted(counts[half_written].items()))
        if not by_damage:
            continue
        by_damage["all"] = sum(by_damage.values(), Counter())
        outcomes = [each for each in OUTCOMES if by_damage["all"][each]]
        rows = [
            [damage, str(count.total()), *(str(count[each] or "") for each in outcomes)]
            for damage, count in by_damage.items()
        ]
        header = [title, "times", *outcomes]
        lines += format_table([header, *rows], right=range(1, len(header)))
        lines.append("")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("damages", type=int, nargs="?", default=2000, help="default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the first damage")
    args = parser.parse_args()
    store_format.CHUNK_BYTES = CHUNK_BYTES
    results = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        for result in Fuzzer(Path(name)).run(range(args.damages), args.seed):
            results.append(result)
            if result.problem:
                print(result, flush=True)
    print("\n".join(tables(results)))
    wrong = sum("WRONG ROWS" in result.problem for result in results)
    others = sum(bool(result.problem) for result in results) - wrong
    print(f"served wrong: {wrong}; other failures: {others}")
    return 1 if wrong or others else 0


if __name__ == "__main__":
    sys.exit(main())
