"""Finds the place of a key: arrays in the place of a dict, which costs 150 bytes a key."""

import numpy as np

_EMPTY = -1
# Buckets that are looked at together.
_WINDOW = np.arange(8)


class Index:
    """Places of 128-bit keys, as a hash table with open addressing in numpy's arrays.

    It costs 16 bytes a key, and 8 to 24 bytes for the table.
    """

    def __init__(self) -> None:
        self._keys = np.empty((64, 2), dtype=np.uint64)
        self._buckets = np.full(128, _EMPTY, dtype=np.int32)
        self._count = 0

    def __len__(self) -> int:
        """Returns the number of places that are numbered, free ones included."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._keys.nbytes + self._buckets.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each key, or -1.

        Args:
            keys: Keys, of shape (n, 2).
        """
        mask = np.uint64(len(self._buckets) - 1)
        buckets = (keys[:, 0] & mask).astype(np.int64)[:, None] + _WINDOW
        found = np.full(len(keys), _EMPTY, dtype=np.int64)
        open_ones = np.arange(len(keys))
        while open_ones.size:
            # Several buckets at once: a call of numpy costs more than the comparisons. Indexes wrap
            # around the ends, and what the key of an empty bucket is does not matter.
            places = self._buckets.take(buckets, mode="wrap")
            there, wanted = self._keys.take(places, axis=0, mode="wrap"), keys[open_ones, None]
            same = (there[..., 0] == wanted[..., 0]) & (there[..., 1] == wanted[..., 1])
            same &= places != _EMPTY
            row, column = same.nonzero()
            found[open_ones[row]] = places[row, column]
            on = np.flatnonzero(~(same | (places == _EMPTY)).any(axis=1))
            open_ones, buckets = open_ones[on], buckets[on] + len(_WINDOW)
        return found

    def keys(self, places: np.ndarray) -> np.ndarray:
        """Returns the keys at some places, of shape (n, 2).

        Args:
            places: Places of the keys.
        """
        return self._keys[places]

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Numbers new keys one after another, and returns their places.

        Args:
            keys: Keys that are not there, each once, of shape (n, 2).
        """
        places = np.arange(self._count, self._count + len(keys))
        self._count += len(keys)
        if self._count > len(self._keys):
            grown = np.empty((max(self._count, 2 * len(self._keys)), 2), dtype=np.uint64)
            grown[: len(self._keys)] = self._keys
            self._keys = grown
        self._keys[places] = keys
        if 2 * self._count > len(self._buckets):
            self._build()
        else:
            self._place(places)
        return places

    def keep(self, places: np.ndarray) -> None:
        """Forgets all keys but some, which are numbered anew in the given order.

        Args:
            places: Places of the keys that stay.
        """
        self._keys = np.concatenate([self._keys[places], np.empty((64, 2), dtype=np.uint64)])
        self._count = len(places)
        self._build()

    def _build(self) -> None:
        size = 128
        while size < 3 * self._count:
            size *= 2
        self._buckets = np.full(size, _EMPTY, dtype=np.int32)
        self._place(np.arange(self._count))

    def _place(self, places: np.ndarray) -> None:
        mask = np.uint64(len(self._buckets) - 1)
        bucket = self._keys[places, 0] & mask
        while places.size:
            free = self._buckets[bucket] == _EMPTY
            self._buckets[bucket[free]] = places[free]
            # Of several keys that want one bucket the last has it, and the others go on.
            left = self._buckets[bucket] != places
            places, bucket = places[left], (bucket[left] + np.uint64(1)) & mask


def first_ones(keys: np.ndarray) -> list[int]:
    """Returns the place of each key that does not come earlier among them.

    For a batch, a dict takes a fifth of the time of `np.unique`, which sorts rows as structures.

    Args:
        keys: Keys, of shape (n, 2).
    """
    data = keys.tobytes()
    places: dict[bytes, int] = {}
    for place in range(len(keys)):
        places.setdefault(data[16 * place : 16 * place + 16], place)
    return list(places.values())


def distinct(keys: np.ndarray) -> np.ndarray:
    """Returns keys, each of them once, of shape (n, 2)."""
    return keys[first_ones(keys)]
