"""A value is an object at a version: in-place work, views, and results that are arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .harness import check, rows, wired


def test_an_operation_that_returns_its_argument_makes_no_new_value():
    def way(self, x):
        q = self.body(x)
        same = q.to(q.dtype)
        assert same is q
        assert q.contiguous() is q
        assert q.float() is q
        same += 1
        return self.head(q * 2) + self.head(same)

    assert wired(way).skipped


def test_a_skipped_operation_that_returns_its_argument_returns_that_very_object():
    def way(self, x):
        q = self.body(x)
        assert q.to(q.dtype).contiguous() is q
        assert x.to(x.dtype) is x
        return self.head(self.body(q.contiguous()))

    result = wired(way)
    assert result.report.skipped == result.trace.operations.__len__() - result.ran.__len__()
    assert result.ran == ["linear"]


def test_a_dropout_that_does_nothing_may_return_its_argument():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(6, 6), nn.Dropout()

        def forward(self, x):
            return self.drop(self.inner(x))

    def way(self, x):
        return self.head(self.block(self.block(x)))

    assert wired(way, parts=lambda: {"block": Block()}).ran == ["linear"]


WRITES = {
    "an index": lambda q: q.__setitem__(0, 7.0),
    "a slice": lambda q: q.__setitem__((slice(None), slice(1, 3)), 7.0),
    "a mask": lambda q: q.__setitem__(q > 0.1, -1.0),
    "a view": lambda q: q[:, 1:4].mul_(3),
    "a transposed view": lambda q: q.t().add_(torch.arange(4.0)),
    "a view of a view": lambda q: q.view(2, 12)[1].view(3, 4).t().zero_(),
    "a diagonal": lambda q: q.diagonal().fill_(1),
    "an element of unbind": lambda q: q.unbind(1)[2].add_(1),
    "a part of a split": lambda q: q.split(2, 1)[1].mul_(2),
    "out=": lambda q: torch.add(q, 1, out=q),
    "out= of a view": lambda q: torch.mul(q[:2], 5, out=q[2:]),
    "copy_": lambda q: q[0].copy_(q[1]),
    "index_put_": lambda q: q.index_put_((torch.tensor([0, 2]),), torch.tensor(3.0)),
    "scatter_": lambda q: q.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 9.0),
    "masked_fill_": lambda q: q.masked_fill_(q < 0, 0),
    "foreach": lambda q: torch._foreach_add_([q], 2.0),
    "relu_": F.relu_,
    "relu(inplace=True)": lambda q: F.relu(q, inplace=True),
    "numpy": lambda q: q.numpy().__iadd__(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_in_frozen_work_is_seen_by_all_that_follows(write):
    def way(self, x):
        with torch.no_grad():
            q = self.body(x)
            write(q)
            return_value = self.body(q)
        return self.head(return_value) + self.head(q)

    assert wired(way).skipped


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_is_skipped_where_only_skipped_work_reads_it(write):
    def way(self, x):
        with torch.no_grad():
            q = self.body(x)
            before = q.sum(1, keepdim=True)
            write(q)
            after = self.body(q)
        return self.head(after * before)

    assert wired(way).skipped


def test_a_write_through_a_view_reaches_the_base():
    def way(self, x):
        base = self.body(x)
        view = base[:, :3]
        middle = self.head(base * 1)
        view *= 2
        return middle + self.head(base)

    assert wired(way).skipped


def test_a_write_to_the_base_reaches_a_view():
    def way(self, x):
        base = self.body(x)
        view = base.view(2, 2, 6)[:, 0]
        middle = self.head(view + 1)
        base += 1
        return torch.cat([middle, self.head(view)])

    assert wired(way).skipped


def test_a_write_between_two_uses_is_between_them_also_where_both_values_are_kept():
    def way(self, x):
        q = self.body(x)
        first = self.head(q.clone())
        F.relu_(q)
        second = self.head(q.clone())
        q += 1
        return first + second + self.head(q)

    assert wired(way).skipped


@pytest.mark.parametrize("used", [True, False])
def test_in_place_work_holds_with_and_without_use_of_its_result(used):
    def way(self, x):
        q = self.body(x)
        result = F.relu_(q)
        other = (result if used else q) + 1
        other += q
        return self.head(other)

    assert wired(way).ran == ["linear"]


def test_a_kept_value_that_an_in_place_write_finishes_is_finished_once():
    def way(self, x):
        q = self.first(x)
        q += x
        q.clamp_(-1, 1)
        return self.head(F.relu(q, inplace=True))

    assert wired(way, parts=lambda: {"first": nn.Linear(6, 6)}).ran == ["linear"]


def test_a_residual_network_with_in_place_activations_is_left_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.two(self.relu(self.norm(self.one(x))))
            out += x
            return self.relu(out)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block())
            self.head = Block()

        def forward(self, x):
            return self.head(self.blocks(self.stem(x))).mean((2, 3))

    result = check(Net, rows(3, 4, 4))
    assert "conv2d" in result.left_out
    assert result.ran.count("conv2d") == 2


def test_trained_work_may_write_to_a_frozen_value():
    """The write must not reach what is kept: the harness replays copies of it many times."""

    def way(self, x):
        q = self.body(x)
        q += self.bias
        q.mul_(self.bias)
        return self.head(q)

    result = wired(way, parts=lambda: {"bias": nn.Parameter(torch.ones(6))}, frozen=["body"])
    assert result.skipped


def test_trained_work_may_write_to_a_view_of_a_frozen_value():
    def way(self, x):
        q = self.body(x)
        q[:, :2] += self.bias
        return self.head(q) + q.sum(1, keepdim=True)

    parts = {"bias": nn.Parameter(torch.ones(2))}
    assert wired(way, parts=lambda: dict(parts), frozen=["body"]).skipped


def test_trained_work_may_write_to_what_a_late_value_needs():
    def way(self, x):
        q = self.body(x)
        aside.append(q * 2)
        q += self.bias
        return self.head(q)

    aside = []
    result = wired(
        way,
        parts=lambda: {"bias": nn.Parameter(torch.ones(6))},
        frozen=["body"],
        extra=lambda model: [aside.pop() for _ in range(len(aside))],
    )
    assert result.skipped


def test_the_callers_batch_is_written_as_in_the_plain_pass():
    def way(self, x):
        x.sub_(1).div_(2)
        return self.head(self.body(x))

    result = wired(way)
    assert {"sub_", "div_"} <= set(result.ran)
    assert result.skipped


def test_a_module_that_writes_to_its_argument_writes_to_the_callers_batch():
    def way(self, x):
        return self.head(self.body(self.act(x)))

    result = wired(way, parts=lambda: {"act": nn.ReLU(inplace=True)})
    assert result.ran.count("relu") == 1
    assert result.skipped


def test_a_view_of_the_callers_batch_is_written_as_in_the_plain_pass():
    def way(self, x):
        q = self.body(x)
        x[:, 0].zero_()
        return self.head(q) + self.head(self.body(x))

    assert wired(way).skipped


def test_frozen_values_are_written_into_the_callers_tensor():
    def way(self, x, into):
        into.copy_(self.body(x))
        torch.add(into, 1, out=into)
        return self.head(self.body(x))

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, torch.zeros(4, 6)), {}

    result = wired(way, batch=batch)
    assert "copy_" in result.ran
    assert result.skipped


def test_a_buffer_for_results_that_is_filled_row_by_row_is_right():
    def way(self, x):
        made = torch.zeros(4, 6)
        for place in range(4):
            made[place] = self.body(x[place])
        empty = torch.empty(4, 6)
        empty[:2], empty[2:] = made[2:], made[:2]
        return self.head(made) + self.head(empty)

    assert wired(way).skipped


def test_a_mask_made_from_the_batch_and_written_in_place_is_right():
    def way(self, x):
        mask = torch.zeros_like(x)
        mask.masked_fill_(x < 0, float("-inf"))
        return self.head(torch.softmax(self.body(x) + mask, -1).nan_to_num_())

    assert wired(way).skipped


SWAPS = {
    "data": lambda q, other: setattr(q, "data", other.detach() * 2),
    "set_": lambda q, other: q.set_(other.detach() * 2),
    "set_ of ones": lambda q, other: q.set_(torch.ones(4, 6)),
    "resize_": lambda q, other: q.resize_(4, 6).copy_(other),
    "swap_tensors": lambda q, other: torch.utils.swap_tensors(q, other),
}


@pytest.mark.parametrize(
    "swap",
    [
        pytest.param(
            swap,
            id=name,
            marks=pytest.mark.xfail(
                strict=True, reason="torch refuses to swap a tensor that has weak references"
            )
            if name == "swap_tensors"
            else (),
        )
        for name, swap in SWAPS.items()
    ],
)
def test_a_value_that_is_given_other_contents_is_right(swap):
    def way(self, x):
        with torch.no_grad():
            q, other = self.body(x), self.body(-x)
            swap(q, other)
        return self.head(q) + self.head(other)

    wired(way, may_leave=True)


def test_a_frozen_value_written_in_one_branch_leaves_the_other_branch_alone():
    def way(self, x):
        q = self.body(x)
        one, two = q.clone(), q.clone()
        one[0] = 5
        two.t_()
        return self.head(one) + self.head(two.t()) + self.head(q.view(-1, 6))

    assert wired(way).skipped


def test_shape_changes_in_place_are_versions_too():
    def way(self, x):
        q = self.body(x)
        q.unsqueeze_(1)
        q.squeeze_(1).transpose_(0, 1)
        other = self.head(q.t() * 2)
        q.t_()
        return other + self.head(q)

    assert wired(way).skipped
