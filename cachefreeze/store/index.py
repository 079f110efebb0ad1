"""Finds the place of a key: arrays in the place of a dict, which costs 150 bytes a key."""

import numpy as np

# A bucket holds the place of a key in its lower half, and half of the key's second half as a mark:
# then a row of buckets can be looked through at once, without a look at keys that lie elsewhere.
_HALF = np.uint64(32)
_PLACE = np.uint64(2**32 - 1)
_EMPTY = np.uint64(2**64 - 1)
# Buckets that are looked at together: a call of numpy costs more than the comparisons.
_WINDOW = np.arange(16)


class Index:
    """Places of 128-bit keys, as a hash table with open addressing in numpy's arrays.

    It costs 16 bytes a key, and 16 to 32 bytes for the table.
    """

    def __init__(self) -> None:
        self._keys = np.empty((64, 2), dtype=np.uint64)
        self._buckets = np.full(128, _EMPTY)
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
        if not self._count:
            return np.full(len(keys), -1)
        first = self._bucket_of(keys)
        window = self._buckets.take(first[:, None] + _WINDOW, mode="wrap")
        # Where the marks are equal, what is left is the place, and smaller than all others.
        near = (window ^ (keys[:, 1] << _HALF)[:, None]).min(axis=1)
        places = np.minimum(near, np.uint64(self._count - 1)).astype(np.int64)
        good = (self._keys.take(places, axis=0) == keys).all(axis=1)
        if not good.all():
            places[~good] = -1
            # Others may lie further on, or behind one with the same mark.
            on = ~good & ((near <= _PLACE) | (window != _EMPTY).all(axis=1))
            if on.any():
                places[on] = self._find_one_by_one(keys[on], first[on])
        return places

    def _bucket_of(self, keys: np.ndarray) -> np.ndarray:
        return (keys[:, 0] & np.uint64(len(self._buckets) - 1)).astype(np.int64)

    def _find_one_by_one(self, keys: np.ndarray, bucket: np.ndarray) -> np.ndarray:
        found = np.full(len(keys), -1)
        open_ones = np.arange(len(keys))
        while open_ones.size:
            bucket = bucket & (len(self._buckets) - 1)
            entries = self._buckets[bucket]
            places = np.minimum(entries & _PLACE, np.uint64(self._count - 1)).astype(np.int64)
            there = entries != _EMPTY
            same = there & (self._keys[places] == keys[open_ones]).all(axis=1)
            found[open_ones[same]] = places[same]
            open_ones, bucket = open_ones[there & ~same], bucket[there & ~same] + 1
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
        self._buckets = np.full(size, _EMPTY)
        self._place(np.arange(self._count))

    def _place(self, places: np.ndarray) -> None:
        keys = self._keys[places]
        bucket = self._bucket_of(keys)
        entries = keys[:, 1] << _HALF | places.astype(np.uint64)
        while bucket.size:
            free = self._buckets[bucket] == _EMPTY
            self._buckets[bucket[free]] = entries[free]
            # Of several keys that want one bucket the last has it, and the others go on.
            left = self._buckets[bucket] != entries
            bucket, entries = (bucket[left] + 1) & (len(self._buckets) - 1), entries[left]


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
