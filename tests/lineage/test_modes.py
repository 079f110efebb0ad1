"""Regions without gradients, in inference mode, and under autocast."""

import pytest
import torch
from torch import nn

from .harness import rows, wired


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("everything", [False, True])
def test_a_region_around_the_call_is_right(region, everything):
    frozen = (lambda name: True) if everything else ["body"]
    result = wired(lambda self, x: self.head(self.body(x)), around=region, frozen=frozen)
    assert result.skipped


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_a_region_around_frozen_work_inside_the_model_is_right(region):
    def way(self, x):
        with region():
            q = self.body(x)
        return self.head(q.clone())

    assert wired(way).ran[-1] == "linear"


def test_a_region_around_trained_work_stops_its_gradient():
    def way(self, x):
        q = self.body(x)
        with torch.no_grad():
            stopped = self.mid(q)
        return self.head(stopped + self.mid(q))

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 2


def test_a_decorated_module_of_frozen_work_is_left_out():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        @torch.no_grad()
        def forward(self, x):
            return torch.relu(self.inner(x))

    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        return {"deep": nn.Sequential(nn.Linear(6, 6), Quiet())}

    assert "linear" in wired(way, parts=parts).left_out


def test_gradients_switched_by_hand_stay_as_the_model_leaves_them():
    def way(self, x):
        torch.set_grad_enabled(False)
        q = self.body(x)
        torch.set_grad_enabled(True)
        return self.head(q)

    assert wired(way).skipped


def test_a_switch_that_a_module_leaves_on_is_left_on():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            torch.set_grad_enabled(False)
            return self.inner(x)

    def way(self, x):
        q = self.deep(x)
        off = torch.is_grad_enabled()
        stopped = self.head(q)
        torch.set_grad_enabled(True)
        assert not off
        return stopped + self.head(q)

    result = wired(way, parts=lambda: {"deep": nn.Sequential(Switch(), nn.ReLU())})
    assert result.skipped


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_around_the_call_is_right(cached):
    def around():
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)

    def way(self, x):
        return self.head(torch.relu(self.body(x)))

    result = wired(way, around=around)
    assert result.trace.values[result.plan.cut.kept[0]].dtype == torch.bfloat16
    assert result.skipped


def test_autocast_inside_the_model_is_right():
    def way(self, x):
        with bfloat16():
            q = self.body(x)
            with torch.autocast("cpu", enabled=False):
                q = self.body(q.float())
            q = q + self.mid(q)
        return self.head(q.float())

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 4


def test_autocast_on_the_forward_method_is_right():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x):
            return torch.softmax(self.inner(x), -1)

    def way(self, x):
        return self.head(self.deep(x).float())

    result = wired(way, parts=lambda: {"deep": nn.Sequential(nn.Linear(6, 6), Cast())})
    assert "linear" in result.left_out


def test_frozen_weights_that_autocast_has_cached_leave_trained_ones_alone():
    def way(self, x):
        q = self.body(x)
        shared = self.body[0]
        return self.head(shared(torch.tanh(self.mid(q))) + q)

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"], around=bfloat16)
    assert result.skipped


def test_a_default_dtype_that_the_model_sets_is_heeded():
    def way(self, x):
        q = self.body(x)
        torch.set_default_dtype(torch.float64)
        try:
            scale = torch.tensor(2.0)
        finally:
            torch.set_default_dtype(torch.float32)
        return self.head((q * scale).float())

    assert wired(way).skipped


def test_a_device_context_in_the_model_is_heeded():
    def way(self, x):
        with torch.device("cpu"):
            q = self.body(x) + torch.ones(6)
        return self.head(q)

    assert wired(way).skipped


def test_a_function_mode_of_the_user_sees_the_work_that_runs():
    from torch.overrides import TorchFunctionMode

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            return made * 2 if func is torch.nn.functional.linear else made

    assert wired(lambda self, x: self.head(self.body(x)), around=Doubling).skipped


def test_a_function_mode_of_the_user_inside_the_model_is_right():
    from torch.overrides import TorchFunctionMode

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            return made * 2 if func is torch.nn.functional.linear else made

    def way(self, x):
        with Doubling():
            q = self.body(x)
        return self.head(q)

    wired(way, may_leave=True)


def test_a_dispatch_mode_of_the_user_around_the_call_is_right():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert wired(lambda self, x: self.head(self.body(x)), around=Counting, batch=rows(6)).skipped
