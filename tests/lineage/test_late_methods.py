"""A late value gives what a plain tensor gives, under every method and property of Tensor."""

import warnings

import pytest
import torch

from .harness import look, seed_all
from .late_values import Pair

BELONGS_TO_THE_CLASS = """
    __new__ __init__ __init_subclass__ __subclasshook__ __class__ __torch_function__
    __torch_dispatch__ _make_subclass _make_wrapper_subclass _make_dtensor __class_getitem__
    __annotations__
"""
LEFT_OUT = dict.fromkeys(BELONGS_TO_THE_CLASS.split(), "belongs to the class, not to a value") | {
    "__doc__": "is the text of the class",
    "__module__": "is the name of the class's module",
    "__dir__": "lists what the class has",
    "__weakref__": "is python's own",
    "__getstate__": "is python's own, and no part of pickling a tensor",
    "__dict__": "is python's own: what a late value keeps of itself lies in it",
    "_python_dispatch": "says that the class has a dispatch function, and is torch's own",
    "__sizeof__": "is python's own: the size of the object",
    "__firstlineno__": "is python's own, from 3.13 on: the line of the class in its file",
    "__static_attributes__": "is python's own, from 3.13 on: what methods of the class set",
}
# Results that hold addresses, or memory that nobody has written: compared by their type.
FORM = """
    data_ptr const_data_ptr mutable_data_ptr storage untyped_storage _typed_storage storage_type
    _cdata __hash__ new new_empty new_empty_strided resize_ resize_as_ resize resize_as
    _backward_hooks __dlpack__ __repr__ __reduce_ex__ __reduce__ _reduce_ex_internal empty_like
    _storage share_memory_ register_hook __cuda_array_interface__
"""
ONLY_FORM = set(FORM.split())
# Those that reach into memory are tried in processes of their own, in `test_late_memory`.
ELSEWHERE = ("share_memory_", "set_", "resize_", "is_shared", "_storage", "storage")
SHAPES = {
    "float": lambda model, q: [q * 2 for _ in range(len(ARGUMENTS))],
    "gradient": lambda model, q: [q * 2 for q in [q.requires_grad_()] for _ in ARGUMENTS],
    "integer": lambda model, q: [(q * 9).long() for _ in ARGUMENTS],
    "complex": lambda model, q: [torch.complex(q, q) for _ in ARGUMENTS],
}


def one(seed):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


ARGUMENTS = [
    lambda: ((), {}),
    lambda: ((1,), {}),
    lambda: ((0, 1), {}),
    lambda: ((0.25,), {}),
    lambda: ((0.25, 0.75), {}),
    lambda: ((one(7),), {}),
    lambda: ((one(7).long(),), {}),
    lambda: ((one(7), one(8)), {}),
    lambda: ((one(7) > 0, 0.5), {}),
    lambda: ((0, torch.tensor([1, 0])), {}),
    lambda: ((0, torch.zeros(4, 4).long()), {}),
    lambda: ((0, torch.zeros(4, 4).long(), one(9)), {}),
    lambda: ((0, torch.tensor([1, 0]), one(9)[:2]), {}),
    lambda: ((torch.float64,), {}),
    lambda: (((2, 8),), {}),
    lambda: ((torch.arange(4.0),), {}),
    lambda: ((torch.arange(4.0), torch.arange(4.0)), {}),
    lambda: ((one(7) > 0, one(8)), {}),
    lambda: (((4, 4), (1, 4)), {}),
    lambda: ((one(7).reshape(1, 4, 4), one(8).reshape(1, 4, 4)), {}),
    lambda: ((0, 0, 0), {}),
    lambda: ((lambda *args: None,), {}),
]
# Methods that take what none of the arguments above is.
SPECIAL = {
    "__delattr__": lambda: (("name",), {}),
    "__format__": lambda: (("",), {}),
    "__getattribute__": lambda: (("shape",), {}),
    "__reduce_ex__": lambda: ((2,), {}),
    "__setattr__": lambda: (("name", 3), {}),
    "__setstate__": lambda: ((None,), {}),
    "addr": lambda: ((torch.arange(4.0), torch.arange(4.0)), {}),
    "align_to": lambda: (("...",), {}),
    "put_": lambda: ((torch.tensor([0]), torch.tensor([1.0])), {}),
    "refine_names": lambda: (("a", "b"), {}),
    "rename": lambda: (("a", "b"), {}),
    "rename_": lambda: (("a", "b"), {}),
    "scatter_reduce": lambda: ((0, torch.zeros(4, 4).long(), one(9), "sum"), {}),
    "scatter_reduce_": lambda: ((0, torch.zeros(4, 4).long(), one(9), "sum"), {}),
    "index_reduce": lambda: ((0, torch.tensor([1, 0]), one(9)[:2], "mean"), {}),
    "index_reduce_": lambda: ((0, torch.tensor([1, 0]), one(9)[:2], "mean"), {}),
    "unflatten": lambda: ((0, (2, 2)), {}),
    "swapaxes": lambda: ((0, 1), {}),
    "stft": lambda: ((4,), {"window": torch.ones(4), "return_complex": True}),
    "index_put": lambda: (((torch.tensor([0]),), torch.ones(4)), {}),
    "index_put_": lambda: (((torch.tensor([0]),), torch.ones(4)), {}),
    "einsum": lambda: ((), {}),
    "is_set_to": lambda: ((torch.ones(1),), {}),
    "map_": lambda: ((one(9), lambda a, b: a + b), {}),
    "map2_": lambda: ((one(9), one(8), lambda a, b, c: a + b * c), {}),
    "apply_": lambda: ((lambda a: a + 1,), {}),
    "module_load": lambda: ((one(9),), {}),
}


def outcome(value, name, arguments):
    """Describes what a method gives, or raises, and what it does to the value."""
    seed_all(3)
    args, kwargs = arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            member = getattr(value, name)
            made = member(*args, **kwargs) if callable(member) else member
            if name in ONLY_FORM:
                return "made", type(made).__name__
            with torch.no_grad():
                return "made", look(dense(made)), look((dense(value), args))
        except Exception as error:
            return type(error).__name__, str(error)


def short(found):
    return f"{str(found)[:90]}...{str(found[-1])[-90:]}" if len(str(found)) > 200 else str(found)


def dense(value):
    if isinstance(value, (tuple, list)):
        return [dense(item) for item in value]
    if isinstance(value, torch.Tensor) and value.layout != torch.strided:
        return "sparse", value.layout, value.to_dense()
    return value.dequantize() if isinstance(value, torch.Tensor) and value.is_quantized else value


def names():
    found = [name for name in dir(torch.Tensor) if name not in LEFT_OUT]
    return [name for name in found if name not in ELSEWHERE]


def faults(kind):
    """Yields where a late value gives something else."""
    pair = Pair(SHAPES[kind])
    for name in names():
        arguments = [*ARGUMENTS[:-1], SPECIAL.get(name, ARGUMENTS[-1])]
        plain, late = pair.plain(), pair.late()
        gave = raised = 0
        for place in (len(arguments) - 1, *range(len(arguments) - 1)):
            if gave == 2:
                break
            expected = outcome(plain[place], name, arguments[place])
            gave += expected[0] == "made"
            raised += expected[0] != "made"
            if expected[0] != "made" and raised > 1:
                continue
            seen = outcome(late[place], name, arguments[place])
            if seen[0] != expected[0] or (seen[0] == "made" and seen != expected):
                yield f"{name}, arguments {place}: {short(expected)}, not {short(seen)}"


@pytest.mark.parametrize("kind", SHAPES)
def test_every_method_of_a_late_value_gives_what_it_gives_on_a_plain_tensor(kind):
    found = list(faults(kind))
    assert not found, f"{len(found)}: " + "\n".join(line[:300] for line in found[:60])
