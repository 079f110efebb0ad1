"""Parameters and buffers that move from step to step although they take no gradient.

Mean teachers, moving averages, momentum that goes on after a freeze: such tensors count as trained
until they have rested.
"""

import weakref
from collections.abc import Iterable

import torch

from cachefreeze.keys import Weights

Tensor = torch.Tensor

# Number of calls for which a tensor must have rested, and the largest such number: each time that
# it has moved again, it is looked at half as often.
_CALLS, _MOST_CALLS = 16, 1024


class MovingWeights:
    """The tensors that move.

    Args:
        weights: Hashes of frozen parameters and buffers.

    Attributes:
        version: Number that grows whenever a tensor is found to move or to rest.
    """

    def __init__(self, weights: Weights) -> None:
        self.version = 0
        self._weights = weights
        self._digests: dict[int, tuple[weakref.ref[Tensor], bytes]] = {}
        self._calls, self._wait = 0, _CALLS

    def __bool__(self) -> bool:
        """Says whether any tensor moves."""
        return bool(self._digests)

    @property
    def tensors(self) -> list[Tensor]:
        """Returns the tensors that move."""
        found = [reference() for reference, _ in self._digests.values()]
        return [tensor for tensor in found if tensor is not None]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Notes tensors that were seen to move."""
        for tensor in tensors:
            self._digests[id(tensor)] = weakref.ref(tensor), self._weights.digest(tensor)
        self.version += 1
        self._calls, self._wait = 0, _CALLS

    def look(self) -> None:
        """Counts a call. Now and then, finds the tensors that have rested since the last look."""
        if not self._digests:
            return
        self._calls += 1
        if self._calls < self._wait:
            return
        tensors = self.tensors
        self._weights.suspect(tensors)
        rested = [one for one in tensors if self._weights.digest(one) == self._digests[id(one)][1]]
        self._digests = {
            id(one): (weakref.ref(one), self._weights.digest(one))
            for one in tensors
            if not any(one is other for other in rested)
        }
        self._calls = 0
        if rested:
            self.version += 1
            self._wait = _CALLS
        else:
            self._wait = min(2 * self._wait, _MOST_CALLS)
