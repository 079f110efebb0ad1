"""Parameters and buffers that kept values are made from, and changes of their bits."""

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import call, is_

import torch

from cachefreeze.cache import messages
from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.deferred_writes import Check
from cachefreeze.keys import Lineage, Look
from cachefreeze.lineage import Trace

Tensor = torch.Tensor


class _Known:
    """Answer that is there at once.

    Args:
        answer: Answer.
    """

    is_there = True

    def __init__(self, answer: bool) -> None:
        self._answer = answer

    def get(self) -> bool:
        """Returns the answer."""
        return self._answer


class FrozenState:
    """Watches the parameters and buffers that the kept values of a trace are made from.

    Args:
        shared: State that all parts of the cache share.
        trace: Trace of a forward pass.
        lineages: Lineage of each kept value.
        model: Name of the module, for messages.

    Attributes:
        digests: Hashes of the tensors' bits, by number.
        late: Whether a change was found that no quick check and no event had shown.
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
        self._unseen: dict[int, int] = {}
        self._moved: list[Tensor] = []
        self._hashed_at = -1
        self._look: Look | None = None
        self._learned_late = False

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers that the kept values are made from."""
        found = [reference() for reference in self._states.values()]
        return [tensor for tensor in found if tensor is not None]

    @property
    def gone(self) -> bool:
        """Whether one of the tensors does not exist any more."""
        return any(map(is_, map(call, self._states.values()), repeat(None)))

    def tell_if_lost(self) -> None:
        """Tells the user if one of the tensors was changed unseen before it ceased to exist."""
        if self._look is None or not self.gone:
            return
        if self._look.lost_a_change():
            states = self._trace.states
            self._tell_late([one.name for one in states if one.tensor() is None])
        self._look = None

    def forget_look(self) -> None:
        """Lets go of the tensors' memory, which the quick check holds. Hashes stay known."""
        self._look = None

    def look(self) -> None:
        """Checks the tensors quickly, and marks those that have changed for a new hash.

        The answers of devices that run behind the host are not waited for: see `learn`.
        """
        look = self._look
        if self._hashed_at != self._weights.changes or look is None or not look.is_same_on_host():
            self._weights.look(self.tensors)
        elif look.devices_differ():  # in an earlier call
            self._doubt_what_differs()
            self._learned_late = True
        else:
            look.ask_devices()

    def learn(self) -> bool:
        """Returns whether the last check on devices is known to have found a difference.

        What has changed is marked for a new hash then.
        """
        if self._look is None or not self._look.devices_differ():
            return False
        self._doubt_what_differs()
        return True

    def _doubt_what_differs(self) -> None:
        self._look, changes = None, self._weights.changes
        self._weights.look(self.tensors)
        if self._weights.changes == changes:  # a hash has found it
            self._weights.suspect(self.tensors)

    def doubt_all(self) -> None:
        """Checks the tensors quickly, and marks all of them for a new hash."""
        self.look()
        self._weights.suspect(self.tensors)

    def look_again(self) -> None:
        """Hashes as many bits as there is time for, others at each call."""
        if self._look is not None and self._weights.changes == self._hashed_at:
            self._shared.count_hashing(
                self._weights.hash_pieces(self._look, self._shared.seconds_to_hash)
            )

    def update(self) -> bool:
        """Updates the hashes. Returns whether any of them may have changed."""
        if self._weights.changes == self._hashed_at:
            return False
        self._weights.hash_on_devices(self.tensors)
        for number, reference in self._states.items():
            tensor = reference()
            digest = b"" if tensor is None else self._weights.digest(tensor)
            unseen = 0 if tensor is None else self._weights.unseen_changes(tensor)
            if tensor is not None and self.digests.get(number, digest) != digest:
                self._moved.append(tensor)
                # Others may have hashed the tensor once more since the change.
                hidden = self._learned_late or unseen > self._unseen.get(number, 0)
                self.late = self.late or hidden
            self.digests[number], self._unseen[number] = digest, unseen
        self._learned_late = False
        self._hashed_at = self._weights.changes
        self._look = self._weights.take_look(self.tensors)
        return True

    def take_moved(self) -> list[Tensor]:
        """Returns the tensors that have changed since the last call of this method.

        If a change was found late, the user is told.
        """
        moved, self._moved = self._moved, []
        if moved and self.late:
            self.late = False
            states = self._trace.states
            self._tell_late([one.name for one in states if any(one.tensor() is t for t in moved)])
        return moved

    def _tell_late(self, names: Sequence[str]) -> None:
        self._shared.find(
            f"{self._model}: late",
            messages.changed_late(self._model, ", ".join(names[:1])),
        )

    def check(self, digests: dict[int, bytes]) -> Check:
        """Asks whether all tensors have the given hashes. On a GPU, the answer comes later."""
        look = self._look
        if (
            look is not None
            and look.is_on_devices
            and self._hashed_at == self._weights.changes
            and self.digests == digests
            and look.is_same_on_host()
        ):
            return look.hash_on_devices()
        return _Known(self.has_digests(digests))

    def has_digests(self, digests: dict[int, bytes]) -> bool:
        """Hashes all tensors again. Returns whether they have the given hashes."""
        tensors = self.tensors
        self._weights.suspect(tensors)
        self._weights.hash_on_devices(tensors)
        return len(tensors) == len(digests) and all(
            self._weights.digest(tensor) == digests[number]
            for number, reference in self._states.items()
            for tensor in [reference()]
            if tensor is not None
        )
