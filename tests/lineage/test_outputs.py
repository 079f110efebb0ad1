"""Values and outputs of every kind."""

import dataclasses
import types
import typing
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from .harness import Wired, check, rows, wired

IMAGES = rows(3, 4, 4)


def test_channels_last_values_keep_their_strides():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.head = nn.Conv2d(4, 3, 1)

        def forward(self, x):
            q = self.body(x.to(memory_format=torch.channels_last))
            assert q.is_contiguous(memory_format=torch.channels_last)
            return self.head(q), q

    result = check(lambda: Model().to(memory_format=torch.channels_last), IMAGES)
    kept = [result.trace.values[number] for number in result.plan.cut.kept]
    assert [value.stride[1] for value in kept] == [1]


FORMS = {
    "float64": lambda q: q.double(),
    "bfloat16": lambda q: q.bfloat16(),
    "float16": lambda q: q.half(),
    "complex64": lambda q: torch.complex(q, q * 2),
    "conjugate": lambda q: torch.complex(q, q * 2).conj(),
    "negative view": lambda q: torch.complex(q, q * 2).conj().imag,
    "int64": lambda q: (q * 9).long(),
    "int8": lambda q: (q * 9).to(torch.int8),
    "bool": lambda q: q > 0,
    "float8": lambda q: q.to(torch.float8_e4m3fn),
    "no rows": lambda q: q[:0],
    "no columns": lambda q: q[:, :0],
    "scalar": lambda q: q.sum(),
    "expanded": lambda q: q[:, :1].expand(4, 6),
    "expanded row": lambda q: q[0].expand(4, 6),
    "expanded scalar": lambda q: q.mean().expand(4, 6),
    "transposed": lambda q: q.t(),
    "stepped": lambda q: q[::2, ::3],
    "offset": lambda q: q[1:, 2:],
    "flipped": lambda q: q.flip(0),
    "windows": lambda q: q.unfold(1, 3, 1),
    "strided": lambda q: q.as_strided((3, 2), (1, 6)),
    "diagonal": lambda q: q.diagonal(),
    "not a number": lambda q: q / 0 - q / 0,
    "minus zero": lambda q: q * -0.0,
    "permuted": lambda q: q.view(2, 2, 6).permute(2, 0, 1),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_kept_value_keeps_its_form(form, deep):
    class Forming(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return form(self.inner(x))

    def way(self, x):
        q = self.deep(x) if deep else form(self.body(x))
        numbers = torch.view_as_real(q.resolve_conj()) if q.is_complex() else q
        total = torch.nan_to_num(numbers.float()).sum() * self.weight
        return self.head(x) + total, q, q.stride(), q.is_conj(), q.is_neg()

    def parts():
        deep = nn.Sequential(nn.Linear(6, 6), Forming())
        return {"deep": deep, "weight": nn.Parameter(torch.tensor(2.0))}

    result = wired(way, parts=parts, frozen=["body", "deep"])
    assert result.skipped


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor | None = None
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Fixed:
    logits: torch.Tensor
    features: torch.Tensor


class Named(typing.NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class ModelOutput(OrderedDict):
    """Entries that are attributes as well, as Hugging Face's outputs have."""

    def __init__(self, **given):
        super().__init__()
        for key, value in given.items():
            self[key] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def to_tuple(self):
        return tuple(self[key] for key in self)


class Slotted:
    __slots__ = ("features", "logits")

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


class Dynamic:
    def __init__(self, logits, features):
        self.layers = [types.SimpleNamespace(keys=logits, values=features)]
        self.seen = 3


Pair = namedtuple("Pair", "logits features")
OUTPUTS = {
    "a tuple": lambda a, b: (a, b),
    "a list": lambda a, b: [a, [b, None]],
    "a dictionary": lambda a, b: {"logits": a, "more": {"features": b, 3: (b, "text")}},
    "a dataclass": lambda a, b: Output(a, b),
    "a frozen dataclass": lambda a, b: Fixed(a, b),
    "a named tuple": lambda a, b: Named(a, b),
    "a namedtuple": lambda a, b: Pair(a, b),
    "a namespace": lambda a, b: types.SimpleNamespace(logits=a, features=b),
    "a model output": lambda a, b: ModelOutput(logits=a, features=b),
    "an ordered dictionary": lambda a, b: OrderedDict(b=b, a=a),
    "an object": lambda a, b: Dynamic(a, b),
    "a tensor twice": lambda a, b: [a, b, a, b],
    "a view and its base": lambda a, b: [a, b, b[0], b.t()],
    "numbers": lambda a, b: (a, 3, 2.5, True, None, "x", b.shape, b.dtype),
    "a size": lambda a, b: (a, b.size(), b.stride()),
    "a set": lambda a, b: (a, frozenset([3])),
    "max": lambda a, b: (a, b.max(1)),
    "topk": lambda a, b: (a, torch.topk(b, 2)),
}


@pytest.mark.parametrize("made", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_keeps_its_kind(made):
    def way(self, x):
        q = self.body(x)
        return made(self.head(q), q * 2)

    assert wired(way).skipped


@pytest.mark.parametrize("made", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_of_a_frozen_module_keeps_its_kind(made):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            q = self.inner(x)
            return made(q, q[:, :3] * 2)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(torch.relu(x))

    def first(value):
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, dict):
            return first(next(iter(value.values())))
        return first(next(iter(value))) if isinstance(value, (list, tuple)) else None

    def way(self, x):
        output = self.deep(x)
        q = first(output)
        q = q if q is not None else getattr(output, "logits", None)
        q = output.layers[0].keys if q is None else q
        return self.head(q[:, :3]), output

    def build():
        model = Wired(way, deep=Outer())
        model.head = nn.Linear(3, 2)
        return model

    assert check(build, rows(6)).skipped


def test_an_output_with_slots_is_right():
    def way(self, x):
        q = self.body(x)
        return Slotted(self.head(q), q * 2)

    assert wired(way).skipped


def test_a_slotted_output_of_a_frozen_module_is_right():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            q = self.inner(x)
            return Slotted(q, q * 2)

    def way(self, x):
        output = self.deep(x)
        return self.head(output.logits + output.features), output.features

    result = wired(way, parts=lambda: {"deep": Inner()})
    assert result.ran == ["linear"]


def test_a_frozen_output_that_is_returned_alone_is_kept():
    result = check(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), rows(6), frozen=["0"])
    assert result.ran == []
    assert len(result.plan.cut.kept) == 1


def test_an_input_that_is_returned_is_that_very_object():
    def way(self, x):
        return x, self.head(self.body(x)), x.view(-1)

    from cachefreeze import lineage

    result = wired(way)
    (x,), _ = rows(6)(1)
    _, kept, _ = lineage.capture(result.plan, result.case.model, x)
    output, _ = lineage.replay(result.plan, kept, result.case.model, x)
    assert output[0] is x
    assert output[2].data_ptr() == x.data_ptr()


def test_a_parameter_that_is_returned_is_that_very_object():
    result = wired(lambda self, x: (self.body[0].weight, self.head(self.body(x))))
    assert result.skipped


def test_a_batch_in_objects_is_taken():
    def batch(seed):
        (x,), _ = rows(6)(seed)
        held = {"ids": (x * 9).long(), "more": [x, {"mask": x > 0}]}
        return (Output(x, x * 2),), {"held": held, "bag": types.SimpleNamespace(y=x - 1)}

    def way(self, given, held, bag):
        q = self.body(given.logits) * held["more"][1]["mask"] + bag.y + held["ids"]
        return self.head(q + given.features)

    assert wired(way, batch=batch).ran == ["linear"]


def test_sparse_and_nested_values_inside_frozen_work_are_right():
    def way(self, x):
        q = self.body(x)
        sparse = (q * (q > 0)).detach().to_sparse()
        q = torch.sparse.mm(sparse, torch.eye(6)) + q
        return self.head(q)

    assert wired(way).skipped


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_value_inside_frozen_work_is_right():
    def way(self, x):
        q = self.body(x).detach()
        return self.head(torch.quantize_per_tensor(q, 0.1, 0, torch.qint8).dequantize())

    assert wired(way).skipped
