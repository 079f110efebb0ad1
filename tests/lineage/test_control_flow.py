"""Ways through a model that follow from what tensors hold. The second batch goes another way."""

import pytest
import torch
from torch import nn

from .harness import check, rows, wired


def signed(seed):
    """Rows of positive numbers for the first seed, of negative ones for the second."""
    (x,), _ = rows(6)(seed)
    return (x.abs() if seed == 1 else -x.abs(),), {}


def lengths(seed):
    (x,), _ = rows(5, 6)(seed)
    return (x, torch.tensor([3, 2, 1, 3]) if seed == 1 else torch.tensor([1, 4, 2, 2])), {}


class Way(nn.Module):
    """A frozen module around a function, inside another one."""

    def __init__(self, way):
        super().__init__()
        self.inner, self.gate, self._way = nn.Linear(6, 6), nn.Identity(), way

    def forward(self, *args):
        return self._way(self, *args)


BRANCHES = {
    "all": lambda self, x: self.inner(x) if (x > 0).all() else x * 3,
    "any": lambda self, x: self.inner(x) if torch.any(x > 0) else x * 3,
    "float": lambda self, x: self.inner(x) if float(x.sum()) > 0 else x * 3,
    "item": lambda self, x: x * x.max().item(),
    "tolist": lambda self, x: (
        x[:, : sum(v > 0 for v in x[0].tolist()) + 1].sum(1, keepdim=True) * x
    ),
    "equal": lambda self, x: self.inner(x) if torch.equal(x, x.abs()) else x * 3,
    "allclose": lambda self, x: self.inner(x) if torch.allclose(x, x.abs()) else x * 3,
    "shape of nonzero": lambda self, x: x * len((x > 0).nonzero()),
    "boolean index": lambda self, x: x * x[x > 0].numel(),
    "unique": lambda self, x: x * torch.unique((x * 2).long()).numel(),
    "numpy": lambda self, x: x * float(x.detach().numpy().max()),
    "while": lambda self, x: halved(x),
    "in": lambda self, x: x * (2 if 1.0 in (x > 0).float() else 3),
    "format": lambda self, x: x * len(f"{x.sum() > 0}"),
    "index": lambda self, x: x * [2, 3, 5][(x > 0).long().max()],
    "iteration": lambda self, x: torch.stack([r * (2 if r[0] > 0 else 3) for r in x]),
    "sort by python": lambda self, x: torch.stack(sorted(x, key=lambda row: float(row[0]))),
    "error": lambda self, x: caught(x),
}


def halved(x):
    while x.abs().max() > 0.5:
        x = x / 2
    return x


def caught(x):
    try:
        if (x > 0).all():
            raise ValueError
    except ValueError:
        return x + 1
    return x


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_way_chosen_by_the_batch_is_followed(branch):
    def way(self, x):
        q = branch(self.way, x)
        return self.head(self.body(q))

    result = wired(way, parts=lambda: {"way": Way(branch)}, batch=signed)
    assert result.skipped


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_way_chosen_by_the_batch_inside_frozen_work_is_followed(branch):
    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        return {"deep": nn.Sequential(Way(branch), nn.Linear(6, 6))}

    result = wired(way, parts=parts, batch=signed)
    assert result.skipped


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_way_chosen_by_a_frozen_value_is_followed(branch):
    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        first = nn.Linear(6, 6)
        with torch.no_grad():
            first.weight.copy_(torch.eye(6) * 0.7)
            first.bias.zero_()
        return {"deep": nn.Sequential(first, Way(branch), nn.Linear(6, 6))}

    result = wired(way, parts=parts, batch=signed)
    assert result.skipped


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_way_chosen_by_a_trained_value_is_followed(branch):
    def way(self, x):
        return self.last(branch(self.way, self.mid(self.body(x))))

    def parts():
        return {"mid": nn.Linear(6, 6), "last": nn.Linear(6, 3), "way": Way(branch)}

    result = wired(way, parts=parts, batch=signed, frozen=["body", "last", "way"])
    assert result.skipped


def test_a_slice_up_to_the_longest_row_is_right_for_other_lengths():
    def way(self, x, lens):
        q = self.body(x)[:, : int(lens.max())]
        return self.head(q).mean(1)

    assert wired(way, batch=lengths).skipped


def test_a_slice_up_to_the_longest_row_deep_in_frozen_work_is_right_for_other_lengths():
    def way(self, x, lens):
        return self.head(self.deep(x, lens))

    def inner(self, x, lens):
        return self.inner(x)[:, : int(lens.max())].mean(1)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.way = Way(inner)

        def forward(self, x, lens):
            return torch.relu(self.way(x, lens))

    assert wired(way, parts=lambda: {"deep": Deep()}, batch=lengths).skipped


def test_a_split_by_lengths_is_right_for_other_lengths():
    def way(self, x, lens):
        q = self.body(x)
        parts = torch.split(q.flatten(0, 1)[: int(lens.sum())], lens.tolist())
        return self.head(torch.stack([part.mean(0) for part in parts]))

    assert wired(way, batch=lengths).skipped


def test_packed_sequences_are_right_for_other_lengths():
    def way(self, x, lens):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.body(x), lens, batch_first=True, enforce_sorted=False
        )
        out, _ = self.rnn(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(padded.sum(1))

    result = wired(way, parts=lambda: {"rnn": nn.LSTM(6, 6, batch_first=True)}, batch=lengths)
    assert result.skipped


def test_an_early_exit_is_right_for_a_batch_that_stays_longer():
    def way(self, x):
        for layer in (self.body, self.body, self.body):
            x = layer(x)
            if x.mean() > self.threshold:
                break
        return self.head(x)

    def parts():
        return {"threshold": nn.Buffer(torch.tensor(0.0))}

    def flat(model):
        for layer in model.body:
            if isinstance(layer, nn.Linear):
                with torch.no_grad():
                    layer.weight.copy_(torch.eye(6))
                    layer.bias.fill_(0.01)

    def build():
        from .harness import Wired

        model = Wired(way, **parts())
        flat(model)
        return model

    result = check(build, signed)
    assert result.skipped


def test_a_router_with_capacity_is_exact_for_its_own_batch():
    def way(self, x):
        q = self.body(x)
        scores = torch.softmax(self.router(q), -1)
        made = torch.zeros_like(q)
        for expert in range(2):
            chosen = (scores.argmax(-1) == expert).nonzero()[:2, 0]
            if len(chosen):
                made[chosen] = self.experts[expert](q[chosen])
        return self.head(made)

    def parts():
        experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        return {"router": nn.Linear(6, 2), "experts": experts}

    result = wired(way, parts=parts, others=(2, 3, 4))
    assert "argmax" in result.left_out


def test_rows_that_see_their_mates_are_exact_for_their_own_batch():
    def way(self, x):
        q = self.body(x)
        q = (q - q.mean(0)) / (q.abs().max() + q.std(0) + 1)
        return self.head(q @ q.t() @ q)

    assert wired(way).ran == ["linear"]


def test_dynamic_quantisation_is_live():
    import warnings

    def parts():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(nn.Linear(6, 6), nn.ReLU()), {nn.Linear}, torch.qint8
            )
        return {"quantised": quantised}

    def way(self, x):
        with torch.no_grad():
            q = self.quantised(self.body(x))
        return self.head(q)

    result = wired(way, parts=parts)
    assert result.skipped
    assert any("quantis" in o.reason or "other rows" in o.reason for o in result.trace.operations)
    assert "relu" in result.ran


def test_a_choice_by_isinstance_is_the_plain_passs():
    def way(self, x):
        q = self.body(x)
        q = q * 2 if isinstance(q, torch.Tensor) else q * 5
        return self.head(q * 3 if torch.is_tensor(q) else q * 7)

    assert wired(way).skipped


def test_a_choice_by_the_class_attribute_is_the_plain_passs():
    def way(self, x):
        q = self.body(x)
        return self.head(q + 1 if q.__class__ is torch.Tensor else q)

    assert wired(way).skipped


@pytest.mark.xfail(
    strict=True, reason="python's type() asks nobody: it tells the class of a late value"
)
def test_a_choice_by_the_exact_type_is_the_plain_passs():
    def way(self, x):
        q = self.body(x)
        return self.head(q * 2 if type(q) is torch.Tensor else q * 5)

    wired(way)
