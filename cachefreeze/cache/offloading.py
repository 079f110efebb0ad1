"""Decides when frozen weights leave their device: while all rows of an epoch are known."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from cachefreeze.cache.away_parameter import come_back, go_away, is_alone, may_go
from cachefreeze.cache.state import State
from cachefreeze.keys import Weights

# Number of served batches after which weights leave, if the length of an epoch is not known.
_FEW = 16
# Factor by which this number grows each time that weights were needed again, and its largest value.
_GROWTH, _MOST = 2, 1024


class Offloading:
    """Frozen weights that are in host memory while no batch needs them.

    Args:
        weights: Hashes of frozen parameters and buffers.
        traces: Function that returns all cached traces.

    Attributes:
        is_on: Whether weights leave their device at all. If the host has no room, this ends.
        bytes: Number of bytes that are away.
    """

    def __init__(self, weights: Weights, traces: Callable[[], Iterable[Any]]) -> None:
        self.is_on = False
        self.bytes = 0
        self._weights = weights
        self._traces = traces
        self._away: list[nn.Parameter] = []
        self._served, self._wait = 0, 1

    def note_served(self) -> None:
        """Counts a batch that needed no frozen weight. After an epoch of them, weights leave."""
        if not self.is_on or self._away:
            return
        self._served += 1
        traces = [one for one in self._traces() if not one.stale]
        epoch = max([_FEW, *(one.batches_of_an_epoch for one in traces)])
        if self._served >= min(self._wait * epoch, max(_MOST, epoch)):
            self._served = 0
            self._leave(traces)

    def bring_back(self) -> None:
        """Brings all weights back, before something is computed from them."""
        self._served = 0
        for one in list(self._away):
            come_back(one)

    def _leave(self, traces: Sequence[Any]) -> None:
        """Lets those weights go that only skipped work reads."""
        if not all(one.state is State.SERVING for one in traces):
            return
        # What is away cannot be checked, so all bits are hashed now.
        moved = [one.look_at_all() for one in traces]
        if any(moved):
            return
        read = {number for one in traces for number in one.selection.states_read}
        frozen = {id(one): one for trace in traces for one in trace.selection.frozen.tensors}
        chosen = [one for number, one in frozen.items() if number not in read and may_go(one)]
        if not chosen:
            return
        self._weights.let_go(chosen)
        for trace in traces:
            trace.selection.frozen.forget_look()
        going = [one for one in chosen if is_alone(one)]
        self.bytes = sum(one.nbytes for one in going)
        try:
            go_away(going, self._note_back)
            self._away = going
        except (MemoryError, RuntimeError):  # the host has no room for them
            self.is_on = False
        finally:
            if not self._away:
                self.bytes = 0
                self._wait_longer()
            away = {id(one) for one in self._away}
            for one in chosen:
                if id(one) not in away:
                    self._weights.take_back(one)

    def _note_back(self, parameter: Tensor) -> None:
        """Notes that a parameter is back. All others follow it."""
        self._weights.take_back(parameter)
        self._away = [one for one in self._away if one is not parameter]
        if self.bytes:
            self.bytes = 0
            self._wait_longer()
            self.bring_back()

    def _wait_longer(self) -> None:
        self._wait = min(_GROWTH * self._wait, _MOST)
