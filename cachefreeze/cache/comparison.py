"""Batches that could be served, computed and compared with what is kept of them."""

from collections.abc import Mapping

import torch

from cachefreeze.cache.cache_state import CacheState
from cachefreeze.cache.row_history import RowHistory
from cachefreeze.cache.selection import Selection
from cachefreeze.keys import same_bits

Tensor = torch.Tensor

# Number of served batches after which one is compared, and then at twice that number, and so on.
_FIRST_SAMPLE = 16


class Comparison:
    """Decides which batches are compared, and what follows from a difference.

    Args:
        shared: What all traces of the cache have in common.
        name: Name of the module, for people.
        selection: What is kept of the pass.
        history: What is known of the rows.

    Attributes:
        batches: Number of batches that were compared since the last change of frozen bits.
    """

    def __init__(
        self, shared: CacheState, name: str, selection: Selection, history: RowHistory
    ) -> None:
        self._shared = shared
        self._name = name
        self._selection = selection
        self._history = history
        self._next_sample = _FIRST_SAMPLE
        self.batches = 0

    @property
    def is_proven(self) -> bool:
        """Whether enough batches were compared, one of the very length among them."""
        return self.batches > 0 and self._history.passed >= self._history.wanted

    def begin_again(self) -> None:
        """Asks for as many compared batches as at the beginning."""
        self._history.passed = self.batches = 0

    def is_due(self, served: int) -> bool:
        """Says whether one of the served batches is to be compared.

        Args:
            served: Number of batches that were served so far.
        """
        if self._shared.report.verify == "off" or served < self._next_sample:
            return False
        # Within 1 % of the time samples come evenly, else at growing distances.
        further = _FIRST_SAMPLE if self._shared.may_compare else served
        self._next_sample = served + further
        return True

    def differing(self, computed: Mapping[int, Tensor], stored: Mapping[int, Tensor]) -> list[int]:
        """Compares a batch bit by bit.

        Args:
            computed: Values that the model has computed, by number.
            stored: Kept values, by number.

        Returns:
            Numbers of the values that differ.
        """
        report = self._shared.report
        report.batches_compared += 1
        report.rows_compared += self._selection.rows
        numbers = [one.number for one in self._selection.kept]
        return [n for n in numbers if not same_bits(computed[n], stored[n])]

    def count(self) -> None:
        """Counts a batch that was compared, and may be served from now on."""
        self.batches += 1
        self._history.passed += 1

    def judge(self, number: int, computed: Tensor, stored: Tensor) -> tuple[str, str]:
        """Tells of a value that differs, and removes its rows unless they may be served.

        Args:
            number: Number of the value.
            computed: Value that the model has computed.
            stored: Kept value.

        Returns:
            Reason why nothing is served any more, to follow a colon, and a further sentence. Both
            are empty if something may.
        """
        shared, history = self._shared, self._history
        name = self._selection.trace.describe(number)
        far = (computed.double() - stored.double()).abs().max().item()
        size = computed.double().abs().max().item()
        close = far <= shared.closeness(computed) * size
        if close and not shared.exact:
            shared.find(
                f"{self._name}: {name} differs",
                f"Kept rows of {name} differ from computed ones by up to {far:.1e}, of {size:.1e}: "
                "they are served all the same, for exact=False.",
            )
            return "", ""
        row = self._selection.kept.rows_that_differ(number, computed, stored)
        self._selection.kept.forget(wrong=True)
        if history.traces > 1:
            history.broken = True
            shared.find(
                f"{self._name}: padding",
                f"{self._name} is not cached: rows of {name} that are padded to another length "
                f"differ by {far:.1e}, of {size:.1e}, which is more than rounding. A fixed length "
                "or pad_to_multiple_of=64 makes rows come again.",
            )
            return "", ""
        why = f"kept rows of {name} differ from computed ones by {far:.1e}, of {size:.1e}, in {row}"
        more = "exact=False would serve them." if close else (
            "Rows depend on the others of their batch, or on something that the cache cannot see."
        )  # fmt: skip
        shared.report.found.append(f"{self._name}: {why}. {more}")
        return why, more
