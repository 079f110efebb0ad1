"""Rules for operations that treat each row alone: in which dimension the rows are afterwards.

These operations need not be tried on other rows, which costs several times as much as the
operation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cachefreeze.lineage.operations import Operation, Value
from cachefreeze.lineage.structure import Ref

T = torch.Tensor

# Each element of the result depends on one element of each argument.
_ELEMENTWISE = {
    T.add, T.add_, T.__add__, T.__radd__, T.__iadd__, torch.add,
    T.sub, T.sub_, T.__sub__, T.__rsub__, T.__isub__, torch.sub,
    T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__, torch.mul,
    T.div, T.div_, T.__truediv__, T.__itruediv__, torch.div,
    T.relu, T.relu_, torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.hardtanh, F.leaky_relu,
    F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.softplus, F.sigmoid, F.tanh,
    T.sigmoid, torch.sigmoid, T.tanh, torch.tanh, T.exp, torch.exp, T.sqrt, torch.sqrt, T.rsqrt,
    torch.rsqrt, T.neg, T.__neg__, torch.neg, T.clamp, torch.clamp, T.pow, T.__pow__, torch.pow,
    T.float, T.half, T.bfloat16, T.double, T.to, T.type_as, T.contiguous, T.clone, T.detach,
    T.bool, T.eq, T.__eq__, T.ne, T.__ne__, T.lt, T.__lt__, T.gt, T.__gt__, T.le, T.__le__, T.ge,
    T.__ge__, T.__and__, T.__or__, T.__invert__, T.masked_fill, T.expand, T.cos, T.sin, torch.cos,
    torch.sin, F.dropout,
}  # fmt: skip
# Functions of images, with the number of their spatial dimensions. Rows come first, then channels.
_OF_IMAGES: dict[Callable[..., Any], int] = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3,
    F.max_pool2d: 2, torch.max_pool2d: 2, F.avg_pool2d: 2, F.adaptive_avg_pool2d: 2,
    F.adaptive_max_pool2d: 2, torch.conv_transpose2d: 2,
}  # fmt: skip
_LINEAR, _LAYER_NORM, _BATCH_NORM = (F.linear, torch._C._nn.linear), F.layer_norm, F.batch_norm
# Functions that keep the order of the elements. Rows stay first if the first size stays the same.
_IN_ORDER = {T.reshape, T.view, T.flatten, torch.reshape, torch.flatten}
_PERMUTE, _TRANSPOSE = (T.permute, torch.permute), (T.transpose, torch.transpose)
_UNSQUEEZE, _UNBIND = (T.unsqueeze, torch.unsqueeze), (T.unbind, torch.unbind)
_SPLIT = (T.chunk, torch.chunk, T.split, torch.split)
_SOFTMAX = (F.softmax, T.softmax, torch.softmax, F.log_softmax, T.log_softmax, torch.log_softmax)
_REDUCE, _CAT = (T.mean, torch.mean, T.sum, torch.sum), (torch.cat, torch.concat)
_ATTENTION = F.scaled_dot_product_attention
_MATMUL = (T.matmul, torch.matmul, T.__matmul__)


def row_dimension(
    operation: Operation, values: Sequence[Value], dims: Mapping[int, int | None]
) -> int | None:
    """Returns the dimension of the rows in all results of an operation.

    Args:
        operation: Operation of the trace.
        values: Values of the trace, by number.
        dims: Dimension of the rows in each value that depends on rows, by number. None if it is
            unknown, or if the rows are merged with another dimension.

    Returns:
        Dimension, or None if there is no rule for the operation.
    """
    reached = [number for number in operation.reads if number in dims]
    found = {dims[number] for number in reached}
    dim = found.pop() if len(found) == 1 else None
    if dim is None or not operation.makes:
        return None
    func, made = operation.func, values[operation.makes[0]]
    if func in _UNBIND or func in _SPLIT:
        return _apart(operation, values, reached, dim)
    if len(operation.makes) != 1:
        return None
    together = func in _ELEMENTWISE or func in _CAT or func in _MATMUL or func is _ATTENTION
    if together:
        size = len(made.shape)
        alike = all(
            len(values[n].shape) == size and values[n].shape[dim] == made.shape[dim]
            for n in reached
        )
        others = (values[n] for n in operation.reads if n not in dims)
        if not alike or not all(_is_alike_for_all(one, size, dim) for one in others):
            return None
        if func in _CAT:
            return dim if _dimension(operation, 1, "dim", 0, size) not in (None, dim) else None
        if func in _MATMUL or func is _ATTENTION:
            return dim if dim < size - 2 else None
        return dim
    first = operation.args[0] if operation.args else None
    if not (isinstance(first, Ref) and reached == [first.number]):
        return None
    return _of_one(operation, values, values[first.number], made, dim)


def _of_one(
    operation: Operation, values: Sequence[Value], value: Value, made: Value, dim: int
) -> int | None:
    """Returns the dimension of the rows in the result of a function of one value."""
    func, size = operation.func, len(value.shape)
    if func in _OF_IMAGES:
        return 0 if dim == 0 and size == _OF_IMAGES[func] + 2 == len(made.shape) else None
    if func is _BATCH_NORM:
        return 0 if dim == 0 and not _argument(operation, 5, "training", False) else None
    if func in _LINEAR:
        bias = _argument(operation, 2, "bias", None)
        # A bias of two dimensions may differ between rows.
        shared = not isinstance(bias, Ref) or len(values[bias.number].shape) < 2
        return dim if dim < size - 1 and shared else None
    if func is _LAYER_NORM:
        normalized = _argument(operation, 1, "normalized_shape", made.shape)
        return dim if dim < size - len(normalized) else None
    if func is F.embedding:
        return dim
    if func in _IN_ORDER:
        same = len(made.shape) > 0 and made.shape[0] == value.shape[0]
        return 0 if dim == 0 and same and made.dtype == value.dtype else None
    if func in _PERMUTE:
        given: Any = operation.args[1:]
        given = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        order = [one % size for one in given if isinstance(one, int)]
        return order.index(dim) if len(order) == size else None
    if func in _TRANSPOSE:
        pair = [_dimension(operation, place, f"dim{place - 1}", None, size) for place in (1, 2)]
        if None in pair:
            return None
        return pair[1 - pair.index(dim)] if dim in pair else dim
    if func in _UNSQUEEZE:
        place = _dimension(operation, 1, "dim", None, size + 1)
        return None if place is None else dim + (place <= dim)
    if func in _SOFTMAX:
        return dim if _dimension(operation, 1, "dim", None, size) not in (None, dim) else None
    if func in _REDUCE:
        return 0 if dim == 0 and _leaves_rows(operation, size) else None
    if func is T.__getitem__:
        return 0 if dim == 0 and _takes_all_rows(operation.args[1]) else None
    return None


def _apart(
    operation: Operation, values: Sequence[Value], reached: Sequence[int], dim: int
) -> int | None:
    """Returns the dimension of the rows in the parts that a value is split into."""
    first = operation.args[0] if operation.args else None
    if not (isinstance(first, Ref) and list(reached) == [first.number]):
        return None
    if "axis" in operation.kwargs:  # torch accepts numpy's name for `dim`
        return None
    size, alone = len(values[first.number].shape), operation.func in _UNBIND
    along = _dimension(operation, 1 if alone else 2, "dim", 0, size)
    if along is None or along == dim:
        return None
    return dim - (along < dim) if alone else dim


def _is_alike_for_all(value: Value, size: int, dim: int) -> bool:
    """Returns whether a value is the same for all rows when it is broadcast."""
    place = dim - (size - len(value.shape))
    return place < 0 or value.shape[place] == 1 or value.stride[place] == 0


def _leaves_rows(operation: Operation, size: int) -> bool:
    """Returns whether a sum or mean leaves the first dimension as it is."""
    dims = _argument(operation, 1, "dim", None)
    dims = [dims] if isinstance(dims, int) else dims
    whole = isinstance(dims, (tuple, list)) and all(isinstance(one, int) for one in dims)
    return whole and len(dims) > 0 and all(one % size for one in dims)


def _takes_all_rows(places: Any) -> bool:
    """Returns whether an index keeps the first dimension and contains no tensor."""
    if not isinstance(places, tuple) or not places:
        return False
    plain = (int, slice, type(None), type(Ellipsis))
    # A bool selects elements, as a tensor does.
    known = all(isinstance(one, plain) and not isinstance(one, bool) for one in places)
    return known and places[0] == slice(None)


def _dimension(operation: Operation, place: int, name: str, default: Any, size: int) -> int | None:
    """Returns an argument that is a dimension, as a number that is not negative."""
    found = _argument(operation, place, name, default)
    return found % size if isinstance(found, int) else None


def _argument(operation: Operation, place: int, name: str, default: Any) -> Any:
    if len(operation.args) > place:
        return operation.args[place]
    return operation.kwargs.get(name, default)
