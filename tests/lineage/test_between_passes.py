"""What changes between two passes: a replay goes on plainly and says why, or is right."""

import pytest
import torch
from torch import nn

from cachefreeze import lineage


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Dropout(), nn.Linear(6, 6)))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.body.requires_grad_(False)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


class Setting:
    def __init__(self):
        torch.manual_seed(0)
        self.model, self.x = Model().eval(), torch.randn(4, 6)
        _, trace = lineage.trace(self.model, self.x)
        self.plan = lineage.Plan(trace, lineage.crossing_cut(trace))
        _, self.kept, _ = lineage.capture(self.plan, self.model, self.x)

    def plain(self):
        torch.manual_seed(3)
        self.model.zero_grad()
        output = self.model(self.x)
        return self._seen(output)

    def _seen(self, output):
        if output.requires_grad:
            output.square().sum().backward()
        grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        return [output.detach(), *grads, *(b.clone() for b in self.model.buffers())]

    def replayed(self):
        torch.manual_seed(3)
        self.model.zero_grad()
        own = {number: tensor.clone() for number, tensor in self.kept.items()}
        output, report = lineage.replay(self.plan, own, self.model, self.x)
        return self._seen(output), report


@pytest.fixture
def setting():
    return Setting()


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def left(setting, expected, words):
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert words in report.left
    assert not report.skipped


def test_an_unchanged_model_is_replayed(setting):
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert not report.left
    assert report.skipped


def test_a_parameter_that_is_thawed_is_trained_and_can_be_frozen_again(setting):
    weight = setting.model.body[1][1].weight
    weight.requires_grad_(True)
    left(setting, setting.plain(), "parameters of `body.1.1` were frozen, unfrozen or replaced")
    weight.requires_grad_(False)
    weight.grad = None
    assert setting.replayed()[1].skipped


def test_a_parameter_that_is_frozen_later_is_told(setting):
    setting.model.head.bias.requires_grad_(False)
    left(setting, setting.plain(), "parameters of `head` were frozen, unfrozen or replaced")


def test_training_mode_is_heeded_and_eval_mode_brings_the_plan_back(setting):
    setting.model.train()
    start = {k: v.clone() for k, v in setting.model.state_dict().items()}
    expected = setting.plain()
    setting.model.load_state_dict(start)
    left(setting, expected, "training mode")
    setting.model.eval()
    assert setting.replayed()[1].skipped


def test_the_training_mode_of_one_part_is_heeded(setting):
    setting.model.body[1][0].train()
    left(setting, setting.plain(), "body.1.0` is in training mode")


@pytest.mark.parametrize("deep", [False, True])
def test_a_hook_added_between_passes_runs(setting, deep):
    part = setting.model.body[1] if deep else setting.model.body
    seen = []
    handle = part.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    expected = setting.plain()
    left(setting, expected, "hooks")
    assert seen == [1, 1]
    handle.remove()
    assert setting.replayed()[1].skipped


def test_a_hook_in_the_place_of_another_one_runs():
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(4, 6)
    handle = model.body.register_forward_hook(lambda module, args, output: output * 2)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    _, kept, _ = lineage.capture(plan, model, x)
    handle.remove()
    model.body.register_forward_hook(lambda module, args, output: output * 3)
    expected = model(x)
    output, _ = lineage.replay(plan, kept, model, x)
    assert torch.equal(output, expected)


def test_a_replaced_parameter_is_taken(setting):
    setting.model.body[0].weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    left(setting, setting.plain(), "parameters of `body.0` were frozen, unfrozen or replaced")


def test_a_replaced_trained_parameter_is_taken(setting):
    """Nothing that is left out depends on it, so frozen work is left out as before."""
    setting.model.head.weight = nn.Parameter(torch.randn(3, 6))
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.skipped
    assert not report.left


def test_a_replaced_module_is_taken(setting):
    setting.model.body[1][1] = nn.Linear(6, 6).requires_grad_(False)
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.left


def test_a_module_that_is_taken_out_is_left_out(setting):
    setting.model.norm = nn.Identity()
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.left


def test_a_module_that_is_put_in_is_called(setting):
    setting.model.body[1].append(nn.Tanh())
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.left


def test_a_forward_method_that_is_exchanged_is_called(setting):
    """As some libraries put their own forward method on an instance."""
    inner = setting.model.body[1]
    inner.forward = lambda x: nn.Sequential.forward(inner, x) * 2
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.left


def test_trained_weights_that_are_loaded_are_taken(setting):
    state = setting.model.state_dict()
    state["head.weight"] = torch.randn(3, 6)
    setting.model.load_state_dict(state)
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.skipped


def test_weights_that_are_loaded_as_new_tensors_are_taken(setting):
    state = {key: torch.randn_like(v) if v.dtype.is_floating_point else v.clone()
             for key, v in setting.model.state_dict().items()}  # fmt: skip
    state["norm.running_var"].abs_()
    setting.model.load_state_dict(state, assign=True)
    left(setting, setting.plain(), "replaced")


def test_a_trained_part_that_an_optimizer_moves_goes_on_training(setting):
    optimizer = torch.optim.SGD(setting.model.head.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        expected = setting.plain()
        seen, report = setting.replayed()
        assert same(expected, seen)
        assert report.skipped
        optimizer.step()


def test_another_dtype_of_the_model_is_heeded(setting):
    setting.model.double()
    setting.x = setting.x.double()
    expected = setting.plain()
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert report.left


def test_a_batch_of_another_size_goes_on_plainly(setting):
    setting.x = torch.randn(3, 6)
    left(setting, setting.plain(), "other shapes")


def test_a_batch_with_other_strides_goes_on_plainly(setting):
    setting.x = torch.randn(6, 4).t()
    left(setting, setting.plain(), "strides")


def test_a_batch_that_takes_gradient_goes_on_plainly(setting):
    setting.x.requires_grad_()
    expected = setting.plain()
    wanted, setting.x.grad = setting.x.grad, None
    seen, report = setting.replayed()
    assert same(expected, seen)
    assert torch.equal(setting.x.grad, wanted)
    assert report.left


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_a_region_that_was_not_there_at_the_trace_is_heeded(setting, around):
    with around():
        expected = setting.model(setting.x)
        output, report = lineage.replay(setting.plan, dict(setting.kept), setting.model, setting.x)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    assert "switched differently" in report.left


def test_compiled_frozen_parts_are_right_after_the_trace(setting):
    setting.model.body.compile(backend="eager")
    expected = setting.plain()
    seen, _ = setting.replayed()
    assert same(expected, seen)
