"""Moving state: buffers, counters and normalisations that change from pass to pass."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cachefreeze import lineage

from .harness import check, rows, wired


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


IMAGES = rows(3, 4, 4)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
def test_a_batch_norm_in_training_mode_runs_and_moves_its_statistics(options):
    result = check(lambda: Normed(nn.BatchNorm2d(4, **options)), IMAGES, train=True)
    assert "batch_norm" in result.ran
    assert result.ran.count("conv2d") == 1
    assert result.left_out == ["conv2d"]


def test_a_batch_norm_in_eval_mode_is_left_out():
    result = check(lambda: Normed(nn.BatchNorm2d(4)), IMAGES)
    assert result.left_out.count("conv2d") == 2


def test_a_batch_norm_without_statistics_is_exact_for_its_own_batch():
    result = check(lambda: Normed(nn.BatchNorm2d(4, track_running_stats=False)), IMAGES)
    assert result.skipped


def test_a_functional_batch_norm_in_training_mode_moves_the_buffers_it_is_given():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x):
            q = F.batch_norm(self.body(x), self.mean, self.var, training=True)
            return self.head(q)

    result = check(Model, rows(6))
    assert "batch_norm" in result.ran
    assert result.left_out == ["linear"]


def test_an_instance_norm_with_statistics_moves_them():
    norm = lambda: Normed(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))  # noqa: E731
    assert "instance_norm" in check(norm, IMAGES, train=True).ran
    # Earlier versions of torch, such as 2.6, write the same statistics back in eval mode too: a
    # write is a write, and what follows from it is not left out.
    plain = nn.InstanceNorm2d(4, track_running_stats=True).eval()
    before = plain.running_mean._version
    plain(torch.randn(2, 4, 6, 6))
    writes = plain.running_mean._version != before
    assert check(norm, IMAGES).left_out.count("conv2d") == (1 if writes else 2)


def test_a_counter_buffer_moves_in_each_replay():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x):
            self.count += 1
            return self.inner(x)

    result = wired(
        lambda self, x: self.head(self.counting(x)), parts=lambda: {"counting": Counting()}
    )
    assert "__iadd__" in result.ran or "add_" in result.ran
    assert "linear" in result.left_out


def test_a_counter_buffer_that_changes_the_result_makes_it_live():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.register_buffer("count", torch.tensor(1.0))

        def forward(self, x):
            self.count += 1
            return self.inner(x) / self.count

    result = wired(
        lambda self, x: self.head(self.counting(x)),
        parts=lambda: {"counting": Counting()},
    )
    assert "linear" in result.left_out
    assert result.ran[-1] == "linear"


def test_a_buffer_that_is_registered_anew_in_each_pass_is_right():
    class Renewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.register_buffer("last", torch.zeros(6))

        def forward(self, x):
            q = self.inner(x) + self.last
            self.register_buffer("last", q[0].detach() * 0.5)
            return q

    wired(
        lambda self, x: self.head(self.renewing(x)),
        parts=lambda: {"renewing": Renewing()},
        extra=lambda model: model.renewing.last,
    )


def test_a_running_mean_of_features_is_kept_up():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.register_buffer("centre", torch.zeros(6))

        def forward(self, x):
            q = self.inner(x)
            if self.training:
                self.centre.mul_(0.9).add_(q.detach().mean(0), alpha=0.1)
            return q

    def way(self, x):
        return self.head(self.centred(x) - self.centred.centre)

    training = wired(way, parts=lambda: {"centred": Centred()}, train=True)
    assert {"mul_", "add_"} <= set(training.ran)
    assert "linear" in training.left_out
    wired(way, parts=lambda: {"centred": Centred()})


def test_a_memory_of_features_is_written_in_each_replay():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.place = nn.Linear(6, 6), 0
            self.register_buffer("queue", torch.zeros(12, 6))

        def forward(self, x):
            q = self.inner(x)
            self.queue[self.place : self.place + len(q)] = q.detach()
            self.place = (self.place + len(q)) % 12
            return q

    def way(self, x):
        return self.head(self.memory(x)) @ self.memory.queue[:, :3].t()

    wired(
        way,
        parts=lambda: {"memory": Memory()},
        extra=lambda model: [model.memory.place, model.memory.queue],
    )


NORMS = {
    "spectral": lambda layer: nn.utils.spectral_norm(layer),
    "parametrized spectral": lambda layer: parametrizations.spectral_norm(layer),
    "weight": lambda layer: nn.utils.weight_norm(layer),
    "parametrized weight": lambda layer: parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_normalised_frozen_layer_is_right(norm, train):
    def way(self, x):
        return self.head(self.body(self.normed(x)))

    result = wired(way, parts=lambda: {"normed": norm(nn.Linear(6, 6))}, train=train)
    if not train:
        assert result.ran == ["linear"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_a_normalised_trained_layer_is_right(norm, train):
    def way(self, x):
        return self.normed(self.body(x))

    result = wired(
        way, parts=lambda: {"normed": norm(nn.Linear(6, 6))}, train=train, frozen=["body"]
    )
    assert result.skipped


@pytest.mark.parametrize("train", [False, True])
def test_spectral_norm_deep_in_frozen_work_moves_its_vectors_in_training_mode(train):
    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        layer = nn.utils.spectral_norm(nn.Linear(6, 6))
        other = parametrizations.spectral_norm(nn.Linear(6, 6))
        return {"deep": nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(other))}

    wired(way, parts=parts, train=train)


def test_a_parametrization_by_a_trained_part_is_trained():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(6, 1)), nn.Parameter(torch.ones(1, 6))

        def forward(self, weight):
            return weight + self.left @ self.right

    def parts():
        layer = nn.Linear(6, 6)
        parametrize.register_parametrization(layer, "weight", Low())
        return {"adapted": layer}

    def frozen(name):
        return "original" in name or name.startswith("body") or name.endswith("bias")

    def way(self, x):
        return self.head(self.adapted(self.body(x)))

    result = wired(way, parts=parts, frozen=frozen)
    assert result.left_out.count("linear") == 2


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.step = nn.Linear(6, 6), 1

    def forward(self, x):
        self.step += 1
        return self.inner(x) * self.step


def test_a_python_counter_counts_in_each_replay():
    def way(self, x):
        return self.head(self.body(self.steps(x)))

    result = wired(way, parts=lambda: {"steps": Steps()}, extra=lambda model: model.steps.step)
    assert result.skipped


def test_a_python_counter_deep_in_frozen_work_counts_in_each_replay():
    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        return {"deep": nn.Sequential(nn.Linear(6, 6), nn.Sequential(Steps(), nn.ReLU()))}

    result = wired(way, parts=parts, extra=lambda model: model.deep[1][0].step)
    assert result.skipped


def test_a_python_list_of_numbers_grows_in_each_replay():
    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen, self.best = nn.Linear(6, 6), [], {"most": 0.0}

        def forward(self, x):
            q = self.inner(x)
            self.seen.append(len(x))
            self.best["most"] = max(self.best["most"], float(q.max()))
            return q

    def way(self, x):
        return self.head(self.deep(x))

    def parts():
        return {"deep": nn.Sequential(nn.Linear(6, 6), Noting(), nn.ReLU())}

    wired(
        way,
        parts=parts,
        extra=lambda model: [list(model.deep[1].seen), dict(model.deep[1].best)],
    )


SETTINGS = {
    "a number": (lambda m: setattr(m, "scale", 1.0), lambda m: m.scale),
    "a dictionary": (lambda m: setattr(m, "scale", {"by": 1.0}), lambda m: m.scale["by"]),
    "a list": (lambda m: setattr(m, "scale", [1.0]), lambda m: m.scale[0]),
    "an object": (
        lambda m: setattr(m, "scale", types.SimpleNamespace(by=1.0)),
        lambda m: m.scale.by,
    ),
}
CHANGES = {
    "a number": lambda m: setattr(m, "scale", 2.0),
    "a dictionary": lambda m: m.scale.update(by=2.0),
    "a list": lambda m: m.scale.__setitem__(0, 2.0),
    "an object": lambda m: setattr(m.scale, "by", 2.0),
}


class Scaled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, (put, self.get) = nn.Linear(6, 6), SETTINGS[kind]
        put(self)

    def forward(self, x):
        return self.inner(x) * self.get(self)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("deep", [False, True])
def test_a_setting_that_is_changed_between_passes_is_heeded(kind, deep):
    torch.manual_seed(0)
    scaled = Scaled(kind)
    model = nn.Sequential(nn.Sequential(scaled, nn.ReLU()) if deep else scaled, nn.Linear(6, 3))
    model[0].requires_grad_(False)
    x = torch.randn(4, 6)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    _, kept, _ = lineage.capture(plan, model, x)
    CHANGES[kind](scaled)
    expected = model(x)
    output, report = lineage.replay(plan, kept, model, x)
    assert torch.equal(output, expected)
    assert report.left


KEEPERS = {
    "a number": (lambda m: setattr(m, "count", 0), lambda m: setattr(m, "count", m.count + 1)),
    "a list": (lambda m: setattr(m, "count", []), lambda m: m.count.append(1.0)),
    "a dictionary": (
        lambda m: setattr(m, "count", {}),
        lambda m: m.count.update({len(m.count): 1}),
    ),
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_a_model_that_keeps_count_of_its_passes_is_left_out_all_the_same(kind):
    put, move = KEEPERS[kind]

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            put(self)

        def forward(self, x):
            move(self)
            return self.head(torch.relu(self.body(x)))

    torch.manual_seed(0)
    model, x = Counting(), torch.randn(4, 6)
    model.body.requires_grad_(False)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    _, kept, report = lineage.capture(plan, model, x)
    assert not report.left
    for _ in range(2):
        expected = model(x)
        own = {number: tensor.clone() for number, tensor in kept.items()}
        output, report = lineage.replay(plan, own, model, x)
        assert torch.equal(output, expected)
        assert report.skipped == 2


def test_a_quantisation_observer_in_frozen_work_goes_on_observing():
    from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize

    for kind in (FakeQuantize, FusedMovingAvgObsFakeQuantize):
        result = wired(
            lambda self, x: self.head(self.quant(self.body(x))),
            parts=lambda kind=kind: {"quant": kind()},
            train=True,
        )
        assert result.skipped


def test_a_weight_that_an_embedding_renormalises_is_written():
    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(9, (4, 5), generator=generator),), {}

    def way(self, ids):
        return self.head(self.body(self.embedding(ids)))

    result = wired(
        way,
        parts=lambda: {"embedding": nn.Embedding(9, 6, max_norm=0.5)},
        batch=batch,
    )
    assert "embedding" in result.ran
