"""Work that torch functions do not show, and work that must not be looked at from near."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .harness import check, rows, wired


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.tanh(x) * scale

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2) * ctx.scale * 1.5, None


class Pure(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2, x + 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, one, two):
        return one * 3 + two * ctx.saved_tensors[0]


def test_a_custom_function_in_frozen_work_is_right():
    def way(self, x):
        return self.head(sum(Pure.apply(Doubled.apply(self.body(x), 2.0))))

    assert wired(way).left_out.count("linear") == 2


def test_a_custom_function_deep_in_frozen_work_is_right():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return sum(Pure.apply(Doubled.apply(self.inner(x), 2.0)))

    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        return {"deep": nn.Sequential(nn.Linear(6, 6), nn.Sequential(Inner()))}

    assert wired(way, parts=parts).left_out.count("linear") == 2


def test_a_custom_function_in_trained_work_is_right():
    def way(self, x):
        q = Doubled.apply(self.mid(self.body(x)), 2.0)
        return self.head(sum(Pure.apply(q)))

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 2


def test_a_custom_function_between_frozen_and_trained_work_is_right():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, weight):
            ctx.save_for_backward(q, weight)
            return q @ weight

        @staticmethod
        def backward(ctx, grad):
            q, weight = ctx.saved_tensors
            wanted = ctx.needs_input_grad
            return grad @ weight.t() if wanted[0] else None, q.t() @ grad

    def way(self, x):
        return Product.apply(torch.relu(self.body(x)), self.head.weight.t())

    assert wired(way).left_out.count("linear") == 2


def test_a_custom_function_that_saves_a_value_made_before_is_right():
    """The function is given a late value, and backward takes it after the pass."""

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, trained, frozen):
            ctx.save_for_backward(frozen)
            return trained.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], None

    def way(self, x):
        q = self.body(x)
        return Saving.apply(self.head(q), q[:, :3] * 2) + self.head(torch.tanh(q))

    assert wired(way).skipped


def test_a_custom_function_that_writes_in_place_is_right():
    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.add_(1)

        @staticmethod
        def backward(ctx, grad):
            return grad

    def way(self, x):
        q = self.body(x)
        before = q.sum(1, keepdim=True)
        Shift.apply(q)
        return self.head(q * before)

    assert wired(way).skipped


def test_frozen_work_through_numpy_is_right():
    def way(self, x):
        q = self.body(x).detach().numpy()
        q = torch.from_numpy(np.sort(q, axis=1) * 2)
        return self.head(self.body(q))

    result = wired(way)
    assert result.skipped


def test_frozen_work_through_numpy_inside_a_module_is_right():
    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            q = np.asarray(self.inner(x).detach())
            return torch.as_tensor(np.sort(q, axis=1))

    result = wired(
        lambda self, x: self.head(self.body(self.sorting(x))),
        parts=lambda: {"sorting": Sorting()},
    )
    assert result.skipped


def test_trained_work_through_numpy_is_right():
    def way(self, x):
        q = self.mid(self.body(x))
        scale = torch.from_numpy(np.abs(q.detach().numpy()).max(1, keepdims=True))
        return self.head(q / scale)

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 2


def test_numbers_through_python_lists_are_right():
    def way(self, x):
        q = torch.tensor(self.body(x).tolist())
        return self.head(self.body(q))

    assert wired(way).skipped


@torch.library.custom_op("cachefreeze_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * by).to(x.dtype)


@torch.library.custom_op("cachefreeze_tests::shifted", mutates_args=("x",))
def shifted(x: torch.Tensor, by: float) -> None:
    x.numpy()[:] += by


@torch.library.custom_op("cachefreeze_tests::noised", mutates_args=())
def noised(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(x.shape)


@pytest.mark.parametrize("deep", [False, True])
def test_a_custom_operation_is_left_out(deep):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                return scaled(self.inner(x), 2.0)

    inner = (lambda: nn.Sequential(Inner(), nn.ReLU())) if deep else Inner
    result = wired(lambda self, x: self.head(self.inner(x)), parts=lambda: {"inner": inner()})
    assert result.left_out.count("linear") == 1
    assert result.ran == ["linear"]


def test_a_custom_operation_that_writes_is_right():
    def way(self, x):
        with torch.no_grad():
            q = self.body(x)
            before = q * 2
            shifted(q, 1.5)
            q = self.body(q)
        return self.head(q + before)

    assert wired(way).skipped


@pytest.mark.parametrize("deep", [False, True])
def test_a_custom_operation_that_draws_is_live(deep):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                return torch.relu(noised(self.inner(x)))

    inner = (lambda: nn.Sequential(nn.Linear(6, 6), Inner())) if deep else Inner
    result = wired(lambda self, x: self.head(self.inner(x)), parts=lambda: {"inner": inner()})
    assert "relu" in result.ran
    assert "linear" in result.left_out


@torch.jit.script
def scripted_function(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2 + x.mean()


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x)) + 1


def test_a_scripted_function_in_the_model_itself_is_right():
    def way(self, x):
        return self.head(self.body(scripted_function(self.body(x))))

    assert wired(way).skipped


def test_a_scripted_function_inside_a_frozen_module_is_right():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return scripted_function(self.inner(x))

    def way(self, x):
        return self.head(self.body(self.deep(x)))

    result = wired(way, parts=lambda: {"deep": nn.Sequential(nn.Linear(6, 6), Inner())})
    assert "linear" in result.left_out


@pytest.mark.parametrize("how", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(4, 6))])
def test_a_scripted_module_that_is_frozen_is_left_out(how):
    def way(self, x):
        return self.head(self.body(self.scripted(x)))

    result = wired(way, parts=lambda: {"scripted": how(Scriptable())}, leaves=True)
    assert result.ran == ["linear"]


def test_a_scripted_module_that_is_trained_is_right():
    def way(self, x):
        return self.head(self.scripted(self.body(x)))

    result = wired(way, parts=lambda: {"scripted": torch.jit.script(Scriptable())}, frozen=["body"])
    assert result.left_out.count("linear") == 2


def test_vmap_in_frozen_and_trained_work_is_right():
    def way(self, x):
        q = torch.func.vmap(lambda row: torch.tanh(row) * row.sum())(self.body(x))
        t = self.mid(q)
        return self.head(torch.func.vmap(lambda row: row / row.norm())(t))

    wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])


def test_vmap_inside_a_frozen_module_is_right():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return torch.func.vmap(lambda row: torch.tanh(row) * 2)(self.inner(x))

    def way(self, x):
        return self.head(self.body(self.deep(x)))

    result = wired(way, parts=lambda: {"deep": nn.Sequential(nn.Linear(6, 6), Inner())})
    assert "linear" in result.left_out


def test_func_grad_inside_the_model_is_right():
    def way(self, x):
        slope = torch.func.grad(lambda y: torch.tanh(self.body(y)).sum())(x)
        return self.head(slope)

    wired(way)


VIEWS = {
    "T": lambda q: q.T.T,
    "mT": lambda q: q.mT.mT,
    "H": lambda q: q.H.H,
    "mH": lambda q: q.mH.mH,
    "data": lambda q: q.data * 2,
    "real": lambda q: q.real,
    "imag": lambda q: torch.complex(q, q * 2).imag,
    "as_subclass": lambda q: q.as_subclass(torch.Tensor),
    "Parameter": lambda q: nn.Parameter(q, requires_grad=False) * 2,
    "Buffer": lambda q: nn.Buffer(q) * 2,
    "torch.Tensor": lambda q: torch.Tensor(q) * 2,
    "new_tensor": lambda q: q.detach().clone().new_tensor(q.tolist()),
    "asarray": lambda q: torch.asarray(q) * 2,
    "dlpack": lambda q: torch.from_dlpack(q.detach()) * 2,
    "untyped_storage": lambda q: torch.empty(0).set_(q.detach().untyped_storage(), 0, (4, 6)) * 2,
    "base": lambda q: q[1:]._base * 2 if q[1:]._base is not None else q,
    "vstack of rows": lambda q: torch.vstack(list(q)),
    "einsum": lambda q: torch.einsum("ij,kj->ki", q, torch.eye(6)[:, :]).t(),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_another_way_to_look_at_a_value_is_right(view, deep):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return view(self.inner(x)) + 1

    def way(self, x):
        q = self.deep(x) if deep else view(self.body(x)) + 1
        return self.head(self.body(q))

    result = wired(way, parts=lambda: {"deep": nn.Sequential(nn.Linear(6, 6), Inner())})
    assert "linear" in result.left_out


def masked(seed):
    (x,), _ = rows(5, 8)(seed)
    lengths = torch.tensor([5, 3, 2, 4]) if seed == 1 else torch.tensor([2, 5, 5, 1])
    return (x, torch.arange(5) >= lengths[:, None]), {}


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


def layer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder(nested):
    return nn.TransformerEncoder(layer(), 2, enable_nested_tensor=nested)


FAST = {
    "attention": (attention, lambda m, x, mask: m(x, x, x, key_padding_mask=mask)[0]),
    "attention alone": (
        attention,
        lambda m, x, mask: m(x, x, x, key_padding_mask=mask, need_weights=False)[0],
    ),
    "layer": (layer, lambda m, x, mask: m(x, src_key_padding_mask=mask)),
    "encoder": (lambda: encoder(False), lambda m, x, mask: m(x, src_key_padding_mask=mask)),
    "nested encoder": (lambda: encoder(True), lambda m, x, mask: m(x, src_key_padding_mask=mask)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_torchs_attention_computes_what_it_computes_when_nobody_looks(name, train, grad):
    made, call = FAST[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fast, self.head = nn.Linear(8, 8), made(), nn.Linear(8, 3)

        def forward(self, x, mask):
            q = call(self.fast, self.first(x), mask)
            return self.head(F.pad(q, (0, 0, 0, 5 - q.shape[1])).mean(1))

    around = torch.enable_grad if grad else torch.no_grad
    result = check(Model, masked, train=train, around=around)
    assert result.ran == ["linear"]
    whole = check(made, masked, call=lambda m: lambda x, k: call(m, x, k), train=train)
    assert whole.skipped


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_trained_encoder_behind_frozen_work_is_right():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), encoder(False)

        def forward(self, x, mask):
            return self.head(self.first(x), src_key_padding_mask=mask)

    for train in (False, True):
        assert check(Model, masked, train=train).left_out == ["linear"]
