"""Things that are no parameters change while rows are served: what code reads, hooks, modes.

Each case is a source, run anew for every loop, in which `work(part, x)` is what frozen code does
with its values, and a source that changes something. All end in the plain loop's weights.
"""

import builtins
import functools
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .harness import Loop, Result, differs

# What code reads, and how it is changed.
READS: dict[str, tuple[str, str]] = {
    "a global": ("FACTOR = 2.0\ndef work(part, x): return x * FACTOR", "FACTOR = 3.0"),
    "a global in a comprehension": (
        "FACTOR = 2.0\ndef work(part, x): return sum([x * FACTOR for _ in range(2)])",
        "FACTOR = 3.0",
    ),
    "a global in a lambda in a lambda": (
        "FACTOR = 2.0\ndef work(part, x): return (lambda y: (lambda z: z * FACTOR)(y))(x)",
        "FACTOR = 3.0",
    ),
    "a global in an inner function": (
        "FACTOR = 2.0\ndef work(part, x):\n def inner(y): return y * FACTOR\n return inner(x)",
        "FACTOR = 3.0",
    ),
    "a global in a generator": (
        "FACTOR = 2.0\ndef some(x): yield x * FACTOR\ndef work(part, x): return next(some(x))",
        "FACTOR = 3.0",
    ),
    "a global six calls deep": (
        "FACTOR = 2.0\ndef f5(x): return x * FACTOR\ndef f4(x): return f5(x)\n"
        "def f3(x): return f4(x)\ndef f2(x): return f3(x)\ndef f1(x): return f2(x)\n"
        "def work(part, x): return f1(x)",
        "FACTOR = 3.0",
    ),
    "a global that shadows a builtin": (
        "def work(part, x): return x * abs(-2.0)", "abs = lambda value: 3.0"
    ),
    "a global that holds a member of an enumeration": (
        "import enum\nKind = enum.Enum('Kind', 'A B')\nKIND = Kind.A\n"
        "def work(part, x): return x * (2.0 if KIND is Kind.A else 3.0)",
        "KIND = Kind.B",
    ),
    "a function of functools.wraps": (
        "FACTOR = 2.0\ndef wrap(function):\n @functools.wraps(function)\n"
        " def inner(*args): return function(*args)\n return inner\n"
        "@wrap\ndef work(part, x): return x * FACTOR",
        "FACTOR = 3.0",
    ),
    "what a wrapped function encloses": (
        "held = [2.0]\ndef wrap(box):\n def outer(function):\n  @functools.wraps(function)\n"
        "  def inner(part, x): return function(part, x) * box[0]\n  return inner\n return outer\n"
        "@wrap(held)\ndef work(part, x): return x",
        "held[0] = 3.0",
    ),
    "a function of functools.lru_cache": (
        "FACTOR = 2.0\n@functools.lru_cache\ndef factor(): return FACTOR\n"
        "def work(part, x): return x * factor()",
        "FACTOR = 3.0\nfactor.cache_clear()",
    ),
    "a list in a partial": (
        "held = [2.0]\ndef given(box, part, x): return x * box[0]\n"
        "work = functools.partial(given, held)",
        "held[0] = 3.0",
    ),
    "a default": (
        "def work(part, x, factor=2.0): return x * factor", "work.__defaults__ = (3.0,)"
    ),
    "a list that is a default": (
        "def work(part, x, factor=[2.0]): return x * factor[0]", "work.__defaults__[0][0] = 3.0"
    ),
    "a default by name": (
        "def work(part, x, *, factor=2.0): return x * factor",
        "work.__kwdefaults__['factor'] = 3.0",
    ),
    "code": (
        "def work(part, x): return x * 2.0\ndef other(part, x): return x * 3.0",
        "work.__code__ = other.__code__",
    ),
    "a bound builtin": (
        "held = {'factor': 2.0}\nget = held.get\ndef work(part, x): return x * get('factor')",
        "held['factor'] = 3.0",
    ),
    "a bound builtin that is exchanged": (
        "get = {'factor': 2.0}.get\ndef work(part, x): return x * get('factor')",
        "get = {'factor': 3.0}.get",
    ),
    "an attribute of a class in a registry": (
        "class Scale: factor = 2.0\nREGISTRY = {'scale': Scale}\n"
        "def work(part, x): return x * REGISTRY['scale'].factor",
        "Scale.factor = 3.0",
    ),
    "a class in a registry": (
        "class Scale: factor = 2.0\nclass Other: factor = 3.0\nREGISTRY = {'scale': Scale}\n"
        "def work(part, x): return x * REGISTRY['scale'].factor",
        "REGISTRY['scale'] = Other",
    ),
    "the factory of a defaultdict": (
        "import collections\nFACTOR = 2.0\nheld = collections.defaultdict(lambda: FACTOR)\n"
        "def work(part, x): return x * held.pop('factor', None or held['factor'])",
        "FACTOR = 3.0",
    ),
    "an attribute of a base class": (
        "class Base: factor = 2.0\nclass Scale(Base): pass\n"
        "def work(part, x): return x * Scale.factor",
        "Base.factor = 3.0",
    ),
    "an attribute in front of that of a base class": (
        "class Base: factor = 2.0\nclass Scale(Base): pass\n"
        "def work(part, x): return x * Scale.factor",
        "Scale.factor = 3.0",
    ),
    "an attribute of a metaclass": (
        "class Meta(type): factor = 2.0\nclass Scale(metaclass=Meta): pass\n"
        "def work(part, x): return x * Scale.factor",
        "Meta.factor = 3.0",
    ),
    "an attribute of a class, by text": (
        "class Scale: factor = 2.0\ndef work(part, x): return x * getattr(Scale, 'fac' + 'tor')",
        "Scale.factor = 3.0",
    ),
    "an attribute of a namespace, by text": (
        "held = types.SimpleNamespace(factor=2.0)\n"
        "def work(part, x): return x * getattr(held, 'fac' + 'tor')",
        "held.factor = 3.0",
    ),
    "an object with slots": (
        "class Scale:\n __slots__ = ('factor',)\nheld = Scale()\nheld.factor = 2.0\n"
        "def work(part, x): return x * held.factor",
        "held.factor = 3.0",
    ),
    "a method of a helper": (
        "FACTOR = 2.0\nclass Helper:\n def scale(self, x): return x * FACTOR\n"
        "helper = Helper()\ndef work(part, x): return helper.scale(x)",
        "FACTOR = 3.0",
    ),
    "an attribute of a helper's class": (
        "class Helper:\n factor = 2.0\n def scale(self, x): return x * self.factor\n"
        "helper = Helper()\ndef work(part, x): return helper.scale(x)",
        "Helper.factor = 3.0",
    ),
    "an object that is called": (
        "FACTOR = 2.0\nclass Helper:\n def __call__(self, x): return x * FACTOR\n"
        "helper = Helper()\ndef work(part, x): return helper(x)",
        "FACTOR = 3.0",
    ),
    "a property": (
        "FACTOR = 2.0\nclass Helper:\n @property\n def factor(self): return FACTOR\n"
        "helper = Helper()\ndef work(part, x): return x * helper.factor",
        "FACTOR = 3.0",
    ),
    "a class method": (
        "FACTOR = 2.0\nclass Helper:\n @classmethod\n def factor(cls): return FACTOR\n"
        "def work(part, x): return x * Helper.factor()",
        "FACTOR = 3.0",
    ),
    "a method of a base class": (
        "FACTOR = 2.0\nclass Base:\n def scale(self, x): return x * FACTOR\n"
        "class Helper(Base):\n def scale(self, x): return super().scale(x)\n"
        "helper = Helper()\ndef work(part, x): return helper.scale(x)",
        "FACTOR = 3.0",
    ),
    "__getattr__": (
        "FACTOR = 2.0\nclass Helper:\n def __getattr__(self, name): return FACTOR\n"
        "helper = Helper()\ndef work(part, x): return x * helper.factor",
        "FACTOR = 3.0",
    ),
    "a context manager": (
        "import contextlib\nFACTOR = 2.0\n@contextlib.contextmanager\ndef given(): yield FACTOR\n"
        "def work(part, x):\n with given() as factor: return x * factor",
        "FACTOR = 3.0",
    ),
    "a module that is imported inside": (
        "import sys\nsys.modules['users_config'].FACTOR = 2.0\n"
        "def work(part, x):\n import users_config\n return x * users_config.FACTOR",
        "sys.modules['users_config'].FACTOR = 3.0",
    ),
    "a module in a module": (
        "package = types.ModuleType('package')\n"
        "package.config = types.ModuleType('package.config')\n"
        "package.config.FACTOR = 2.0\ndef work(part, x): return x * package.config.FACTOR",
        "package.config.FACTOR = 3.0",
    ),
    "a function of torch": (
        "def work(part, x): return F.hardswish(x)", "F.hardswish = lambda x: torch.relu(x) * 3"
    ),
    "a tensor": (
        "SCALE = torch.tensor(2.0)\ndef work(part, x): return x * SCALE", "SCALE.data.mul_(1.5)"
    ),
    "a tensor that is exchanged": (
        "SCALE = torch.tensor(2.0)\ndef work(part, x): return x * SCALE",
        "SCALE = torch.tensor(3.0)",
    ),
    "a tensor in a list": (
        "held = [torch.tensor(2.0)]\ndef work(part, x): return x * held[0]",
        "held[0] = torch.tensor(3.0)",
    ),
    "a key that is an object": (
        "key = types.SimpleNamespace\nheld = {key: (1.0, 2.0)}\n"
        "def work(part, x): return x * held[key][1]",
        "held[key] = (1.0, 3.0)",
    ),
    "the names of parameters": (
        "def work(part, x):\n"
        " names = [name for name, _ in part.named_parameters()]\n"
        " return x * (2.0 if 'last.weight' in names else 3.0)",
        "part._modules['renamed'] = part._modules.pop('last')\n"
        "part.__dict__['last'] = part.renamed",
    ),
    "a number on a module": (
        "def work(part, x): return x * getattr(part, 'factor', 2.0)", "part.factor = 3.0"
    ),
    "a list on a module": (
        "def work(part, x): return x * part.held[0]", "part.held[0] = 3.0"
    ),
    "a plain tensor on a module": (
        "def work(part, x): return x * part.scale", "part.scale = torch.tensor(3.0)"
    ),
    "a buffer that is registered again": (
        "def work(part, x): return x * part.buffer",
        "part.register_buffer('buffer', torch.full((64,), 3.0))",
    ),
    "a hook that is added": (
        "def work(part, x): return x",
        "part.last.register_forward_hook(lambda module, args, output: output * 3)",
    ),
    "a hook before": (
        "def work(part, x): return x",
        "part.last.register_forward_pre_hook(lambda module, args: (args[0] * 3,))",
    ),
    "forward of one module": (
        "def work(part, x): return x",
        "part.last.forward = lambda x: F.linear(x, part.last.weight) * 3",
    ),
    "forward of a class": (
        "def work(part, x): return x",
        "type(part).forward = lambda self, x: self.last(self.first(x.flatten(1))) * 3",
    ),
    "a submodule": (
        "def work(part, x): return x",
        "part.last = nn.Linear(64, 64).requires_grad_(False)",
    ),
    "an activation": ("def work(part, x): return x", "part.act = nn.Sigmoid()"),
    "the mode, by hand": (
        "def work(part, x): return x * (2.0 if part.training else 3.0)",
        "part.__dict__['training'] = not part.training",
    ),
    "the class of a module": (
        "def work(part, x): return x\nclass Other(Body):\n"
        " def forward(self, x): return self.last(self.first(x.flatten(1))) * 3",
        "part.__class__ = Other",
    ),
    "the environment": (
        "import os\ndef work(part, x): return x * float(os.environ.get('FACTOR', '2'))",
        "os.environ['FACTOR'] = '3'",
    ),
    "a context variable": (
        "import contextvars\nheld = contextvars.ContextVar('held', default=2.0)\n"
        "def work(part, x): return x * held.get()",
        "held.set(3.0)",
    ),
    "what a thread holds": (
        "import threading\nheld = threading.local()\nheld.factor = 2.0\n"
        "def work(part, x): return x * held.factor",
        "held.factor = 3.0",
    ),
    "a dictionary behind others": (
        "import collections\nfirst = {'factor': 2.0}\n"
        "held = collections.ChainMap({}, types.MappingProxyType(first))\n"
        "def work(part, x): return x * held['factor']",
        "first['factor'] = 3.0",
    ),
    "an array behind a view": (
        "import array\nfirst = array.array('d', [2.0])\nheld = memoryview(first)\n"
        "def work(part, x): return x * held[0]",
        "first[0] = 3.0",
    ),
    "a number of C": (
        "import ctypes\nheld = ctypes.c_double(2.0)\ndef work(part, x): return x * held.value",
        "held.value = 3.0",
    ),
    "an object by a weak reference": (
        "import weakref\nclass Held: factor = 2.0\nheld = Held()\nshown = weakref.ref(held)\n"
        "def work(part, x): return x * shown().factor",
        "held.factor = 3.0",
    ),
    "the middle of a long list": (
        "held = [2.0] * 5000\ndef work(part, x): return x * held[2500]", "held[2500] = 3.0"
    ),
    "an attribute of a function": (
        "def scale(x): return x * scale.factor\nscale.factor = 2.0\n"
        "def work(part, x): return scale(x)",
        "scale.factor = 3.0",
    ),
    "a function of functools.singledispatch": (
        "@functools.singledispatch\ndef scale(x): return x * 2\n"
        "def work(part, x): return scale(x)",
        "scale.register(torch.Tensor, lambda x: x * 3)",
    ),
    "a function of python": (
        "import math\nreal = math.sqrt\ndef work(part, x): return x * math.sqrt(4.0)",
        "math.sqrt = lambda x: real(x) + 1",
    ),
    "a builtin": (
        "import builtins\nreal = builtins.pow\ndef work(part, x): return x * pow(2, 1)",
        "builtins.pow = lambda *given: real(*given) + 1",
    ),
    "a method of tensors": (
        "def work(part, x): return x.relu()",
        "torch.Tensor.relu = lambda self: self.clamp(min=0.1)",
    ),
    "a method of a class of torch's": (
        "part_of = nn.Identity()\ndef work(part, x): return part_of(x)",
        "nn.Identity.forward = lambda self, x: x * 3",
    ),
    "an attribute of a module in a list": (
        "class Scale(nn.Module):\n factor = None\n"
        " def forward(self, x): return x * self.factor\n"
        "held = [Scale()]\nheld[0].factor = 2.0\ndef work(part, x): return held[0](x)",
        "held[0].factor = 3.0",
    ),
    "an attribute of a compiled module": (
        "class Scale(nn.Module):\n factor = None\n"
        " def forward(self, x): return x * self.factor\n"
        "plain = Scale()\nplain.factor = 2.0\nheld = torch.compile(plain, backend='eager')\n"
        "def work(part, x): return held(x)",
        "plain.factor = 3.0",
    ),
    "a hook put in by hand": (
        "def work(part, x): return x",
        "part.last._forward_hooks[-1] = lambda module, args, output: output * 3",
    ),
    "what runs around all modules": (
        "real = nn.Module._call_impl\n"
        "def twice(self, *args):\n"
        " out = real(self, *args)\n return out * 3 if isinstance(self, nn.Tanh) else out\n"
        "def work(part, x): return x",
        "nn.Module._call_impl = twice",
    ),
}  # fmt: skip

# What the pass itself changes: it depends on the passes before.
COUNTS = {
    "a number": (
        "count = 0\n"
        "def work(part, x):\n"
        " global count\n count += 1\n return x * (2.0 if count < 14 else 3.0)"
    ),
    "a number in a list": (
        "count = [0]\n"
        "def work(part, x):\n count[0] += 1\n return x * (2.0 if count[0] < 14 else 3.0)"
    ),
    "an iterator": (
        "import itertools\nfactors = itertools.chain([2.0] * 14, itertools.repeat(3.0))\n"
        "def work(part, x): return x * next(factors)"
    ),
    "a generator": (
        "def count():\n"
        " for n in range(1000): yield 2.0 if n < 14 else 3.0\n"
        "factors = count()\ndef work(part, x): return x * next(factors)"
    ),
}


class Model(nn.Module):
    """A frozen body, run by a user's function, and a trained head."""

    def __init__(self, space: dict[str, Any]) -> None:
        super().__init__()
        self.body, self.head = space["Body"](space), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def body_of(space: dict[str, Any]) -> type[nn.Module]:
    """Makes a class of its own for each loop, for classes are changed, too."""

    class Body(nn.Module):
        def __init__(self, space: dict[str, Any]) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(192, 64), nn.Linear(64, 64)
            self.act, self.held, self.scale = nn.Tanh(), [2.0], torch.tensor(2.0)
            self.register_buffer("buffer", torch.full((64,), 2.0))
            self.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return space["work"](self, self.last(self.act(self.first(x.flatten(1)))))

    return Body


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    sys.modules["users_config"] = types.ModuleType("users_config")
    yield
    del sys.modules["users_config"]


def loop_of(source: str, change: str) -> Loop:
    space: dict[str, Any] = {}

    def make() -> Model:
        space.clear()
        space.update(
            __name__="users_code", torch=torch, nn=nn, F=F, functools=functools, types=types
        )
        space["Body"] = body_of(space)
        exec(source, space)
        return Model(space)

    def then(model: Any) -> None:
        space["part"] = model.body
        exec(change, space)

    return Loop(make, {3: then}, epochs=5)


def _run(patch: pytest.MonkeyPatch, source: str, change: str, cached: bool) -> Result:
    """Runs a loop, after which everything that it may have exchanged is put back."""
    for holder, name in EXCHANGED:
        patch.setattr(holder, name, getattr(holder, name))
    patch.setattr(torch.Tensor, "relu", torch.Tensor.relu, raising=False)
    patch.setenv("FACTOR", "2")
    return loop_of(source, change).run(cached)


# What changes put something else in the place of.
EXCHANGED: list[tuple[Any, str]] = [
    (F, "hardswish"), (math, "sqrt"), (builtins, "pow"), (nn.Identity, "forward"),
    (nn.Module, "_call_impl"),
]  # fmt: skip


@pytest.mark.parametrize("case", READS)
def test_what_code_reads_changes_and_the_weights_are_the_plain_ones(case: str) -> None:
    source, change = READS[case]
    with pytest.MonkeyPatch.context() as patch:
        plain = _run(patch, source, change, cached=False)
    with pytest.MonkeyPatch.context() as patch:
        cached = _run(patch, source, change, cached=True)
    assert sum(cached.served[:3]) > 0, "nothing was at stake"
    assert not differs(plain, cached)
    assert differs(loop_of(source, "pass").run(cached=False), plain), "nothing has changed"


@pytest.mark.parametrize("case", COUNTS)
def test_a_pass_that_depends_on_those_before_ends_in_the_plain_weights(case: str) -> None:
    plain = loop_of(COUNTS[case], "pass").run(cached=False)
    assert not differs(plain, loop_of(COUNTS[case], "pass").run(cached=True))


def test_a_debugger_goes_on_and_changes_are_seen() -> None:
    called: list[str] = []

    def debugger(frame: types.FrameType, event: str, argument: Any) -> None:
        called.append(frame.f_code.co_name)

    source, change = READS["a global"]
    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        cached = loop_of(source, change).run(cached=True)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is debugger
    assert called.count("work") > 1
    assert not differs(loop_of(source, change).run(cached=False), cached)
