"""Work that draws random numbers runs, and draws what the plain pass draws."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachefreeze import lineage

from .harness import check, rows, wired

DRAWS = {
    "dropout": lambda self, q: F.dropout(q, 0.5),
    "torch.rand": lambda self, q: q + torch.rand(4, 6),
    "rand_like": lambda self, q: q * torch.rand_like(q),
    "randperm": lambda self, q: q[torch.randperm(4)],
    "randint": lambda self, q: q + torch.randint(3, (4, 1)),
    "normal_": lambda self, q: q + torch.empty(6).normal_(),
    "multinomial": lambda self, q: q + torch.multinomial(q.detach().abs() + 0.1, 6),
    "bernoulli": lambda self, q: q * torch.bernoulli(torch.sigmoid(q)),
    "a distribution": lambda self, q: torch.distributions.Normal(q, 1.0).sample(),
    "reparametrised": lambda self, q: torch.distributions.Normal(q, 1.0).rsample(),
    "gumbel": lambda self, q: F.gumbel_softmax(q),
    "python": lambda self, q: q * (1 if random.random() < 0.5 else 2),
    "numpy": lambda self, q: q * float(np.random.rand()),
    "numpy array": lambda self, q: q + torch.from_numpy(np.random.rand(4, 6)).float(),
    "python's choice of rows": lambda self, q: q[random.sample(range(4), 4)],
}
# A number that python draws is compared, as an argument of the operation that takes it.
TORCH_DRAWS = [draw for name, draw in DRAWS.items() if "python" not in name and "numpy" not in name]


class Noisy(nn.Module):
    """A module that is frozen but for what it draws."""

    def __init__(self, draw):
        super().__init__()
        self.inner, self._draw = nn.Linear(6, 6), draw

    def forward(self, x):
        return torch.relu(self._draw(self, self.inner(x)))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_in_the_model_itself_is_the_plain_passs_draw(draw):
    def way(self, x):
        q = draw(self, self.body(x))
        return self.head(self.body(q))

    result = wired(way)
    assert result.skipped
    if draw in TORCH_DRAWS:
        assert result.ran.count("linear") >= 3, "what follows from a draw was left out"


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_inside_a_frozen_submodule_is_the_plain_passs_draw(draw):
    def way(self, x):
        return self.head(self.noisy(self.body(x)))

    result = wired(way, parts=lambda: {"noisy": Noisy(draw)})
    assert result.skipped
    if draw in TORCH_DRAWS:
        assert "relu" in result.ran


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_deep_inside_frozen_submodules_is_the_plain_passs_draw(draw):
    def way(self, x):
        return self.head(self.body(x) + self.deep(x))

    def parts():
        return {"deep": nn.Sequential(nn.Linear(6, 6), nn.Sequential(Noisy(draw)))}

    result = wired(way, parts=parts)
    assert result.skipped
    if draw in TORCH_DRAWS:
        assert "relu" in result.ran


@pytest.mark.parametrize("deep", [False, True])
def test_a_python_choice_that_differs_from_the_traced_one_is_followed(deep):
    """Replays begin at other seeds than the traced pass."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            q = self.inner(x)
            return self.inner(q) if random.random() < 0.5 else q * 2

    torch.manual_seed(0)
    choosing = Choosing()
    body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(choosing)) if deep else choosing
    model = nn.Sequential(body.requires_grad_(False), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    random.seed(0)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    random.seed(0)
    _, kept, _ = lineage.capture(plan, model, x)
    ways = set()
    for seed in range(8):
        random.seed(seed)
        expected, state = model(x), random.getstate()
        random.seed(seed)
        own = {number: tensor.clone() for number, tensor in kept.items()}
        output, report = lineage.replay(plan, own, model, x)
        assert random.getstate() == state
        assert torch.equal(output, expected)
        ways.add(bool(report.left))
    assert ways == {True, False}


def test_dropout_in_training_mode_is_live_and_in_eval_mode_left_out():
    def build():
        return nn.ModuleDict(
            {
                "body": nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 6)),
                "head": nn.Linear(6, 3),
            }
        )

    def call(model):
        return lambda x: model["head"](model["body"](x))

    training = check(build, rows(6), call=call, train=True)
    evaluated = check(build, rows(6), call=call)
    assert training.ran == ["dropout", "linear", "linear"]
    assert evaluated.ran == ["linear"]


def test_a_dropout_that_draws_nothing_is_left_out_in_training_mode():
    def way(self, x):
        return self.head(self.body(self.drop(self.body(x))))

    result = wired(way, parts=lambda: {"drop": nn.Dropout(0.0)}, train=True)
    assert result.ran == ["linear"]


def test_an_explicit_generator_draws_on():
    """The generator goes on over passes, so equal numbers would be wrong ones."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.generator = torch.Generator()

        def forward(self, x):
            q = self.body(x)
            noise = torch.randn(q.shape, generator=self.generator)
            return self.head(self.body(q + noise))

    def before(model):
        model.generator.manual_seed(9)

    result = check(
        Model,
        rows(6),
        before=before,
        extra=lambda model: model.generator.get_state(),
    )
    assert result.skipped
    assert result.ran == ["randn", "add", "linear", "linear"]


@pytest.mark.parametrize("kind", ["numpy generator", "random.Random", "RandomState"])
def test_a_generator_of_python_or_numpy_that_a_module_keeps_draws_on(kind):
    made = {
        "numpy generator": lambda: np.random.default_rng(3),
        "random.Random": lambda: random.Random(3),
        "RandomState": lambda: np.random.RandomState(3),
    }[kind]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            number = self.rng.random() if hasattr(self.rng, "random") else self.rng.rand()
            return self.inner(x) * (2.0 if number < 0.5 else 1.0)

    def way(self, x):
        return self.head(self.noisy(x) + self.body(x))

    def before(model):
        model.noisy.rng = made()

    result = wired(
        way,
        parts=lambda: {"noisy": Model()},
        before=before,
        extra=lambda model: (
            float(model.noisy.rng.random_sample())
            if kind == "RandomState"
            else model.noisy.rng.random()
        ),
    )
    assert result.skipped


def test_a_shuffle_of_rows_inside_frozen_work_is_drawn_anew():
    """As MoCo shuffles before its key encoder and restores the order after it."""

    def way(self, x):
        order = torch.randperm(len(x))
        keys = self.body(x[order])[order.argsort()]
        return self.head(x) @ keys[:, :3].t()

    result = wired(way)
    assert "randperm" in result.ran
    assert result.left_out == []


def test_stochastic_depth_is_live():
    class Depth(nn.Module):
        def forward(self, x):
            if not self.training:
                return x
            kept = x.new_empty((len(x), 1)).bernoulli_(0.5)
            return x * kept / 0.5

    def way(self, x):
        q = self.body(x)
        return self.head(q + self.depth(self.body(q)))

    training = wired(way, parts=lambda: {"depth": Depth()}, train=True)
    evaluated = wired(way, parts=lambda: {"depth": Depth()})
    assert "bernoulli_" in training.ran
    assert training.ran.count("linear") == 1
    assert evaluated.ran == ["linear"]


def test_recurrent_dropout_is_live():
    def way(self, x):
        return self.head(self.rnn(self.body(x))[0])

    parts = {"rnn": nn.LSTM(6, 6, 2, dropout=0.5)}
    training = wired(way, parts=lambda: dict(parts), train=True)
    evaluated = wired(way, parts=lambda: dict(parts))
    assert "lstm" in training.ran
    assert evaluated.ran == ["linear"]


def test_attention_with_dropout_is_live():
    def way(self, x):
        q = self.body(x).view(4, 2, 3)
        q = F.scaled_dot_product_attention(q, q, q, dropout_p=0.4 if self.training else 0.0)
        return self.head(q.reshape(4, 6))

    assert "scaled_dot_product_attention" in wired(way, train=True).ran
    assert wired(way).ran == ["linear"]
