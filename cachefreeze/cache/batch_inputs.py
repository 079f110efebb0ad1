"""Inputs of a batch: which of them consist of rows, and the keys of these rows."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from cachefreeze import lineage
from cachefreeze.cache.padding import mask_of, own_lengths
from cachefreeze.keys import device_hashes, row_keys, same_bits
from cachefreeze.lineage import Trace, unloaded
from cachefreeze.lineage.devices import runs_behind, to_device

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
        # Numbers of the inputs that kept values depend on.
        self._read = sorted({trace.inputs[place] for group in self._groups for place in group})
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
        hashes = self._hashes_on_devices(inputs)
        return {group: self._keys_in(group, inputs, hashes) for group in self._groups}

    def _hashes_on_devices(self, inputs: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
        """Hashes the inputs on devices that run behind the host, all of them at once."""
        there = {
            number: inputs[number]
            for number in self._read
            if runs_behind(inputs[number]) and unloaded.keys_of(inputs[number]) is None
        }
        if not there:
            return {}
        rows = {number: one for number, one in there.items() if number in self.with_rows}
        shared = {number: one for number, one in there.items() if number not in self.with_rows}
        found = device_hashes(list(rows.values()), list(shared.values()), self.rows)
        return dict(zip((*rows, *shared), found, strict=True))

    def _keys_in(
        self,
        group: tuple[int, ...],
        inputs: Mapping[int, Tensor],
        hashes: Mapping[int, np.ndarray],
    ) -> np.ndarray:
        numbers = [self._trace.inputs[place] for place in group]
        rows = {number: inputs[number] for number in numbers if number in self.with_rows}
        shared = {number: inputs[number] for number in numbers if number not in self.with_rows}
        unloaded.load_in(list(shared.values()))
        if self._exact or self.mask is None or not self.length:
            return row_keys(
                [hashes[n] if n in hashes else _named(one) for n, one in rows.items()],
                [hashes.get(n, one) for n, one in shared.items()],
                self.rows,
            )
        unloaded.load_in(list(rows.values()))
        mask = inputs[self.mask]
        padded = {n: one for n, one in rows.items() if one.shape[1:2] == mask.shape[1:]}
        lengths = own_lengths(mask, padded, self._padding)
        return row_keys(
            list(rows.values()), list(shared.values()), self.rows, lengths, mask.shape[1]
        )

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
        keys = {number: _joined_keys([batch[number] for batch in batches]) for number in joined}
        total = next(len(joined[number]) for number in joined if number in self.with_rows)
        found = []
        for start in range(0, total, self.rows):
            real = min(self.rows, total - start)
            places = np.arange(start, start + self.rows).clip(max=total - 1)
            whole = {
                number: tensor[to_device(places, tensor.device)]
                if number in self.with_rows
                else tensor
                for number, tensor in joined.items()
            }
            for number, known in keys.items():
                if known is not None and number in self.with_rows:
                    unloaded.with_keys(whole[number], known[places])
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
        for number, tensor in inputs.items():
            value = self._trace.values[number]
            if number not in self._read:
                continue
            if number in self.with_rows:
                if tuple(tensor.shape[1:]) != value.shape[1:] or tensor.dtype != value.dtype:
                    return False
            elif not same_bits(tensor, example[number]):
                return False
        return True


def _joined_keys(tensors: Sequence[Tensor]) -> np.ndarray | None:
    known = [keys for keys in map(unloaded.keys_of, tensors) if keys is not None]
    return np.concatenate(known) if len(known) == len(tensors) else None


def _named(tensor: Tensor) -> Tensor | np.ndarray:
    """Returns the hashes of a tensor's rows if they are known, or else the tensor itself."""
    keys = unloaded.keys_of(tensor)
    return tensor if keys is None else keys
