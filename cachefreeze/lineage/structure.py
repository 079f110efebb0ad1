"""Opens arguments and outputs, and compares them with what a trace has seen.

A *template* is an argument or an output in which every tensor is replaced by a `Ref`, the number of
its value. Templates hold no tensor.
"""

import dataclasses
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

# Values that are compared by type and equality. Anything else is compared by identity.
_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(Ellipsis), torch.Size, torch.dtype,
    torch.device, torch.layout, torch.memory_format, range,
)  # fmt: skip
PLAIN_KINDS = frozenset(_PLAIN)
# Objects that a pass does not make anew: they stay what they are when an output is built again.
_FIXED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_FIXED = (*_FIXED, functools.partial, torch.nn.Module, torch.Generator)
_MANY_NODES = 2000
_LARGE_ARRAY = 1 << 16


class Ref(NamedTuple):
    """Stands for a tensor in a template.

    Attributes:
        number: Number of the tensor's value in its trace.
    """

    number: int


class Unknown:
    """Stands for an object that a template cannot describe. It matches only that very object."""

    __slots__ = ("what",)

    def __init__(self, what: Any) -> None:
        # A strong reference would keep alive what the object holds, which may be tensors.
        try:
            self.what: Callable[[], Any] = weakref.ref(what)
        except TypeError:
            self.what = _nothing

    def matches(self, value: Any) -> bool:
        """Says whether a value is the object."""
        return value is not None and self.what() is value


def _nothing() -> None:
    return None


class Built(NamedTuple):
    """Stands for an object with attributes, such as a dataclass or a Hugging Face `ModelOutput`.

    Attributes:
        kind: Class of the object.
        items: Templates of the entries, for a class that is a dictionary. Otherwise None.
        attributes: Templates of what its `__dict__` holds.
    """

    kind: type
    items: dict[Any, Any] | None
    attributes: dict[str, Any]


class NotDescribed(Exception):
    """Raised for an object that cannot be built again from a template."""


def _named(value: Any) -> bool:
    """Says whether a value is a named tuple, of python's kind or of torch's (`torch.max`)."""
    kind = type(value)
    return isinstance(value, tuple) and (
        hasattr(kind, "_fields") or kind.__module__ == "torch.return_types"
    )


def _tuple(kind: Any, items: list[Any]) -> Any:
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in an object, opened by type, in a fixed order and each object once.

    Tuples, lists, mappings, slices, dataclasses and objects with a `__dict__` are opened, such as
    the key-value cache of a language model. Modules and functions are not.
    """
    yield from (tensor for tensor, _ in _walk(value))


def outputs(value: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields the tensors in an output, each with whether a caller is likely to read it.

    What lies in a container of python's or in a dataclass is meant to be read. What lies in other
    objects, such as a key-value cache, often is not.
    """
    yield from _walk(value)


def _walk(root: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    seen: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, True)]
    while stack and len(seen) < _MANY_NODES:
        value, plain = stack.pop()
        if type(value) in PLAIN_KINDS or isinstance(value, (*_FIXED, np.ndarray)) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_tensor(value):
            yield value, plain
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += [(item, plain) for item in reversed(list(value))]
        elif isinstance(value, slice):
            stack += [(item, plain) for item in (value.step, value.stop, value.start)]
        elif isinstance(value, Mapping):
            stack += [(item, plain) for item in reversed(list(value.values()))]
        elif isinstance(getattr(value, "__dict__", None), dict):
            held = plain and (
                dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace)
            )
            stack += [(item, held) for item in reversed(list(vars(value).values()))]


def describe(value: Any, number: Callable[[torch.Tensor], int]) -> Any:
    """Makes the template of a call's arguments.

    Args:
        value: Arguments, a tuple or a dictionary.
        number: Function from a tensor to the number of its value.
    """
    kind = type(value)
    if kind in PLAIN_KINDS:
        return value
    if is_tensor(value):
        return Ref(number(value))
    if kind is tuple or kind is list:
        return kind([describe(item, number) for item in value])
    if kind is dict:
        return {key: describe(item, number) for key, item in value.items()}
    if kind is slice:
        return slice(*[describe(part, number) for part in (value.start, value.stop, value.step)])
    if _named(value):
        return _tuple(kind, [describe(item, number) for item in value])
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGE_ARRAY:
        return value.copy()
    if isinstance(value, (*_FIXED, np.generic)) and not getattr(value, "__closure__", None):
        return value
    return Unknown(value)


def matches(template: Any, value: Any, number: Callable[[Any], int]) -> bool:
    """Says whether an argument is what its template describes.

    Args:
        template: Template made by `describe`.
        value: Argument of another pass.
        number: Function from a tensor to the number of its value, negative for an unknown one.
    """
    kind = type(template)
    if kind is Ref:
        return is_tensor(value) and number(value) == template.number
    if type(value) is not kind:
        return kind is Unknown and template.matches(value)
    if kind is tuple or kind is list or _named(template):
        if len(template) != len(value):
            return False
        for one, other in zip(template, value, strict=True):
            if not matches(one, other, number):
                return False
        return True
    if kind is dict:
        if template.keys() != value.keys():
            return False
        return all(matches(one, value[key], number) for key, one in template.items())
    if kind is slice:
        return (
            matches(template.start, value.start, number)
            and matches(template.stop, value.stop, number)
            and matches(template.step, value.step, number)
        )
    if isinstance(template, np.ndarray):
        return template.shape == value.shape and bool((template == value).all())
    if template is value:
        return True
    if kind in PLAIN_KINDS or isinstance(template, np.generic):
        # Both may be "not a number". A sign of zero is a difference.
        return (template == value and repr(template) == repr(value)) or (
            template != template and value != value
        )
    return False


def fill(template: Any, tensor: Callable[[int], Any]) -> Any:
    """Builds arguments or an output from a template.

    Args:
        template: Template made by `describe` or `describe_output`.
        tensor: Function from a value's number to a tensor.
    """
    kind = type(template)
    if kind is Ref:
        return tensor(template.number)
    if kind is tuple or kind is list:
        return kind([fill(item, tensor) for item in template])
    if kind is dict:
        return {key: fill(item, tensor) for key, item in template.items()}
    if kind is slice:
        return slice(*[fill(one, tensor) for one in (template.start, template.stop, template.step)])
    if kind is Built:
        return _build(template, tensor)
    if _named(template):
        return _tuple(kind, [fill(item, tensor) for item in template])
    return template


def _build(template: Built, tensor: Callable[[int], Any]) -> Any:
    made = template.kind.__new__(template.kind)
    if template.items is not None:
        # A class may do more in its own `__setitem__`: that is among its attributes already.
        put = OrderedDict.__setitem__ if isinstance(made, OrderedDict) else dict.__setitem__
        for key, item in template.items.items():
            put(made, key, fill(item, tensor))
    if template.attributes:
        vars(made).update({key: fill(item, tensor) for key, item in template.attributes.items()})
    return made


def describe_output(value: Any, number: Callable[[torch.Tensor], int], fixed: set[int]) -> Any:
    """Makes the template of an output, from which `fill` builds such an output again.

    Args:
        value: Output of a module.
        number: Function from a tensor to the number of its value.
        fixed: Identities of objects that the call did not make.

    Raises:
        NotDescribed: The output holds something that cannot be built again.
    """
    return _describe_output(value, number, fixed, [_MANY_NODES], {})


def _describe_output(
    value: Any,
    number: Callable[[torch.Tensor], int],
    fixed: set[int],
    left: list[int],
    above: dict[int, Any],
) -> Any:
    left[0] -= 1
    if id(value) in above or left[0] < 0:
        raise NotDescribed("it holds itself, or too much")
    kind = type(value)
    if kind in PLAIN_KINDS or isinstance(value, _FIXED):
        return value
    if is_tensor(value):
        return Ref(number(value))
    if id(value) in fixed:
        raise NotDescribed(f"it holds a {kind.__name__} that was there before")
    above = {**above, id(value): None}

    def inner(item: Any) -> Any:
        return _describe_output(item, number, fixed, left, above)

    if kind is tuple or kind is list:
        return kind([inner(item) for item in value])
    if kind is dict:
        return {key: inner(item) for key, item in value.items()}
    if _named(value):
        return _tuple(kind, [inner(item) for item in value])
    is_dict = isinstance(value, dict)
    own = kind.__reduce_ex__ is object.__reduce_ex__ or is_dict
    if not own or not hasattr(value, "__dict__") or (isinstance(value, (list, set, tuple))):
        raise NotDescribed(f"it holds a {kind.__name__}")
    if any(getattr(base, "__slots__", ()) for base in kind.__mro__):
        raise NotDescribed(f"it holds a {kind.__name__}, which has slots")
    items = {key: inner(item) for key, item in value.items()} if is_dict else None
    return Built(kind, items, {key: inner(item) for key, item in vars(value).items()})


def numbers(template: Any) -> Iterator[int]:
    """Yields the numbers of the values in a template."""
    kind = type(template)
    if kind is Ref:
        yield template.number
    elif kind is Built:
        yield from numbers(template.items)
        yield from numbers(template.attributes)
    elif kind is dict:
        for item in template.values():
            yield from numbers(item)
    elif isinstance(template, (tuple, list)):
        for item in template:
            yield from numbers(item)
    elif kind is slice:
        yield from numbers((template.start, template.stop, template.step))


def bound(template: Any, result: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the tensors of a result, each with the number of its value.

    Args:
        template: Template of the result.
        result: Result of the same call in another pass.
    """
    if isinstance(template, Ref):
        yield template.number, result
    elif isinstance(template, Built):
        yield from bound(template.items, result)
        yield from bound(template.attributes, vars(result))
    elif isinstance(template, (tuple, list)):
        for one, other in zip(template, result, strict=True):
            yield from bound(one, other)
    elif isinstance(template, dict):
        for key, one in template.items():
            yield from bound(one, result[key])
