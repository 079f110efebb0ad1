"""Parameters and buffers that change from step to step although they take no gradient.

Examples are mean teachers, moving averages, and momentum that goes on after a freeze. Such tensors
count as trained until they have stopped changing.
"""

import weakref
from collections.abc import Iterable

import torch

from cachefreeze.keys import Weights

Tensor = torch.Tensor

# Number of calls without a change after which a tensor counts as frozen again, and the largest such
# number. The number doubles each time that none of the tensors has stopped changing.
_CALLS, _MOST_CALLS = 16, 1024


class MovingWeights:
    """Parameters and buffers that are known to change.

    Args:
        weights: Hashes of frozen parameters and buffers.

    Attributes:
        version: Number that grows whenever a tensor is found to change or to have stopped changing.
    """

    def __init__(self, weights: Weights) -> None:
        self.version = 0
        self._weights = weights
        self._digests: dict[int, tuple[weakref.ref[Tensor], bytes]] = {}
        self._calls, self._wait = 0, _CALLS

    def __bool__(self) -> bool:
        """Returns whether any tensor changes."""
        return bool(self._digests)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that change."""
        found = [reference() for reference, _ in self._digests.values()]
        return [tensor for tensor in found if tensor is not None]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors that were seen to change."""
        for tensor in tensors:
            self._digests[id(tensor)] = weakref.ref(tensor), self._weights.digest(tensor)
        self.version += 1
        self._calls, self._wait = 0, _CALLS

    def look(self) -> None:
        """Counts a call, and from time to time removes the tensors that have stopped changing."""
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
