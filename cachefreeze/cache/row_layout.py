"""Takes a value of a batch apart into rows, and puts rows together to a value again."""

from dataclasses import dataclass

import torch

from cachefreeze.lineage import Axis

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowLayout:
    """Shape and strides of a value in a batch, and where its rows are.

    A row is kept in the order in which the value's elements lie in memory, so that rows that come
    first there are copied as they are.

    Attributes:
        shape: Sizes of the dimensions, for the whole batch.
        stride: Strides in elements.
        axis: Place of the rows. None if the value is kept with its whole batch.
        rows: Number of rows in the batch. 1 if the value is kept with its whole batch.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    axis: Axis | None
    rows: int

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes of a row in the order of memory."""
        if not self.shape:
            return (1,)
        order, place, outer, inner = self._order()
        sizes = [self.shape[dim] for dim in order]
        if self.axis is None:
            return tuple(sizes)
        return (*sizes[:place], outer * inner, *sizes[place + 1 :])

    def split(self, value: Tensor) -> Tensor:
        """Returns the rows of a value, of shape (rows, elements of a row)."""
        if not self.shape:
            return value.detach().reshape(1, 1)
        order, place, outer, inner = self._order()
        physical = value.detach().permute(order)
        parts = physical.unflatten(place, (outer, self.rows, inner)).movedim(place + 1, 0)
        return parts.reshape(self.rows, -1)

    def join(self, rows: Tensor) -> Tensor:
        """Returns the value of a batch.

        Args:
            rows: Its rows, of shape (rows, elements of a row), on a buffer of their own.
        """
        if not self.shape:
            return rows.reshape(())
        order, place, outer, inner = self._order()
        sizes = [self.shape[dim] for dim in order]
        before, after = sizes[:place], sizes[place + 1 :]
        parts = rows.view(self.rows, *before, outer, inner, *after)
        # Of rows that are not first, `reshape` may give a view, which lies otherwise in memory.
        physical = parts.movedim(0, place + 1).reshape(sizes).contiguous()
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if reach + 1 == physical.numel():
            return physical.as_strided(self.shape, self.stride)
        # A view into something larger, or one expanded: replay gives it its strides.
        return physical.permute([order.index(dim) for dim in range(len(order))])

    def _order(self) -> tuple[list[int], int, int, int]:
        """Returns the dimensions as they lie in memory, and the place of the rows among them."""
        dims = len(self.shape)
        order = sorted(range(dims), key=lambda dim: -self.stride[dim])
        if self.axis is None:
            # A dimension of its own in front of all others would do: the first one, taken apart.
            return order, 0, 1, self.shape[order[0]]
        return order, order.index(self.axis.dim), self.axis.outer, self.axis.inner
