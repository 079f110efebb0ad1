"""What is known of items by their numbers: hashes of what is large, and all that is small."""

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
from cachefreeze.keys import SMALL, Description, rows_hashed
from cachefreeze.keys.bits import bits_of
from cachefreeze.store.files import write_atomically

Tensor = torch.Tensor
# Bytes of all small parts of a data set's items together.
_MOST_SMALL = 1 << 28
# Items of which something is known are kept in a file of this layout.
_VERSION = 1
_DTYPES = {
    str(one): one
    for one in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    )
}  # fmt: skip


class NotByRowsError(Exception):
    """A batch cannot be put together from its rows. The message says why, to follow "its items"."""


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a list of strings, in a batch.

    Attributes:
        dtype: Name of its type. Empty for strings.
        shape: Shape of a row.
        channels_last: Whether it lies so in memory.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @functools.cached_property
    def is_large(self) -> bool:
        """Whether only its hash is kept."""
        return bool(self.dtype) and self.row_bytes > SMALL

    def like(self, rows: int) -> Tensor:
        """Returns a tensor of its kind without values."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        shape = (rows, *self.shape)
        return torch.empty(shape, dtype=_DTYPES[self.dtype], device="meta", memory_format=form)

    def made_of(self, rows: Tensor) -> Tensor:
        """Returns a batch.

        Args:
            rows: Bytes of its rows, of shape (rows, bytes), on a buffer of their own.
        """
        dtype, shape = _DTYPES[self.dtype], (len(rows), *self.shape)
        made = rows.reshape(-1).view(dtype).reshape(shape)
        return made.contiguous(memory_format=torch.channels_last) if self.channels_last else made


# A batch with the places of its tensors in the place of them.
Structure = Any


def take_apart(batch: Any, rows: int) -> tuple[Structure, list[Leaf], list[Any]]:
    """Finds the tensors, and lists of strings, in a batch.

    Args:
        batch: Batch, as it was collated.
        rows: Number of its rows.

    Raises:
        NotByRowsError: something in it has no row for each item.
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
                raise NotByRowsError("have strings that are not one for each item")
            leaves.append(Leaf(""))
            values.append(list(value))
            return (type(value), len(leaves) - 1)
        if type(value) in (list, tuple):
            return [type(value), *map(walk, value)]
        raise NotByRowsError(f"have a {type(value).__name__} in them")

    return walk(batch), leaves, values


def put_together(structure: Structure, values: Mapping[int, Any]) -> Any:
    """Returns a batch.

    Args:
        structure: Batch with the places of its tensors.
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
        raise NotByRowsError(f"have a {type(value).__name__} of a kind of its own in them")
    if value.requires_grad or str(value.dtype) not in _DTYPES or value.device.type != "cpu":
        raise NotByRowsError("have a tensor with gradient, of a rare type or on a device in them")
    if not value.dim() or len(value) != rows:
        raise NotByRowsError("have a tensor in them that has not a row for each item")
    channels_last = False
    if not value.is_contiguous():
        channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            raise NotByRowsError("have a tensor in them that does not lie in the order of its rows")
    return Leaf(str(value.dtype), tuple(value.shape[1:]), channels_last)


class Binding:
    """What is known of the items of a data set.

    Args:
        description: What the data set holds.
        count: Number of its items.
        name: Name of the data set, for people.

    Attributes:
        description: What the data set holds, if its digest means something only as long as that
            lives.
        off: Why items are loaded always, to follow a name. Empty if they are not.
        structure: Batch with the places of its tensors. None until one was loaded.
        leaves: Tensors, and lists of strings, in a batch.
        known: Whether each item is known.
        grown: Whether something is known that is not in the file.
        portable: Whether what is known holds for other processes.
    """

    def __init__(self, description: Description, count: int, name: str) -> None:
        self.digest = description.digest
        self.description = None if description.portable else description
        self.portable = description.portable and description.only_python
        self.name = name
        self.off = ""
        self.structure: Structure = None
        self.leaves: list[Leaf] = []
        self.known = np.zeros(count, dtype=bool)
        self.grown = False
        self._kept: list[Any] = []
        self._files: list[Files] = [()] * count

    def turn_off(self, why: str) -> None:
        """Has all items loaded from now on.

        Args:
            why: Reason, to follow "its items".
        """
        self.off = self.off or why
        self.known[:] = False
        self._kept, self._files = [], []

    @property
    def large(self) -> list[int]:
        """Places of the parts that are known by their hashes."""
        return [place for place, leaf in enumerate(self.leaves) if leaf.is_large]

    def bind(self, indices: Sequence[int], batch: Any, files: Sequence[Files | None]) -> list[int]:
        """Notes what items are.

        Args:
            indices: Their numbers.
            batch: Batch that was made of them.
            files: Files that each was read from, or None where that is not known.

        Returns:
            Numbers of those that are others than before.

        Raises:
            NotByRowsError: The batch cannot be put together from its rows.
        """
        structure, leaves, values = take_apart(batch, len(indices))
        if not self.leaves:
            self._begin(structure, leaves)
        elif (structure, leaves) != (self.structure, self.leaves):
            raise NotByRowsError("have other shapes or types from batch to batch")
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
        """Returns the numbers of those items that are others than is known.

        Args:
            indices: Numbers of known items.
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
            raise NotByRowsError(f"have nothing in them that is larger than {SMALL} bytes")
        if small * count > _MOST_SMALL:
            raise NotByRowsError("have too many small parts")
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
        """Returns the hashes of the rows of each large part, by its place."""
        return {place: self._kept[place][indices] for place in self.large}

    def small(self, indices: np.ndarray) -> dict[int, Any]:
        """Returns the small parts of a batch, each on a buffer of its own, by their places."""
        chosen = torch.from_numpy(indices)
        return {
            place: leaf.made_of(torch.from_numpy(kept).index_select(0, chosen))
            if leaf.dtype
            else [kept[index] for index in indices]
            for place, (leaf, kept) in enumerate(zip(self.leaves, self._kept, strict=True))
            if not leaf.is_large
        }

    def forget_changed(self, indices: np.ndarray) -> bool:
        """Forgets those items of a batch whose files are not as they were.

        Returns:
            Whether there were such.
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

    # In a file, for other processes.

    def save(self, folder: Path) -> None:
        """Keeps what is known for other processes.

        Args:
            folder: Folder of the files.
        """
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
        """Takes what another process knew of the same data set, if it did.

        Args:
            folder: Folder of the files.
        """
        path = self._path(folder)
        if not self.portable or self.off or not path.is_file():
            return
        try:
            with np.load(path, allow_pickle=False) as found:
                self._take({name: found[name] for name in found.files})
        except Exception:  # damaged, or of another version: items are loaded
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
        """Removes what other processes would take."""
        self._path(folder).unlink(missing_ok=True)


def _as_json(structure: Structure) -> Any:
    """Returns a structure as plain JSON, or None if that cannot say it."""
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
