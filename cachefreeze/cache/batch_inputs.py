"""Inputs of a batch: which of them consist of rows, and the keys of these rows."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from cachefreeze import lineage
from cachefreeze.cache.padding import mask_of, own_lengths
from cachefreeze.keys import row_keys, same_bits
from cachefreeze.lineage import Trace, unloaded

Tensor = torch.Tensor
# Keys of a batch's rows, for each group of inputs that a kept value depends on.
Keys = dict[tuple[int, ...], np.ndarray]


class BatchInputs:
    """Splits the inputs of a batch into rows, and computes the keys of rows.

    Args:
        trace: Trace of a forward pass.
        inputs: Inputs of the traced pass, by number.
        groups: Groups of inputs that kept values depend on, as positions in `trace.inputs`.
        exact: Whether padding is part of a row.
        like: Inputs of a trace with rows of another length, which have the same padding. None if
            there is no such trace.

    Attributes:
        rows: Number of rows in a batch.
        with_rows: Numbers of the inputs that have a part for every row.
        mask: Number of the input that is a mask of padded rows. None if there is none.
    """

    def __init__(
        self,
        trace: Trace,
        inputs: Mapping[int, Tensor],
        groups: Iterable[tuple[int, ...]],
        exact: bool,
        like: "BatchInputs | None" = None,
    ) -> None:
        self._trace = trace
        self._groups = list(dict.fromkeys(groups))
        self._exact = exact
        self.rows, self.with_rows = lineage.rows_of(inputs)
        self.mask = mask_of(inputs, self.with_rows)
        self._padding: dict[int, float] = like._padding if like is not None else {}

    @property
    def length(self) -> int:
        """Length that the traced rows are padded to. 0 if no mask shows their own lengths."""
        inputs = self._trace.inputs
        if self.mask is None or not all(
            any(inputs[place] == self.mask for place in group) for group in self._groups
        ):
            return 0
        return self._trace.values[self.mask].shape[1]

    def has_rows(self, group: tuple[int, ...]) -> bool:
        """Returns whether any input of a group has a part for every row."""
        return any(self._trace.inputs[place] in self.with_rows for place in group)

    def keys(self, inputs: Mapping[int, Tensor]) -> Keys:
        """Hashes the rows of a batch.

        Returns:
            Keys of shape (rows, 2), for each group of inputs.
        """
        return {group: self._keys_in(group, inputs) for group in self._groups}

    def _keys_in(self, group: tuple[int, ...], inputs: Mapping[int, Tensor]) -> np.ndarray:
        numbers = [self._trace.inputs[place] for place in group]
        rows = {number: inputs[number] for number in numbers if number in self.with_rows}
        shared = [inputs[number] for number in numbers if number not in self.with_rows]
        unloaded.load_in(shared)
        if self._exact or self.mask is None or not self.length:
            return row_keys([_named(one) for one in rows.values()], shared, self.rows)
        unloaded.load_in(list(rows.values()))
        mask = inputs[self.mask]
        padded = {n: one for n, one in rows.items() if one.shape[1:2] == mask.shape[1:]}
        lengths = own_lengths(mask, padded, self._padding)
        return row_keys(list(rows.values()), shared, self.rows, lengths, mask.shape[1])

    def merge(self, batches: list[dict[int, Tensor]]) -> list[tuple[dict[int, Tensor], int]]:
        """Joins smaller batches to batches of the usual size.

        The last batch is filled up with copies of its last row.

        Args:
            batches: Inputs of each smaller batch, by number.

        Returns:
            Inputs of each joined batch, and the number of its rows that are not copies.
        """
        joined = {
            number: torch.cat([batch[number] for batch in batches])
            if number in self.with_rows
            else batches[0][number]
            for number in batches[0]
        }
        total = next(len(joined[number]) for number in joined if number in self.with_rows)
        found = []
        for start in range(0, total, self.rows):
            real = min(self.rows, total - start)
            places = torch.arange(start, start + self.rows).clamp(max=total - 1)
            whole = {
                number: tensor[places] if number in self.with_rows else tensor
                for number, tensor in joined.items()
            }
            found.append((whole, real))
        return found

    def shared_of(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Returns the inputs that belong to the whole batch."""
        return {n: tensor for n, tensor in inputs.items() if n not in self.with_rows}

    def takes(self, inputs: Mapping[int, Tensor], example: Mapping[int, Tensor]) -> bool:
        """Returns whether rows of a smaller batch can be part of a batch of the usual size.

        Args:
            inputs: Inputs of the smaller batch, by number.
            example: Inputs of the traced pass that belong to the whole batch, by number.
        """
        read = {self._trace.inputs[place] for group in self._groups for place in group}
        for number, tensor in inputs.items():
            value = self._trace.values[number]
            if number not in read:
                continue
            if number in self.with_rows:
                if tuple(tensor.shape[1:]) != value.shape[1:] or tensor.dtype != value.dtype:
                    return False
            elif not same_bits(tensor, example[number]):
                return False
        return True


def _named(tensor: Tensor) -> Tensor | np.ndarray:
    """Returns the row hashes of a tensor that is not loaded yet, or a loaded tensor itself."""
    return tensor.unloaded_keys if unloaded.is_unloaded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]
