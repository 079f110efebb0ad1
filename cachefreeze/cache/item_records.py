"""Records of a data set's items, by number: hashes of large parts, and all small parts."""

import functools
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachefreeze.cache.fetching import Files, Stamp, stamp_of
from cachefreeze.keys import SMALL, Fingerprint, rows_hashed
from cachefreeze.keys.bits import bits_of
from cachefreeze.store.files import human_bytes, write_atomically

Tensor = torch.Tensor
# Largest number of bytes of the small parts of all items together.
_MOST_SMALL = 1 << 28
# Version of the file format of records.
_VERSION = 1
_DTYPES = {
    str(one): one
    for one in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    )
}  # fmt: skip


class NotByRowsError(Exception):
    """A batch cannot be put together from rows. The message is a reason to follow "its items"."""


@dataclass(frozen=True)
class Leaf:
    """Kind of one tensor, or of one list of strings, in a batch.

    Attributes:
        dtype: Name of the dtype. Empty for strings.
        shape: Shape of a row.
        channels_last: Whether a batch is in `torch.channels_last` format.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        """Number of bytes of a row."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @functools.cached_property
    def is_large(self) -> bool:
        """Whether only hashes of its rows are kept."""
        return bool(self.dtype) and self.row_bytes > SMALL

    def like(self, rows: int) -> Tensor:
        """Returns a batch of this kind on the meta device, without values."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (rows, *self.shape)
        return torch.empty(shape, dtype=_DTYPES[self.dtype], device="meta", memory_format=form)

    def made_of(self, rows: Tensor) -> Tensor:
        """Returns a batch of this kind.

        Args:
            rows: Bytes of its rows, of shape (rows, bytes). They become the memory of the batch.
        """
        dtype, shape = _DTYPES[self.dtype], (len(rows), *self.shape)
        made = rows.reshape(-1).view(dtype).reshape(shape)
        return made.contiguous(memory_format=torch.channels_last) if self.channels_last else made


# A batch in which each tensor, or list of strings, is replaced by its place in the list of leaves.
Structure = Any


def take_apart(batch: Any, rows: int) -> tuple[Structure, list[Leaf], list[Any]]:
    """Finds the tensors, and the lists of strings, in a batch.

    Args:
        batch: Batch, as the collate function returned it.
        rows: Number of its rows.

    Returns:
        Structure of the batch, and kinds and values of its leaves.

    Raises:
        NotByRowsError: A part of the batch does not have one row for each item.
    """
    leaves: list[Leaf] = []
    values: list[Any] = []

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            leaves.append(_leaf(value, rows))
            values.append(value)
            return len(leaves) - 1
        if type(value) is dict:
            return {key: walk(one) for key, one in value.items()}
        if type(value) in (list, tuple) and value and all(type(one) is str for one in value):
            if len(value) != rows:
                raise NotByRowsError("have a list of strings that has not one string for each item")
            leaves.append(Leaf(""))
            values.append(list(value))
            return (type(value), len(leaves) - 1)
        if type(value) in (list, tuple):
            return [type(value), *map(walk, value)]
        raise NotByRowsError(f"contain a {type(value).__name__}")

    return walk(batch), leaves, values


def put_together(structure: Structure, values: Mapping[int, Any]) -> Any:
    """Returns a batch made of leaves.

    Args:
        structure: Structure of the batch.
        values: Tensors, and lists of strings, by their places.
    """
    if isinstance(structure, int):
        return values[structure]
    if isinstance(structure, dict):
        return {key: put_together(one, values) for key, one in structure.items()}
    if isinstance(structure, tuple):
        return structure[0](values[structure[1]])
    return structure[0](put_together(one, values) for one in structure[1:])


def _leaf(value: Tensor, rows: int) -> Leaf:
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_nested:
        raise NotByRowsError(f"contain a {type(value).__name__} that is not a plain dense tensor")
    if value.requires_grad or str(value.dtype) not in _DTYPES or value.device.type != "cpu":
        raise NotByRowsError(
            "contain a tensor that takes gradient, has a rare dtype or is not on the CPU"
        )
    if not value.dim() or len(value) != rows:
        raise NotByRowsError("contain a tensor that has not one row for each item")
    channels_last = False
    if not value.is_contiguous():
        channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            raise NotByRowsError("contain a tensor whose rows are not contiguous in memory")
    return Leaf(str(value.dtype), tuple(value.shape[1:]), channels_last)


class ItemRecords:
    """Records of the items of a data set.

    Args:
        fingerprint: Fingerprint of the data set.
        count: Number of its items.
        name: Name of the data set, for messages.

    Attributes:
        digest: Digest of the fingerprint.
        fingerprint: Fingerprint of the data set if its digest is valid only while it lives, or
            None.
        portable: Whether the records are valid in other processes.
        off: Reason why all items are always loaded, to follow "its items". Empty if there is none.
        structure: Structure of a batch. None until one was loaded.
        leaves: Kinds of the tensors, and of the lists of strings, in a batch.
        known: Whether each item has a record, of shape (count,).
        grown: Whether there are records that are not in the file yet.
    """

    def __init__(self, fingerprint: Fingerprint, count: int, name: str) -> None:
        self.digest = fingerprint.digest
        self.fingerprint = None if fingerprint.portable else fingerprint
        self.portable = fingerprint.portable and fingerprint.only_python
        self.name = name
        self.off = ""
        self.structure: Structure = None
        self.leaves: list[Leaf] = []
        self.known = np.zeros(count, dtype=bool)
        self.grown = False
        self._kept: list[Any] = []
        self._files: list[Files] = [()] * count

    def turn_off(self, why: str) -> None:
        """Drops all records. From now on all items are loaded."""
        self.off = self.off or why
        self.known[:] = False
        self._kept, self._files = [], []

    @property
    def large(self) -> list[int]:
        """Places of the leaves of which only hashes are kept."""
        return [place for place, leaf in enumerate(self.leaves) if leaf.is_large]

    def bind(self, indices: Sequence[int], batch: Any, files: Sequence[Files | None]) -> list[int]:
        """Records items of a batch.

        Args:
            indices: Numbers of the items.
            batch: Batch that was made of them.
            files: Files that each item was read from. None for an item whose files are not known.

        Returns:
            Numbers of the items that differ from their earlier record.

        Raises:
            NotByRowsError: The batch cannot be put together from its rows.
        """
        structure, leaves, values = take_apart(batch, len(indices))
        if not self.leaves:
            self._begin(structure, leaves)
        elif (structure, leaves) != (self.structure, self.leaves):
            raise NotByRowsError("have shapes or types that change from batch to batch")
        places = np.asarray(indices)
        told = self._told(values)
        sure = np.array([one is not None for one in files], dtype=bool)
        others = self._differ(places, told, np.flatnonzero(self.known[places]))
        for kept, one in zip(self._kept, told, strict=True):
            if isinstance(kept, list):
                for index, text in zip(indices, one, strict=True):
                    kept[index] = text
            else:
                kept[places] = one
        for index, read in zip(indices, files, strict=True):
            self._files[index] = read or ()
        self.known[places] = sure
        self.grown = True
        return others

    def differ(self, indices: Sequence[int], batch: Any) -> list[int]:
        """Returns the numbers of the items that differ from their record.

        Args:
            indices: Numbers of items that have a record.
            batch: Batch that was made of them now.
        """
        try:
            structure, leaves, values = take_apart(batch, len(indices))
        except NotByRowsError:
            return list(indices)
        if (structure, leaves) != (self.structure, self.leaves):
            return list(indices)
        return self._differ(np.asarray(indices), self._told(values), np.arange(len(indices)))

    def _differ(self, places: np.ndarray, told: Sequence[Any], rows: np.ndarray) -> list[int]:
        others: set[int] = set()
        for kept, one in zip(self._kept, told, strict=True):
            for row in rows:
                index = int(places[row])
                before = kept[index]
                same = before == one[row] if isinstance(kept, list) else (before == one[row]).all()
                if not same:
                    others.add(index)
        return sorted(others)

    def _begin(self, structure: Structure, leaves: list[Leaf]) -> None:
        count = len(self.known)
        small = sum(leaf.row_bytes for leaf in leaves if leaf.dtype and not leaf.is_large)
        if not any(leaf.is_large for leaf in leaves):
            raise NotByRowsError(f"have no part that is larger than {SMALL} bytes")
        if small * count > _MOST_SMALL:
            raise NotByRowsError(
                f"have small parts of more than {human_bytes(_MOST_SMALL)} together"
            )
        self.structure, self.leaves = structure, leaves
        self._kept = [
            ([""] * count if not leaf.dtype else np.zeros((count, 2), dtype=np.uint64))
            if not leaf.dtype or leaf.is_large
            else np.zeros((count, leaf.row_bytes), dtype=np.uint8)
            for leaf in leaves
        ]

    def _told(self, values: Sequence[Any]) -> list[Any]:
        return [
            value
            if not leaf.dtype
            else rows_hashed(value)
            if leaf.is_large
            else bits_of(value).numpy().reshape(len(value), -1)
            for leaf, value in zip(self.leaves, values, strict=True)
        ]

    def keys(self, indices: np.ndarray) -> dict[int, np.ndarray]:
        """Returns the hashes of the rows of each large leaf, by its place."""
        return {place: self._kept[place][indices] for place in self.large}

    def small(self, indices: np.ndarray) -> dict[int, Any]:
        """Returns the small leaves of a batch, by their places. Each has memory of its own."""
        chosen = torch.from_numpy(indices)
        return {
            place: leaf.made_of(torch.from_numpy(kept).index_select(0, chosen))
            if leaf.dtype
            else [kept[index] for index in indices]
            for place, (leaf, kept) in enumerate(zip(self.leaves, self._kept, strict=True))
            if not leaf.is_large
        }

    def forget_changed(self, indices: np.ndarray) -> bool:
        """Drops the records of items whose files have changed.

        Returns:
            Whether there are any such items.
        """
        seen: dict[str, Stamp] = {}
        changed = [
            index
            for index in indices
            for path, stamp in self._files[index]
            if (seen[path] if path in seen else seen.setdefault(path, stamp_of(path))) != stamp
        ]
        self.known[changed] = False
        return bool(changed)

    def save(self, folder: Path) -> None:
        """Writes the records to a file for other processes."""
        if not self.grown or not self.portable or self.off:
            return
        self.grown = False
        structure = _as_json(self.structure)
        if structure is None:
            return
        paths: dict[str, int] = {}
        counts, numbers, stamps = [], [], []
        for files in self._files:
            counts.append(len(files))
            for path, stamp in files:
                numbers.append(paths.setdefault(path, len(paths)))
                stamps.append(stamp or (-1, -1, -1, -1))
        about = {
            "version": _VERSION,
            "structure": structure,
            "leaves": [[leaf.dtype, leaf.shape, leaf.channels_last] for leaf in self.leaves],
            "paths": list(paths),
            "texts": [kept for kept in self._kept if isinstance(kept, list)],
        }
        arrays = {
            f"leaf{place}": kept
            for place, kept in enumerate(self._kept)
            if not isinstance(kept, list)
        }
        with io.BytesIO() as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode("utf-8", "surrogatepass"), np.uint8),
                known=self.known,
                counts=np.asarray(counts, dtype=np.int64),
                numbers=np.asarray(numbers, dtype=np.int64),
                stamps=np.asarray(stamps, dtype=np.int64).reshape(-1, 4),
                **arrays,
            )
            content = file.getvalue()
        folder.mkdir(exist_ok=True)
        write_atomically(self._path(folder), content)

    def load(self, folder: Path) -> None:
        """Reads the records that another process has made of the same data set, if any."""
        path = self._path(folder)
        if not self.portable or self.off or not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as found:
                self._take({name: found[name] for name in found.files})
        except Exception:  # the file is damaged or of another version, so items are loaded
            self.structure, self.leaves, self._kept = None, [], []
            self.known[:] = False
            self._files = [()] * len(self.known)

    def _take(self, found: dict[str, np.ndarray]) -> None:
        about = json.loads(found["about"].tobytes().decode("utf-8", "surrogatepass"))
        count = len(self.known)
        if about["version"] != _VERSION or len(found["known"]) != count:
            raise ValueError("of another version")
        leaves = [Leaf(dtype, tuple(shape), last) for dtype, shape, last in about["leaves"]]
        self._begin(_from_json(about["structure"]), leaves)
        texts = iter(about["texts"])
        for place, kept in enumerate(self._kept):
            if isinstance(kept, list):
                kept[:] = next(texts)
            else:
                kept[:] = found[f"leaf{place}"]
            if len(kept) != count:
                raise ValueError("of another size")
        files = self._pairs(about["paths"], found["numbers"], found["stamps"])
        self._files = [
            tuple(next(files) for _ in range(number)) for number in found["counts"].tolist()
        ]
        self.known[:] = found["known"]

    def _pairs(
        self, paths: list[str], numbers: np.ndarray, stamps: np.ndarray
    ) -> Iterator[tuple[str, Stamp]]:
        for number, stamp in zip(numbers.tolist(), stamps.tolist(), strict=True):
            yield paths[number], None if stamp[0] < 0 else (stamp[0], stamp[1], stamp[2], stamp[3])

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.digest.hex()}.npz"

    def remove(self, folder: Path) -> None:
        """Removes the file that other processes would read."""
        self._path(folder).unlink(missing_ok=True)


def _as_json(structure: Structure) -> Any:
    """Returns a structure as plain JSON, or None if JSON cannot express it."""
    if isinstance(structure, int):
        return structure
    if isinstance(structure, dict):
        parts = {key: _as_json(one) for key, one in structure.items()}
        wrong = any(type(key) is not str for key in parts) or None in parts.values()
        return None if wrong else {"dict": parts}
    kind, *rest = structure
    parts_of = [_as_json(one) for one in rest]
    text = "texts" if isinstance(structure, tuple) else "parts"
    return None if None in parts_of else {text: parts_of, "kind": kind.__name__}


def _from_json(value: Any) -> Structure:
    if isinstance(value, int):
        return value
    if "dict" in value:
        return {key: _from_json(one) for key, one in value["dict"].items()}
    kind = {"list": list, "tuple": tuple}[value["kind"]]
    if "texts" in value:
        return (kind, value["texts"][0])
    return [kind, *map(_from_json, value["parts"])]
