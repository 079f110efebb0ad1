"""Kernels in which the last bits of a row may depend on its place in the batch.

On a CPU, a kernel that treats each element alone works on blocks of elements by vector
instructions, and on the elements that are left at the end by other code. Exponentials and the like
have other last bits there: with `F.silu`, about one element in a thousand. The end of a batch is
the end of its last row, so the same row has other bits in another place. Too few elements differ
for comparisons of some batches to show it, so the sizes decide. The same holds for the last rows of
a product of a matrix and a vector, and for sums and softmax along the first dimension, if the rows
lie side by side behind it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Tensor = torch.Tensor

# Bytes of a block: two vectors of the widest instructions.
_BLOCK = 128
# Number of elements beyond which threads share a kernel. Each of them has an end of its own.
_GRAIN = 32768
# Functions of one element whose results are rounded correctly, or are no results of arithmetic.
_EXACT = frozenset((
    "abs", "neg", "sign", "sgn", "positive", "relu", "threshold", "hardtanh", "leaky_relu",
    "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "mul", "div",
    "true_divide", "divide", "multiply", "subtract", "sqrt", "square", "reciprocal", "floor",
    "ceil", "round", "trunc", "where", "masked_fill", "fill", "zero", "copy", "clone",
    "_to_copy", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "logical_and",
    "logical_or", "logical_xor", "logical_not", "nan_to_num", "signbit",
))  # fmt: skip
# Functions of one element that torch does not list as such.
_UNLISTED = frozenset(("glu", "log_sigmoid_forward", "hardswish"))
# Products of matrices. If the other one is a vector, the last rows are computed by other code.
_PRODUCTS, _ROWS_AT_A_TIME = frozenset(("mm", "addmm", "mv", "addmv", "linear")), 4
# Sums with a factor are rounded in more than one way.
_SUMS = ("add", "sub")
# Functions along some dimensions, and the number of vectors that they work on at a time if other
# dimensions lie behind those in memory.
_ALONG = {"_softmax": 1, "_log_softmax": 1, "_safe_softmax": 1, "sum": 4, "mean": 4}
_VECTOR = 64
# Numbers as exponents for which a power is a product or a square root.
_PLAIN_POWERS = (0.5, 1, 2, 3)
_ROUNDED_ONCE = (torch.float32, torch.float64)


def may_move_bits(overload: Any) -> bool:
    """Returns whether the last bits of a row may depend on its place in the batch.

    Sizes and arguments decide it for each call.

    Args:
        overload: Operator overload, as a dispatch mode gets it.
    """
    name = name_of(overload)
    if name in _SUMS or name in _PRODUCTS or name in _ALONG:
        return True
    return name not in _EXACT and (torch.Tag.pointwise in overload.tags or name in _UNLISTED)


def moves_bits(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> bool:
    """Returns whether the last bits of a row may depend on its place in the batch.

    Args:
        overload: Operator overload, for which `may_move_bits` is true.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output: Result of the call.
    """
    name = name_of(overload)
    made = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(made, Tensor) or made.device.type != "cpu" or made.dim() == 0:
        return False
    if made.layout != torch.strided or not made.numel():
        return False
    given = [one for one in args if isinstance(one, Tensor)]
    if not any(one.is_floating_point() or one.is_complex() for one in (made, *given)):
        return False
    if name in _ALONG:
        # Softmax works on a copy if its argument is not contiguous.
        worked_on = made if "softmax" in name else given[0]
        return _ends_within_vectors(worked_on, args[1] if len(args) > 1 else None, _ALONG[name])
    if name in _PRODUCTS:
        by_vector = name in ("mv", "addmv") or 1 in made.shape[-2:]
        return by_vector and made.numel() % _ROWS_AT_A_TIME > 0
    if name in _SUMS and kwargs.get("alpha", 1) == 1:
        return False
    if name == "pow" and not isinstance(args[1], Tensor) and args[1] in _PLAIN_POWERS:
        return False
    if name == "rsqrt" and made.dtype in _ROUNDED_ONCE:
        return False
    return _has_an_end(made, given)


def _ends_within_vectors(given: Tensor, along: int | Sequence[int] | None, vectors: int) -> bool:
    """Returns whether a function along the first dimension treats some last elements otherwise.

    Args:
        given: Tensor that the function works on.
        along: Dimension or dimensions that it works along.
        vectors: Number of vectors that it works on at a time.
    """
    # A sum over the first of two dimensions is nearly always one over rows.
    if given.dim() < (3 if vectors > 1 else 2):
        return False
    dims = {one % given.dim() for one in ((along,) if isinstance(along, int) else along or ())}
    behind = sorted(set(range(given.dim())) - dims, key=lambda dim: given.stride(dim))
    if 0 not in dims or not behind:
        return False
    size = 1
    for dim in behind:
        # If they do not lie together, each row has an end of its own.
        if given.stride(dim) != size and given.shape[dim] > 1:
            return False
        size *= given.shape[dim]
    return size * given.element_size() % (_VECTOR * vectors) > 0


def name_of(overload: Any) -> str:
    """Returns the name of a kernel, which is the same for its form that writes in place."""
    return str(overload._schema.name.removeprefix("aten::").rstrip("_"))


def _has_an_end(made: Tensor, given: Sequence[Tensor]) -> bool:
    """Returns whether the innermost loop of a kernel passes over rows, and ends within a block."""
    operands = [made]
    for one in given:
        if one.numel() > 1:
            try:
                operands.append(one.expand(made.shape))
            except RuntimeError:  # an argument of another shape, such as halves that are multiplied
                continue
    dims = [dim for dim in range(made.dim()) if made.shape[dim] > 1]
    dims.sort(key=lambda dim: made.stride(dim))
    inner = dims[:1]
    for dim in dims[1:]:
        size = math.prod(made.shape[one] for one in inner)
        first = inner[0]
        if any(one.stride(dim) != size * one.stride(first) for one in operands):
            break
        inner.append(dim)
    # Rows are in the first dimension, or in the second one behind the time.
    if not {0, 1}.intersection(inner):
        return False
    size = math.prod(made.shape[one] for one in inner)
    block = _BLOCK // min(one.element_size() for one in operands)
    threads = min(torch.get_num_threads(), -(-made.numel() // _GRAIN))
    if threads > 1 and -(-made.numel() // threads) % block:
        return True
    return size % block > 0
