"""Parameters and buffers that kept values are made from, and whether their bits have changed."""

from collections.abc import Iterable, Sequence

import torch

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.keys import Lineage, Look
from cachefreeze.lineage import Trace

Tensor = torch.Tensor


class FrozenState:
    """Watches the parameters and buffers that the kept values of a pass are made from.

    Args:
        shared: What all traces of the cache have in common.
        trace: Trace of a pass.
        lineages: How each kept value is made.
        model: Name of the model, for people.

    Attributes:
        digests: Hashes of the tensors' bits, by the numbers of their values.
        late: Whether bits were found to have changed without a look that has seen it.
    """

    def __init__(
        self, shared: CacheState, trace: Trace, lineages: Iterable[Lineage], model: str
    ) -> None:
        self._shared = shared
        self._weights = shared.weights
        self._model = model
        self._trace = trace
        states = {state.value: state for state in trace.states}
        self._states = {number: states[number].tensor for one in lineages for number in one.states}
        self.digests: dict[int, bytes] = {}
        self.late = False
        self._moved: list[Tensor] = []
        self._hashed_at = -1
        self._look: Look | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers that the kept values are made from."""
        found = [reference() for reference in self._states.values()]
        return [tensor for tensor in found if tensor is not None]

    @property
    def gone(self) -> bool:
        """Whether one of the parameters and buffers was replaced."""
        return any(reference() is None for reference in self._states.values())

    def look(self) -> None:
        """Sees whether bits may have changed, and has them hashed again if so."""
        changes = self._weights.changes
        if self._hashed_at != changes or self._look is None or not self._look.is_same():
            self._weights.look(self.tensors)

    def look_again(self, at_all: bool = False) -> None:
        """Hashes one tensor again, each in its turn, or all of them."""
        tensors = self.tensors
        if at_all:
            self._weights.suspect(tensors)
        else:
            self._weights.suspect_next(tensors)
        seconds = self._weights.hash(tensors)
        self._shared.report.seconds += seconds
        self._shared.hash_seconds += seconds

    def update(self) -> bool:
        """Takes the hashes of now. Says whether any may be another one than before."""
        if self._weights.changes == self._hashed_at:
            return False
        for number, reference in self._states.items():
            tensor = reference()
            digest = b"" if tensor is None else self._weights.digest(tensor)
            if tensor is not None and self.digests.get(number, digest) != digest:
                self._moved.append(tensor)
                self.late = self.late or self._weights.has_changed_unseen(tensor)
            self.digests[number] = digest
        self._hashed_at = self._weights.changes
        self._look = self._weights.take_look(self.tensors)
        return True

    def take_moved(self) -> list[Tensor]:
        """Returns the tensors whose bits have changed since the last time, and tells of late ones.

        Bits are late if they changed some time ago and nothing had shown it.
        """
        moved, self._moved = self._moved, []
        if moved and self.late:
            self.late = False
            self._tell_late(moved)
        return moved

    def _tell_late(self, moved: Sequence[Tensor]) -> None:
        names = [
            state.name for state in self._trace.states if any(state.tensor() is t for t in moved)
        ]
        self._shared.find(
            f"{self._model}: late",
            f"{', '.join(names[:1])} of {self._model} was changed in a few places by a way that "
            "shows nowhere, such as .data or numpy, and was found by a hash of all bits: rows that "
            "were served just before may be of the weights of before. "
            'verify="all" compares every batch.',
        )

    def is_as(self, digests: dict[int, bytes]) -> bool:
        """Says whether the bits, all of them hashed again, are certain ones.

        Args:
            digests: Hashes of the bits, by the numbers of the tensors' values.
        """
        tensors = self.tensors
        self._weights.suspect(tensors)
        return len(tensors) == len(digests) and all(
            self._weights.digest(tensor) == digests[number]
            for number, reference in self._states.items()
            for tensor in [reference()]
            if tensor is not None
        )
