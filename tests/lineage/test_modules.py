"""Ways to build and to call a model."""

import functools

import pytest
import torch
from torch import nn

from .harness import Case, Wired, body, check, rows, wired


def test_tied_parameters_are_trained_in_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, 6), body()
            self.out = nn.Linear(6, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids):
            return self.out(self.body(self.embedding(ids)))

    def tokens(seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(9, (4, 5), generator=generator),), {}

    assert check(Tied, tokens, frozen=["body"]).left_out == []
    frozen = check(Tied, tokens, frozen=["embedding", "out"])
    assert frozen.left_out == ["embedding"]


def test_a_module_that_is_called_twice_is_left_out_twice():
    def way(self, x):
        return self.head(self.body(torch.relu(self.body(x))) + self.body(x * 2))

    assert wired(way).left_out.count("linear") == 6


def test_a_module_called_on_frozen_and_on_trained_values_runs_for_the_trained_ones():
    def way(self, x):
        return self.head(self.body(self.mid(self.body(x))))

    result = wired(way, parts=lambda: {"mid": nn.Linear(6, 6)}, frozen=["body"])
    assert result.left_out.count("linear") == 2
    assert result.ran.count("linear") == 4


def test_a_siamese_encoder_is_left_out_for_both_inputs():
    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, x.flip(0) * 2), {}

    def way(self, x, y):
        one, two = self.body(x), self.body(y)
        return self.head(torch.cat([one * two, (one - two).abs()]))

    assert wired(way, batch=batch).left_out.count("linear") == 4


def test_one_tensor_given_twice_is_right_when_two_are_given():
    def way(self, x, y):
        return self.head(self.body(x) + self.body(y) * 2)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, x if seed == 1 else x + 1), {}

    wired(way, batch=batch)


def test_two_tensors_are_right_when_one_is_given_twice():
    def way(self, x, y):
        return self.head(self.body(x) + self.body(y) * 2)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, x if seed == 2 else x + 1), {}

    wired(way, batch=batch)


def test_views_of_one_tensor_may_be_given():
    def way(self, x, y):
        q = self.body(x)
        y.mul_(2)
        return self.head(q + self.body(x))

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x, x[:2]), {}

    wired(way, batch=batch)


def test_keyword_arguments_in_another_order_are_right():
    def way(self, **given):
        return self.head(self.body(given["x"]) - self.body(given["y"]) * 2)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        pair = {"x": x, "y": x.flip(1)}
        return (), pair if seed == 1 else dict(reversed(pair.items()))

    assert wired(way, batch=batch).skipped


def test_numbers_among_the_arguments_are_compared():
    def way(self, x, scale, flags):
        q = self.body(x) * scale
        return self.head(self.body(q) if flags["twice"] else q)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x,), {"scale": float(seed), "flags": {"twice": seed == 1}}

    assert wired(way, batch=batch).skipped


def test_numbers_among_the_arguments_of_a_frozen_module_are_compared():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x, scale, *, twice=False):
            q = self.inner(x) * scale
            return self.inner(q) if twice else q

    def way(self, x, scale, twice):
        return self.head(self.deep(x, scale, twice=twice))

    def batch(seed):
        (x,), _ = rows(6)(seed)
        return (x,), {"scale": float(seed), "twice": seed == 2}

    assert wired(way, parts=lambda: {"deep": Inner()}, batch=batch).skipped


def test_a_list_of_modules_walked_by_hand_is_left_out():
    class Walked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.named = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(3)])
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            for layer, scale in zip(self.layers, self.scales, strict=True):
                x = torch.relu(layer(x)) * scale
            for name in ("b", "a"):
                x = x + self.named[name](x)
            return self.head(x)

    assert check(Walked, rows(6)).ran == ["linear"]
    half = check(Walked, rows(6), frozen=["layers.0", "scales.0", "layers.1", "named"])
    assert half.left_out == ["linear", "relu", "mul", "linear", "relu"]


def test_a_method_that_is_not_forward_is_left_out():
    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body(), nn.Linear(6, 3)

        def encode(self, x):
            return self.head(self.body(x))

    result = check(Encoding, rows(6), call=lambda model: model.encode)
    assert result.ran == ["linear"]


def test_a_method_called_within_forward_is_left_out():
    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body(), nn.Linear(6, 3)

        def features(self, x):
            return self.body(x).tanh()

        def forward(self, x):
            return self.head(self.features(x))

    wrapped = lambda: nn.ModuleDict({"net": Encoding(), "head": nn.Linear(6, 2)})  # noqa: E731

    def call(model):
        return lambda x: model["head"](model["net"].features(x))

    assert check(wrapped, rows(6), call=call).ran == ["linear"]


def test_a_teacher_and_a_student_in_one_function_are_right():
    def build():
        return nn.ModuleDict({"teacher": body(), "student": body()})

    def call(model):
        teacher, student = model["teacher"], model["student"]

        def loss(x):
            with torch.no_grad():
                wanted = torch.softmax(teacher(x), -1)
            return nn.functional.cross_entropy(student(x), wanted)

        return loss

    result = check(build, rows(6), call=call, frozen=["teacher"])
    assert result.left_out.count("linear") == 2
    assert "softmax" in result.left_out
    assert result.plan.cut.nbytes == 4 * 6 * 4


@pytest.mark.parametrize("how", ["lambda", "partial", "object", "list"])
def test_any_callable_that_leads_to_modules_is_right(how):
    class Step:
        def __init__(self, model):
            self.models = [model]

        def __call__(self, x):
            return self.models[0](x)

        def run(self, x):
            return self(x)

    calls = {
        "lambda": lambda model: lambda x, by=model: by(x),
        "partial": lambda model: functools.partial(lambda net, x: net(x), model),
        "object": lambda model: Step(model),
        "list": lambda model: Step(model).run,
    }
    assert check(lambda: Wired(lambda s, x: s.head(s.body(x))), rows(6), call=calls[how]).skipped


def test_a_functional_call_is_right():
    def call(model):
        def run(x):
            held = dict(model.named_parameters())
            held["head.bias"] = held["head.bias"] * 2
            return torch.func.functional_call(model, held, (x,))

        return run

    check(lambda: Wired(lambda s, x: s.head(s.body(x))), rows(6), call=call)


def test_a_functional_call_with_other_weights_than_the_traced_ones_is_right():
    def call(model):
        def run(x):
            held = {name: p.detach() * float(x[0, 0]) for name, p in model.body.named_parameters()}
            return model.head(torch.func.functional_call(model.body, held, (x,)))

        return run

    check(lambda: Wired(lambda s, x: s.head(s.body(x))), rows(6), call=call, may_leave=True)


def test_a_module_made_anew_in_each_pass_is_left_out():
    def way(self, x):
        q = nn.ReLU()(self.body(x))
        return self.head(nn.Sequential(nn.Tanh(), nn.Softmax(1))(q))

    assert wired(way).ran == ["linear"]


def test_a_module_with_weights_made_anew_in_each_pass_is_right():
    def way(self, x):
        torch.manual_seed(3)
        made = nn.Linear(6, 6).requires_grad_(False)
        return self.head(made(self.body(x)))

    wired(way, may_leave=True)


def test_layers_swapped_by_the_model_are_followed():
    def way(self, x):
        layers = [self.body[0], self.body[2]]
        if x[0, 0] > 0:
            layers.reverse()
        for layer in layers:
            x = layer(x)
        return self.head(x)

    def batch(seed):
        (x,), _ = rows(6)(seed)
        x[0, 0] = 1.0 if seed == 1 else -1.0
        return (x,), {}

    wired(way, batch=batch)


def test_a_frozen_model_in_a_frozen_model_in_a_trained_one_is_left_out():
    def way(self, x):
        q = self.deep(x)
        return self.head(self.deep[1](self.mid(q)) + q)

    def parts():
        inner = nn.Sequential(body(), nn.Sequential(nn.LayerNorm(6), body()))
        return {"deep": inner, "mid": nn.Linear(6, 6)}

    result = wired(way, parts=parts, frozen=["body", "deep"])
    assert result.left_out.count("linear") == 4
    assert len(result.plan.cut.kept) == 1


def test_a_low_rank_adapter_leaves_the_frozen_layer_before_it_out():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(6, 6)
            self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x):
            result = self.base(x)
            result += self.lora_b(self.lora_a(x)) * 0.5
            return result

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two = body(), Adapted(), Adapted()

        def forward(self, x):
            return self.two(torch.tanh(self.one(self.first(x))))

    result = check(Model, rows(6), frozen=lambda name: "lora" not in name)
    assert result.left_out.count("linear") == 3


def test_recurrent_networks_are_left_out():
    def way(self, x):
        out, (h, _) = self.lstm(x)
        out, last = self.gru(out)
        return self.head(self.cell(out[:, -1], h[0]) + last[0])

    def parts():
        return {
            "lstm": nn.LSTM(6, 6, batch_first=True, bidirectional=False),
            "gru": nn.GRU(6, 6, batch_first=True),
            "cell": nn.GRUCell(6, 6),
        }

    assert wired(way, parts=parts, batch=rows(5, 6)).ran == ["linear"]


def test_a_lazy_module_is_right_once_it_has_its_shape():
    def build():
        model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3))
        model(torch.ones(1, 6))
        return model

    assert check(build, rows(6), frozen=["0"]).ran == ["linear"]


def test_parameters_that_are_said_to_move_are_trained():
    from cachefreeze import lineage

    case = Case(lambda: Wired(lambda s, x: s.head(s.body(x))), rows(6))
    moving = [case.model.body[2].weight]
    _, trace = lineage.trace(case.model, *rows(6)(1)[0], moving=moving)
    cut = lineage.crossing_cut(trace)
    assert [trace.operations[n].name for n in sorted(cut.runs)] == ["linear", "linear"]
