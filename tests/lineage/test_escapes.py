"""Values that leave the pass by another way than its output."""

import types

import pytest
import torch
from torch import nn

from .harness import rows, wired


def test_a_value_left_on_a_module_is_there_after_the_pass():
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), None

        def forward(self, x):
            self.last = self.inner(x) * 2
            return torch.relu(self.last)

    result = wired(
        lambda self, x: self.head(self.leaving(x)),
        parts=lambda: {"leaving": Leaving()},
        extra=lambda model: model.leaving.last,
    )
    assert result.ran == ["linear"]


def test_a_value_left_deep_in_frozen_work_is_there_after_the_pass():
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.held = nn.Linear(6, 6), {}

        def forward(self, x):
            self.held["maps"] = [self.inner(x)]
            return torch.relu(self.held["maps"][0])

    result = wired(
        lambda self, x: self.head(self.deep(x)),
        parts=lambda: {"deep": nn.Sequential(nn.Sequential(Leaving()), nn.Linear(6, 6))},
        extra=lambda model: dict(model.deep[0][0].held),
    )
    assert result.skipped


def test_a_forward_hook_puts_every_passs_values_in_its_list():
    seen = []

    def parts():
        body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))
        body[1][0].register_forward_hook(lambda module, args, output: seen.append(output))
        return {"hooked": body}

    result = wired(
        lambda self, x: self.head(self.hooked(x)),
        parts=parts,
        before=lambda model: seen.clear(),
        extra=lambda model: list(seen),
    )
    assert result.ran == ["linear"]


@pytest.mark.parametrize("kind", ["pre", "post", "always"])
def test_a_hook_that_changes_what_goes_on_is_heeded(kind):
    def parts():
        layer = nn.Linear(6, 6)
        if kind == "pre":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        elif kind == "post":
            layer.register_forward_hook(lambda module, args, output: output + 1)
        else:
            layer.register_forward_hook(
                lambda module, args, kwargs, output: output - 1,
                with_kwargs=True,
                always_call=True,
            )
        return {"deep": nn.Sequential(nn.Linear(6, 6), nn.Sequential(layer))}

    assert wired(lambda self, x: self.head(self.deep(x)), parts=parts).ran == ["linear"]


def test_a_hook_for_all_modules_runs():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append((type(module).__name__, output))
    )
    try:
        result = wired(
            lambda self, x: self.head(self.body(x)),
            before=lambda model: seen.clear(),
            extra=lambda model: list(seen),
        )
    finally:
        handle.remove()
    assert result.skipped


def test_a_list_in_a_closure_is_filled():
    seen = []

    def way(self, x):
        q = self.body(x)
        seen.append(q)
        seen.append(torch.tanh(q))
        return self.head(q)

    result = wired(way, before=lambda model: seen.clear(), extra=lambda model: list(seen))
    assert result.ran == ["linear"]


def test_a_list_that_is_given_is_filled():
    class Filling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, into):
            for layer in (self.one, self.two):
                x = torch.relu(layer(x))
                into.append(x)
            return x

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x,), {"into": []}

    result = wired(
        lambda self, x, into: self.head(self.filling(x, into)),
        parts=lambda: {"filling": Filling()},
        batch=batch,
    )
    assert result.ran == ["linear"]


class Cache:
    """Keys and values of one layer after the other, as language models keep them."""

    def __init__(self):
        self.keys, self.values, self.seen = [], [], 0

    def update(self, key, value, layer):
        self.seen += key.shape[0] if not layer else 0
        if len(self.keys) <= layer:
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key])
            self.values[layer] = torch.cat([self.values[layer], value])
        return self.keys[layer], self.values[layer]


class Layer(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place, self.key, self.value = place, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, cache=None):
        key, value = self.key(x), self.value(x)
        if cache is not None:
            key, value = cache.update(key, value, self.place)
        return x + torch.softmax(x @ key.t(), -1) @ value


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(place) for place in range(2)])

    def forward(self, x, cache=None):
        for layer in self.layers:
            x = layer(x, cache)
        return x


@pytest.mark.parametrize("passes", [1, 2])
def test_an_object_that_is_given_is_filled(passes):
    def way(self, x, cache):
        for _ in range(passes):
            q = self.layers(x, cache)
        return self.head(q)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, Cache()), {}

    result = wired(way, parts=lambda: {"layers": Layers()}, batch=batch)
    assert result.ran == ["linear"]


def test_an_object_that_holds_tensors_already_is_filled():
    def way(self, x, cache):
        return self.head(self.layers(x, cache))

    def batch(seed):
        (x,), _ = rows(6)(seed)
        cache = Cache()
        cache.update(x * 2, x * 3, 0)
        return (x, cache), {}

    result = wired(way, parts=lambda: {"layers": Layers()}, batch=batch)
    assert result.skipped


def test_an_object_made_and_returned_by_the_model_is_right():
    def way(self, x):
        cache = Cache()
        q = self.layers(x, cache)
        return {"logits": self.head(q), "cache": cache}

    result = wired(way, parts=lambda: {"layers": Layers()})
    assert result.ran == ["linear"]
    assert not result.report.computed - set(range(len(result.trace.values)))


def test_a_cache_that_nobody_reads_is_neither_kept_nor_computed():
    from cachefreeze import lineage

    from .harness import Wired

    def way(self, x):
        cache = Cache()
        return {"logits": self.head(self.layers(x, cache)), "cache": cache}

    torch.manual_seed(0)
    model = Wired(way, layers=Layers())
    model.layers.requires_grad_(False)
    x = torch.randn(4, 6)
    _, trace = lineage.trace(model, x)
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    assert len(plan.cut.kept) == 1
    _, kept, _ = lineage.capture(plan, model, x)
    output, report = lineage.replay(plan, kept, model, x)
    assert not report.computed
    expected = model(x)["cache"]
    assert torch.equal(output["cache"].values[1], expected.values[1])
    assert report.computed


def test_a_namespace_that_is_given_is_written():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, bag):
            bag.q = self.inner(bag.x)
            bag.x = bag.x * 2
            return bag

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (types.SimpleNamespace(x=x),), {}

    def way(self, bag):
        bag = self.writing(bag)
        return self.head(bag.q + bag.x)

    assert wired(way, parts=lambda: {"writing": Writing()}, batch=batch).skipped


def test_a_dictionary_that_is_given_is_written():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, bag):
            bag["q"] = self.inner(bag.pop("x"))

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return ({"x": x, "kept": x * 2},), {}

    def way(self, bag):
        self.writing(bag)
        return self.head(bag["q"] + bag["kept"])

    assert wired(way, parts=lambda: {"writing": Writing()}, batch=batch).ran[-1] == "linear"


def test_a_value_in_a_global_or_default_is_there():
    def way(self, x, held=[]):  # noqa: B006
        held[:] = [self.body(x) - 1]
        way.last = held[0] * 2
        return self.head(held[0])

    result = wired(way, extra=lambda model: way.last)
    assert result.ran == ["linear"]


def test_a_generator_that_yields_values_is_right():
    def steps(self, x):
        for layer in self.body:
            x = layer(x)
            yield x

    def way(self, x):
        return self.head(sum(steps(self, x)))

    assert wired(way).ran == ["linear"]


def test_a_value_that_the_last_pass_left_behind_is_taken():
    """Each pass adds what the pass before it has left."""

    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), None

        def forward(self, x):
            before, self.last = self.last, self.inner(x).detach()
            return self.last + (0 if before is None else before)

    def before(model):
        model.leaving.last = torch.full((4, 6), 3.0)

    wired(
        lambda self, x: self.head(self.leaving(x)),
        parts=lambda: {"leaving": Leaving()},
        before=before,
        extra=lambda model: model.leaving.last,
        may_leave=True,
    )


def test_an_exception_that_the_model_catches_is_raised_and_caught():
    def way(self, x):
        q = self.body(x)
        try:
            q = q.view(-1, 5)
        except RuntimeError:
            q = q * 2
        try:
            self.head(q[:, :2])
        except RuntimeError:
            q = q + 1
        try:
            self.body(q[:, :2])
        except RuntimeError as error:
            q = q + len(str(error))
        return self.head(q)

    assert wired(way).skipped
