"""Templates of arguments and outputs: made from objects, compared with objects, and filled again.

A template is an argument or an output in which every tensor is replaced by a `Ref`, the number of
its value in the trace. Templates hold no tensor.
"""

import dataclasses
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

# Types whose objects are compared by type and equality. Most others are compared by identity.
_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(Ellipsis), torch.Size, torch.dtype,
    torch.device, torch.layout, torch.memory_format, range,
)  # fmt: skip
PLAIN_KINDS = frozenset(_PLAIN)
# Types whose objects a pass does not create: a filled template holds the very same object.
_FIXED: tuple[type, ...] = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
    functools.partial, torch.nn.Module, torch.Generator, np.generic,
)  # fmt: skip
_CLOSED = (*_FIXED, np.ndarray)
_MANY_NODES = 2000
_LARGE_ARRAY = 1 << 16


class Ref(NamedTuple):
    """A tensor in a template.

    Attributes:
        number: Number of the tensor's value in its trace.
    """

    number: int


class Unknown:
    """An object that a template cannot describe. Only the very same object matches it."""

    __slots__ = ("what",)

    def __init__(self, what: Any) -> None:
        # A strong reference would keep alive what the object holds, which may be tensors.
        try:
            self.what: Callable[[], Any] = weakref.ref(what)
        except TypeError:
            self.what = _nothing

    def matches(self, value: Any) -> bool:
        """Returns whether a value is this object."""
        return value is not None and self.what() is value


def _nothing() -> None:
    return None


class Built(NamedTuple):
    """An object with attributes in a template, such as a dataclass or a Hugging Face `ModelOutput`.

    Attributes:
        kind: Class of the object.
        items: Templates of the entries, if the object is a dictionary. Otherwise None.
        attributes: Templates of the entries of its `__dict__`.
    """

    kind: type
    items: dict[Any, Any] | None
    attributes: dict[str, Any]


class NotDescribedError(Exception):
    """An object cannot be rebuilt from a template."""


def _named(value: Any) -> bool:
    """Returns whether a value is a named tuple of Python, or of torch like the result of `max`."""
    kind = type(value)
    return isinstance(value, tuple) and (
        hasattr(kind, "_fields") or kind.__module__ == "torch.return_types"
    )


def _tuple(kind: Any, items: list[Any]) -> Any:
    # The class may have a `__new__` of its own, with other arguments.
    return tuple.__new__(kind, items) if hasattr(kind, "_fields") else kind(items)


def is_tensor(value: Any) -> bool:
    """Returns whether an object is a tensor. Faster than `isinstance`, which torch overloads."""
    return kind_is(type(value), torch.Tensor)


_known_kinds: dict[tuple[type, Any], bool] = {}


def kind_is(kind: type, of: type | tuple[type, ...]) -> bool:
    """Returns whether a class is a subclass of others.

    Results are cached, since torch overloads `issubclass` with a slow function.

    Args:
        kind: Class of an object.
        of: Class or classes.
    """
    found = _known_kinds.get((kind, of))
    if found is None:
        found = _known_kinds[kind, of] = issubclass(kind, of)
    return found


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in an object in a fixed order, each once.

    Tuples, lists, sets, mappings, slices, dataclasses and objects with a `__dict__` are opened, for
    example the key-value cache of a language model. Modules and functions are not.
    """
    yield from (tensor for tensor, _ in _walk(value))


def outputs(value: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yields the tensors in an output, each with whether the caller probably reads it.

    Callers read what is in containers of Python and in dataclasses. They often do not read what is
    in other objects, such as a key-value cache.
    """
    yield from _walk(value)


def _walk(root: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    seen: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, True)]
    while stack and len(seen) < _MANY_NODES:
        value, plain = stack.pop()
        if type(value) in PLAIN_KINDS or kind_is(type(value), _CLOSED) or id(value) in seen:
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
    """Returns the template of the arguments of a call.

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
    if kind_is(kind, _FIXED) and not getattr(value, "__closure__", None):
        return value
    return Unknown(value)


def matches(template: Any, value: Any, number: Callable[[Any], int]) -> bool:
    """Returns whether an argument is equal to what its template describes.

    Args:
        template: Template that `describe` returned.
        value: Argument in another pass.
        number: Function from a tensor to the number of its value. Negative if the value is unknown.
    """
    kind = type(template)
    if kind is Ref:
        return is_tensor(value) and number(value) == template.number
    if template is value and kind in PLAIN_KINDS:
        return True
    if type(value) is not kind:
        if kind is Built and type(value) is template.kind:
            return (
                template.items is None or matches(template.items, dict(value), number)
            ) and matches(template.attributes, vars(value), number)
        return kind is Unknown and template.matches(value)
    if kind is tuple or kind is list or _named(template):
        if len(template) != len(value):
            return False
        pairs = zip(template, value, strict=True)
        return all(matches(one, other, number) for one, other in pairs)
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
        # Two NaN are equal here. 0.0 and -0.0 are not.
        return (template == value and repr(template) == repr(value)) or (
            template != template and value != value
        )
    return False


def fill(template: Any, tensor: Callable[[int], Any]) -> Any:
    """Builds arguments or an output from a template.

    Args:
        template: Template that `describe` or `describe_objects` returned.
        tensor: Function from the number of a value to a tensor.
    """
    kind = type(template)
    if kind is Ref:
        return tensor(template.number)
    if kind in PLAIN_KINDS:
        return template
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
    made: Any = template.kind.__new__(template.kind)  # type: ignore[call-overload]
    if template.items is not None:
        # A `__setitem__` of the class may do more, and its results are among the attributes
        # already.
        put = OrderedDict.__setitem__ if isinstance(made, OrderedDict) else dict.__setitem__
        for key, item in template.items.items():
            put(made, key, fill(item, tensor))
    if template.attributes:
        vars(made).update({key: fill(item, tensor) for key, item in template.attributes.items()})
    return made


def describe_objects(
    value: Any, number: Callable[[torch.Tensor], int], fixed: Container[int]
) -> tuple[Any, list[int]]:
    """Returns a template from which `fill` can build such objects again.

    Unlike `describe`, it opens objects with a `__dict__`, such as a key-value cache.

    Args:
        value: Arguments or output of a module.
        number: Function from a tensor to the number of its value.
        fixed: Identities of objects that existed before the pass, so that they cannot be rebuilt.

    Returns:
        Template, and the identities of the mutable objects in it, in order.

    Raises:
        NotDescribedError: An object cannot be rebuilt.
    """
    identities: list[int] = []
    describing = _Describing(number, fixed, identities)
    return describing.of(value, ()), identities


class _Describing:
    def __init__(
        self,
        number: Callable[[torch.Tensor], int],
        fixed: Container[int],
        identities: list[int],
    ) -> None:
        self._number, self._fixed, self._identities = number, fixed, identities

    def of(self, value: Any, above: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind in PLAIN_KINDS or kind_is(kind, _FIXED):
            return value
        if is_tensor(value):
            return Ref(self._number(value))
        if kind is slice:
            return describe(value, self._number)
        if id(value) in self._fixed or id(value) in above or len(self._identities) > _MANY_NODES:
            raise NotDescribedError(
                f"a {kind.__name__} that is older than the pass, or contains itself"
            )
        if not isinstance(value, tuple):
            self._identities.append(id(value))
        above = (*above, id(value))
        if kind is tuple or kind is list:
            return kind([self.of(item, above) for item in value])
        if kind is dict:
            return {key: self.of(item, above) for key, item in value.items()}
        if _named(value):
            return _tuple(kind, [self.of(item, above) for item in value])
        if not _is_plain_object(value):
            raise NotDescribedError(f"a {kind.__name__}")
        items = None
        if isinstance(value, dict):
            items = {key: self.of(item, above) for key, item in value.items()}
        held = {key: self.of(item, above) for key, item in vars(value).items()}
        return Built(kind, items, held)


# Objects of these classes have contents outside of their `__dict__`.
_HOLDING_MORE = (
    list, set, tuple, frozenset, int, float, complex, str, bytes, bytearray, deque, np.ndarray
)  # fmt: skip


def _is_plain_object(value: Any) -> bool:
    """Returns whether an object has only a `__dict__`, and entries if it is a dictionary."""
    kind = type(value)
    is_dict = isinstance(value, dict)
    if not is_dict and kind.__reduce_ex__ is not object.__reduce_ex__:  # type: ignore[comparison-overlap]
        return False
    if isinstance(value, _HOLDING_MORE) or not hasattr(value, "__dict__"):
        return False
    return not any(getattr(base, "__slots__", ()) for base in kind.__mro__)


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
    """Yields the tensors in a result, each with the number of its value."""
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
