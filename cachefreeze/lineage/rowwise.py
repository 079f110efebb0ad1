"""Operations that are known to go through a batch row by row, and where the rows are after them.

They need not be tried on other rows, which costs several times what they cost themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cachefreeze.lineage.operations import Operation, Value
from cachefreeze.lineage.structure import Ref

T = torch.Tensor

# Every element of the result is made from one element of each argument.
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
    F.dropout,
}  # fmt: skip
# Functions of images: rows first, then channels, then so many dimensions.
_OF_IMAGES: dict[Callable[..., Any], int] = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3,
    F.max_pool2d: 2, torch.max_pool2d: 2, F.avg_pool2d: 2, F.adaptive_avg_pool2d: 2,
    F.adaptive_max_pool2d: 2, torch.conv_transpose2d: 2,
}  # fmt: skip
_LINEAR, _LAYER_NORM, _BATCH_NORM = (F.linear, torch._C._nn.linear), F.layer_norm, F.batch_norm


def row_dimension(
    operation: Operation, values: Sequence[Value], dims: Mapping[int, int | None]
) -> int | None:
    """Returns the dimension of the rows in the result of an operation.

    Args:
        operation: Operation.
        values: Values of the trace, by number.
        dims: Dimension of the rows in each value that rows reach, by number. None if they are
            merged with another dimension, or if it is not known.

    Returns:
        Dimension, or None if the operation is none of those that are known.
    """
    if len(operation.makes) != 1:
        return None
    reached = [number for number in operation.reads if number in dims]
    found = {dims[number] for number in reached}
    dim = found.pop() if len(found) == 1 else None
    if dim is None:
        return None
    func, made = operation.func, values[operation.makes[0]]
    shapes = {values[number].shape for number in reached}
    if func in _ELEMENTWISE:
        # Others are spread over it from behind: not a tensor that has more dimensions.
        return dim if shapes == {made.shape} else None
    first = operation.args[0] if operation.args else None
    if not (isinstance(first, Ref) and reached == [first.number]):
        return None
    size = len(values[first.number].shape)
    if func in _OF_IMAGES:
        return 0 if dim == 0 and size == _OF_IMAGES[func] + 2 == len(made.shape) else None
    if func is _BATCH_NORM:
        return 0 if dim == 0 and not _argument(operation, 5, "training", False) else None
    if func in _LINEAR:
        return dim if dim < size - 1 else None
    if func is _LAYER_NORM:
        normalized = _argument(operation, 1, "normalized_shape", made.shape)
        return dim if dim < size - len(normalized) else None
    return None


def _argument(operation: Operation, place: int, name: str, default: Any) -> Any:
    if len(operation.args) > place:
        return operation.args[place]
    return operation.kwargs.get(name, default)
