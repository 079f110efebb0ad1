"""An index from 128-bit keys to numbers, in numpy arrays.

A dict of bytes would take 150 bytes a key.
"""

import numpy as np

# A bucket has 64 bits: the place of a key in the lower half, and 32 bits of the key in the upper
# half. So one comparison searches many buckets, without a look at the keys themselves.
_HALF = np.uint64(32)
_PLACE = np.uint64(2**32 - 1)
_EMPTY = np.uint64(2**64 - 1)
# Number of buckets that are compared at once. One call of numpy costs more than 16 comparisons.
_WINDOW = np.arange(16)[:, None]


class Index:
    """Numbers keys in the order in which they are added. The number of a key is its place.

    This is a hash table with open addressing. It takes 16 bytes a key for the keys, and 16 to 32
    bytes a key for the buckets.
    """

    def __init__(self) -> None:
        self._keys = np.empty((64, 2), dtype=np.uint64)
        self._buckets = np.full(128, _EMPTY)
        self._count = 0

    def __len__(self) -> int:
        """Returns the number of keys."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._keys.nbytes + self._buckets.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each key, or -1 for a key that is not in the index.

        Args:
            keys: Keys, of shape (n, 2).
        """
        if not self._count:
            return np.full(len(keys), -1)
        first = self._bucket_of(keys)
        # One column for each key: numpy compares rows of neighbours four times as fast.
        window = self._buckets.take(first + _WINDOW, mode="wrap")
        # If the upper halves are equal, XOR leaves the place, which is smaller than any other
        # result.
        near = (window ^ (keys[:, 1] << _HALF)).min(axis=0)
        places = np.minimum(near, np.uint64(self._count - 1)).astype(np.int64)
        found = self._keys.take(places, axis=0) == keys
        if not found.all():
            good = found.all(axis=1)
            places[~good] = -1
            # The key may be behind this window, or behind another key with the same upper half.
            on = ~good & ((near <= _PLACE) | (window != _EMPTY).all(axis=0))
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
        """Returns the keys at some places, of shape (n, 2)."""
        return self._keys[places]

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds keys, and returns their places.

        Args:
            keys: Keys that are not in the index and differ from one another, of shape (n, 2).
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
        """Removes all keys but some. These get new places, in the given order."""
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
            # If several keys want the same bucket, the last one gets it. The others try the next
            # bucket.
            left = self._buckets[bucket] != entries
            bucket, entries = (bucket[left] + 1) & (len(self._buckets) - 1), entries[left]


def first_ones(keys: np.ndarray) -> list[int]:
    """Returns the position of the first occurrence of each key.

    For the keys of a batch, a dict takes a fifth of the time of `np.unique`, which sorts rows as
    structures.

    Args:
        keys: Keys, of shape (n, 2).
    """
    data = keys.tobytes()
    places: dict[bytes, int] = {}
    for place in range(len(keys)):
        places.setdefault(data[16 * place : 16 * place + 16], place)
    return list(places.values())


def distinct(keys: np.ndarray) -> np.ndarray:
    """Returns the keys without repetitions, of shape (n, 2).

    Args:
        keys: Keys, of shape (n, 2).
    """
    return keys[first_ones(keys)]
