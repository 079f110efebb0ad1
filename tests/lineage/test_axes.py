"""Batch axes are found by what operations do, wherever the rows are, and never by sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachefreeze import lineage
from cachefreeze.errors import UserError


class Frozen(nn.Module):
    """A frozen linear layer, something done with its result, and a trained layer behind it."""

    def __init__(self, work, width=6, wide=6):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(wide, 2)
        self.work = work

    def forward(self, x):
        return self.head(self.work(self.frozen(x)))


def axes_of(work, x, wide=6, **options):
    """The axes of the kept values, and the names of the operations that mix rows."""
    model = Frozen(work, x.shape[-1], wide).eval()
    _, trace = lineage.trace(model, x)
    axes = lineage.batch_axes(trace, x, **options)
    cut = lineage.crossing_cut(trace)
    names = [trace.operations[number].name for number in axes.mixing]
    return [axes.axis(number) for number in cut.kept], names


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda h: h, lineage.Axis(0)),
        (lambda h: h.transpose(0, 1) * 2, lineage.Axis(1)),
        (lambda h: h.flatten(0, 1) * 2, lineage.Axis(0, inner=5)),
        (lambda h: h.transpose(0, 1).reshape(-1, 6) * 2, lineage.Axis(0, outer=5)),
        (lambda h: h.repeat(2, 1, 1), lineage.Axis(0, outer=2)),
        (lambda h: h.permute(1, 2, 0).contiguous().permute(0, 2, 1), lineage.Axis(1)),
    ],
    ids=["first", "second", "merged", "views first", "repeated", "permuted"],
)
def test_rows_are_found_wherever_they_are(work, expected):
    found, mixing = axes_of(work, torch.randn(4, 5, 6))
    assert found == [expected]
    assert mixing == []


def test_a_size_that_equals_the_number_of_rows_is_not_taken_for_the_batch():
    found, _ = axes_of(lambda h: h.transpose(0, 1) * 2, torch.randn(4, 4, 6))
    assert found == [lineage.Axis(1)]


def test_windows_of_one_image_stay_together():
    def windows(h):
        rows, side, _, width = h.shape
        h = h.view(rows, 2, side // 2, 2, side // 2, width)
        return h.permute(0, 1, 3, 2, 4, 5).reshape(-1, side // 2 * side // 2, width) * 2

    found, _ = axes_of(windows, torch.randn(3, 4, 4, 6))
    assert found == [lineage.Axis(0, inner=4)]


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda h: h - h.mean(0), "mean"),
        (lambda h: h / h.abs().max(), "max"),
        (lambda h: F.batch_norm(h.transpose(1, 2), None, None, training=True).transpose(1, 2),
         "batch_norm"),
        (lambda h: h.sort(0).values, "sort"),
        (lambda h: h.cumsum(0), "cumsum"),
        (lambda h: h.roll(1, 0), "roll"),
        (lambda h: (h.flatten(1) @ h.flatten(1).T).softmax(-1)[:, :1, None] * h, "matmul"),
    ],
    ids=["mean", "scale", "batch norm", "sort", "cumsum", "roll", "attention over rows"],
)  # fmt: skip
def test_work_that_looks_at_other_rows_is_found_and_made_live(work, name):
    x = torch.randn(6, 5, 6)
    model = Frozen(work).eval()
    _, trace = lineage.trace(model, x)
    axes = lineage.batch_axes(trace, x)
    names = [trace.operations[number].name for number in axes.mixing]
    assert any(name in one for one in names)
    lineage.leave_mixing(trace, axes)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    assert all(axes.axis(number) == lineage.Axis(0) for number in plan.cut.kept)
    _, kept, _ = lineage.capture(plan, model, x)
    output, _ = lineage.replay(plan, kept, model, x)
    assert torch.equal(output, model(x))


def test_an_extreme_row_is_noticed_wherever_it_is():
    for place in range(6):
        x = torch.randn(6, 5, 6)
        x[place] *= 100
        _, mixing = axes_of(lambda h: h / h.abs().max(), x)
        assert mixing


def test_a_value_that_is_equal_for_all_rows_of_one_batch_is_no_constant():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2, 6).requires_grad_(False)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 2)

        def forward(self, x, flag):
            return self.head(self.table(flag)) + self.head(self.frozen(x))

    model = Flagged().eval()
    x, ones = torch.randn(4, 6), torch.ones(4, dtype=torch.long)
    _, trace = lineage.trace(model, x, ones)
    number = next(n for n in lineage.crossing_cut(trace).kept if n in trace.operations[0].makes)
    assert trace.values[number].inputs
    axes = lineage.batch_axes(trace, x, ones)
    mixed = torch.tensor([0, 1, 1, 0])
    axes = lineage.batch_axes(trace, x, mixed, earlier=axes)
    assert axes.axis(number) == lineage.Axis(0)


def test_what_no_row_reaches_is_shared():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 6), requires_grad=False)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.table)) + self.head(x)

    model, x = Positions().eval(), torch.randn(5, 5, 6)
    _, trace = lineage.trace(model, x)
    axes = lineage.batch_axes(trace, x)
    number = next(one.makes[0] for one in trace.operations if one.name == "tanh")
    assert axes.of(number) == "shared by all rows"


def test_rows_that_are_not_first_are_said_by_the_caller():
    lstm = nn.LSTM(6, 6).requires_grad_(False).eval()
    head = nn.Linear(6, 2)

    def model(x):
        return head(lstm(x)[0])

    x = torch.randn(7, 4, 6)
    _, trace = lineage.trace(model, x)
    axes = lineage.batch_axes(trace, x, dims={0: 1})
    (number,) = lineage.crossing_cut(trace).kept
    assert axes.axis(number) == lineage.Axis(1)


def test_no_code_of_the_model_runs_while_axes_are_found():
    calls = []

    def noted(h):
        calls.append(1)
        return h * 2

    axes_of(noted, torch.randn(4, 6))
    assert len(calls) == 1


def test_one_row_is_too_few():
    with pytest.raises(UserError, match="two rows"):
        axes_of(lambda h: h, torch.randn(1, 6))
