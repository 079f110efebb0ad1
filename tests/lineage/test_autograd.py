"""Gradients of inputs, and what python asks autograd for inside and after a pass."""

import pytest
import torch
from torch import nn

from .harness import Wired, check, rows, wired


def wanted(seed):
    (x,), _ = rows(6)(seed)
    return (x.requires_grad_(),), {}


def test_a_batch_that_takes_gradient_makes_all_that_follows_trained():
    result = wired(lambda self, x: self.head(self.body(x)), batch=wanted)
    assert result.left_out == []


def test_one_of_two_inputs_that_takes_gradient_leaves_the_other_ones_work_out():
    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, (x * 2).requires_grad_()), {}

    def way(self, x, y):
        return self.head(self.body(x) + self.body(y))

    result = wired(way, batch=batch)
    assert result.left_out.count("linear") == 2
    assert result.ran.count("linear") == 3


def test_a_batch_that_takes_gradient_and_is_detached_still_counts_as_trained():
    def way(self, x):
        return self.head(self.body(x) + self.body(x.detach()))

    assert wired(way, batch=wanted).left_out == []


def hooked_embedding():
    """As PEFT does before gradient checkpointing: what the embedding gives takes gradient."""
    embedding = nn.Embedding(9, 6)
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return embedding


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(9, (4, 5), generator=generator),), {}


@pytest.mark.parametrize("write", [False, True])
def test_frozen_values_that_take_gradient_are_left_out(write):
    def way(self, ids):
        q = self.body(self.embedding(ids))
        if write:
            q += self.bias
            q = q * 2
        return self.head(torch.relu(q))

    def parts():
        return {"embedding": hooked_embedding(), "bias": nn.Parameter(torch.ones(6))}

    result = wired(way, parts=parts, batch=tokens, frozen=["body", "embedding"])
    assert "linear" in result.left_out


def test_a_frozen_value_that_takes_gradient_is_no_leaf():
    def way(self, ids):
        q = self.body(self.embedding(ids))
        return self.head(q * (2 if q.is_leaf else 3) * (2 if q.grad_fn is None else 3))

    wired(way, parts=lambda: {"embedding": hooked_embedding()}, batch=tokens)


def test_requires_grad_in_the_model_on_a_frozen_value_gives_it_a_gradient():
    def way(self, x):
        q = self.body(x)
        q.requires_grad_()
        self.last = q
        return self.head(torch.tanh(q))

    wired(way, extra=lambda model: model.last.requires_grad)


def test_a_retained_gradient_is_there_after_backward():
    """As GradCAM does. The plain pass of each batch comes first."""
    grads = {}

    def way(self, x):
        q = self.body(x).requires_grad_()
        maps = torch.tanh(q)
        maps.retain_grad()
        self.last, self.key = [q, maps], float(x[0, 0])
        return self.head(maps * 2)

    class Model(Wired):
        def check(self):
            seen = [tensor.grad for tensor in self.last]
            expected = grads.setdefault(self.key, seen)
            assert all(map(torch.equal, seen, expected))

    models = []

    def build():
        models.append(Model(way))
        return models[-1]

    def backward(loss):
        loss.backward()
        models[-1].check()

    result = check(build, rows(6), backward=backward)
    assert result.left_out.count("linear") == 2
    assert len(grads) == 2


def test_a_hook_on_a_frozen_value_sees_its_gradient():
    seen = []

    def way(self, x):
        q = self.body(x).requires_grad_()
        maps = torch.tanh(q)
        maps.register_hook(lambda grad: seen.append(grad.sum().item()))
        return self.head(maps)

    def backward(loss):
        seen.clear()
        loss.backward()
        assert len(seen) == 1

    result = wired(way, backward=backward)
    assert result.skipped


def test_a_gradient_hook_changes_the_gradient():
    def way(self, x):
        q = self.body(x).requires_grad_()
        q = torch.tanh(q)
        q.register_hook(lambda grad: grad * 0.5)
        return self.head(q) + self.other(q)

    assert wired(way, parts=lambda: {"other": nn.Linear(6, 3)}, frozen=["body"]).skipped


@pytest.mark.parametrize("trained", [False, True])
def test_forces_from_a_gradient_inside_the_pass_are_right(trained):
    """As a force field: the energy's gradient with respect to the positions is the output."""

    def way(self, x):
        x = x.clone().requires_grad_()
        energy = self.head(torch.tanh(self.body(x))).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return {"energy": energy, "forces": -force}

    frozen = ["body"] if trained else lambda name: True
    wired(way, frozen=frozen)


def test_forces_of_the_callers_positions_are_right():
    def way(self, x):
        energy = self.head(torch.tanh(self.body(x))).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=self.training, retain_graph=True)
        return energy, force

    wired(way, batch=wanted)
    wired(way, batch=wanted, train=True)


def test_a_gradient_penalty_inside_the_pass_is_right():
    def way(self, x):
        mixed = (x * 0.5).requires_grad_()
        scores = self.head(self.body(mixed))
        (grad,) = torch.autograd.grad(scores.sum(), mixed, create_graph=True)
        return scores.mean() + (grad.norm(dim=1) - 1).pow(2).mean()

    wired(way)


def test_a_backward_pass_inside_the_forward_pass_is_right():
    def way(self, x):
        noise = torch.zeros_like(x, requires_grad=True)
        self.head(self.body(x + noise)).sum().backward()
        return self.head(self.body(x + 0.1 * noise.grad.sign()))

    wired(way)


def test_gradients_are_switched_on_inside_a_pass_without_them():
    def way(self, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            energy = torch.tanh(self.body(y)).sum()
            (grad,) = torch.autograd.grad(energy, y)
        return self.head(x + grad)

    wired(way, around=torch.no_grad)
    wired(way)


def test_a_detached_value_is_right():
    def way(self, x):
        q = self.body(x)
        t = self.mid(q)
        return self.head(t.detach() + q.detach()) + self.head(t)

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 2


def test_a_straight_through_estimate_is_right():
    def way(self, x):
        q = self.mid(self.body(x))
        hard = (q > 0).float()
        return self.head(hard + q - q.detach())

    assert wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"]).skipped


def test_a_double_backward_of_the_loop_is_right():
    def backward(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    assert wired(lambda self, x: self.head(torch.tanh(self.body(x))), backward=backward).skipped


def test_anomaly_detection_finds_nothing():
    with torch.autograd.set_detect_anomaly(True):
        assert wired(lambda self, x: self.head(self.body(x)), leaves=False).skipped


def test_saved_tensor_hooks_of_the_loop_see_the_trained_work():
    packed = []

    def around():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(1) or tensor.clone(), lambda tensor: tensor
        )

    assert wired(lambda self, x: self.head(torch.tanh(self.body(x))), around=around).skipped
    assert packed
