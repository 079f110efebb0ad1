"""Splits a value of a batch into rows, and joins rows to a value again."""

from dataclasses import dataclass

import torch

from cachefreeze.lineage import Axis

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowLayout:
    """Shape and strides of a value, and the axis of its rows.

    The elements of a row are kept in the order in which they lie in memory. Where rows are the
    first axis in memory, they are copied without reordering.

    Attributes:
        shape: Shape of the value for the whole batch.
        stride: Strides of the value, in elements.
        axis: Axis of the rows. None if the value is kept for the whole batch.
        rows: Number of rows in the batch. 1 if the value is kept for the whole batch.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    axis: Axis | None
    rows: int

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of a row, its dimensions in the order of memory."""
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
        """Returns the value of a batch, with its shape and strides.

        Args:
            rows: Rows of the batch, of shape (rows, elements of a row). Their memory may become
                that of the value.
        """
        if not self.shape:
            return rows.reshape(())
        order, place, outer, inner = self._order()
        sizes = [self.shape[dim] for dim in order]
        before, after = sizes[:place], sizes[place + 1 :]
        parts = rows.view(self.rows, *before, outer, inner, *after)
        # If rows are not the first axis, `reshape` may return a view in another order of memory.
        physical = parts.movedim(0, place + 1).reshape(sizes).contiguous()
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if reach + 1 == physical.numel():
            return physical.as_strided(self.shape, self.stride)
        # The value was a view with gaps, or an expanded one: replay gives it its strides.
        return physical.permute([order.index(dim) for dim in range(len(order))])

    def _order(self) -> tuple[list[int], int, int, int]:
        """Returns the dimensions in the order of memory, and the place of the rows among them."""
        dims = len(self.shape)
        order = sorted(range(dims), key=lambda dim: -self.stride[dim])
        if self.axis is None:
            # A whole batch is one row: the first dimension is split into 1 and its size.
            return order, 0, 1, self.shape[order[0]]
        return order, order.index(self.axis.dim), self.axis.outer, self.axis.inner
