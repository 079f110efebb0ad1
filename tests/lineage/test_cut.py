"""The cheapest cut is the cheapest of all: held against trying every choice."""

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cachefreeze import lineage
from cachefreeze.lineage.cut import cheapest


@st.composite
def graphs(draw):
    """Random small graphs: costs, what each operation takes, who makes what, what is needed."""
    count = draw(st.integers(1, 7))
    numbers = st.integers(0, 40)
    seconds = [float(draw(numbers)) for _ in range(count)]
    maker, reads = {}, []
    for one in range(count):
        reads.append(draw(st.lists(st.sampled_from(sorted(maker)), unique=True, max_size=3))
                     if maker else [])  # fmt: skip
        for _ in range(draw(st.integers(1, 2))):
            maker[len(maker)] = one
    costs = {number: float(draw(numbers)) for number in maker if draw(st.integers(0, 9))}
    wanted = draw(st.lists(st.sampled_from(sorted(maker)), unique=True, min_size=1, max_size=3))
    return seconds, reads, maker, costs, wanted


def price(seconds, reads, maker, costs, wanted, kept):
    """The cost of keeping some values and running again whatever is needed beside them."""
    again, open_values = set(), list(wanted)
    while open_values:
        number = open_values.pop()
        if number not in kept and maker[number] not in again:
            again.add(maker[number])
            open_values += reads[maker[number]]
    return sum(seconds[one] for one in again) + sum(costs[number] for number in kept), again


@settings(max_examples=400, deadline=None)
@given(graphs())
def test_no_choice_is_cheaper_than_the_minimum_cut(graph):
    seconds, costs = graph[0], graph[3]
    again, kept = cheapest(*graph)
    cost, needed = price(*graph, kept)
    assert needed == again
    best = min(
        price(*graph, set(some))[0]
        for size in range(len(costs) + 1)
        for some in combinations(costs, size)
    )
    # Costs are counted in whole steps of a billionth of all of them.
    assert cost <= best + 1e-6 * (1 + sum(seconds))


class Narrow(nn.Module):
    """A frozen part that is wide, then narrow, then wide again, before a trained head."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(64, 512)
        self.narrow = nn.Linear(512, 4)
        self.head = nn.Linear(400, 2)
        for part in (self.wide, self.narrow):
            part.requires_grad_(False)

    def forward(self, x):
        h = self.narrow(torch.relu(self.wide(x)))
        return self.head(h.repeat(1, 100))


def test_the_minimum_cut_falls_where_the_model_is_narrow():
    model = Narrow()
    _, trace = lineage.trace(model, torch.randn(8, 64))
    for operation in trace.operations:
        operation.seconds = 1.0 if operation.name == "linear" else 1e-6
    crossing = lineage.crossing_cut(trace)
    cheap = lineage.minimum_cut(trace, reading_rate=1e6)
    assert crossing.nbytes == 8 * 400 * 4
    assert cheap.nbytes == 8 * 4 * 4
    assert 0 < cheap.seconds_again < 1e-3


def test_nothing_is_kept_where_reading_takes_longer_than_the_work():
    _, trace = lineage.trace(Narrow(), torch.randn(8, 64))
    assert lineage.minimum_cut(trace, reading_rate=1e-3).kept == ()


def test_a_replay_of_the_minimum_cut_has_the_bits_of_the_plain_pass():
    model, x = Narrow(), torch.randn(8, 64)
    _, trace = lineage.trace(model, x)
    for rate in (1e3, 1e6, 1e9):
        plan = lineage.Plan(trace, lineage.minimum_cut(trace, reading_rate=rate))
        _, kept, _ = lineage.capture(plan, model, x)
        output, report = lineage.replay(plan, kept, model, x)
        assert torch.equal(output, model(x))
        assert report.left == ""


class Views(nn.Module):
    """Trained work takes a frozen tensor, its transpose and a piece of it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.frozen(x)
        return self.head(h).sum() + self.head(h.T).sum() + self.head(h[:2]).sum()


def test_views_of_one_buffer_are_kept_once():
    model, x = Views(), torch.randn(6, 6)
    _, trace = lineage.trace(model, x)
    for cut in (lineage.crossing_cut(trace), lineage.minimum_cut(trace, reading_rate=1e12)):
        assert cut.nbytes == 6 * 6 * 4


def test_a_piece_is_kept_without_what_it_is_a_piece_of():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.frozen(x)[:, 0])

    _, trace = lineage.trace(Token(), torch.randn(4, 50, 6))
    assert lineage.crossing_cut(trace).nbytes == 4 * 6 * 4
