"""What a trace, a capture and a replay leave behind, and what they say about bad input."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from cachefreeze import lineage
from cachefreeze.errors import UserError

from .harness import Wired, body, look, with_late_outputs


class Model(nn.Module):
    """Notes a weak reference to everything that passes through."""

    def __init__(self):
        super().__init__()
        self.body, self.head = body(), nn.Linear(6, 3)
        self.body.requires_grad_(False)
        self.seen = []

    def forward(self, x):
        for layer in (*self.body, torch.tanh, self.head, torch.relu):
            x = layer(x)
            self.seen.append(weakref.ref(x))
        return {"output": x, "more": [x * 2]}


def made():
    torch.manual_seed(0)
    return Model(), torch.randn(4, 6)


def planned(model, *args):
    _, trace = lineage.trace(model, *args)
    return lineage.Plan(trace, lineage.crossing_cut(trace))


def dead(references):
    return [reference() is None for reference in references]


@pytest.mark.parametrize("collector", [True, False])
def test_nothing_of_a_pass_stays_alive(collector):
    model, x = made()
    if not collector:
        gc.disable()
    try:
        output, trace = lineage.trace(model, x)
        references = model.seen[:]
        del output
        assert all(dead(references)), "a trace keeps tensors alive"
        plan = lineage.Plan(trace, lineage.crossing_cut(trace))
        model.seen.clear()
        output, kept, report = lineage.capture(plan, model, x)
        references = [*model.seen, *map(weakref.ref, kept.values())]
        del output, kept, report
        assert all(dead(references)), "a capture keeps tensors alive"
        kept = lineage.capture(plan, model, x)[1]
        model.seen.clear()
        output, report = lineage.replay(plan, kept, model, x)
        references = [*model.seen, *map(weakref.ref, kept.values())]
        del output, kept, report
        gc.collect() if collector else None
        assert all(dead(references)), "a replay keeps tensors alive"
    finally:
        gc.enable()


def test_nothing_of_a_pass_that_left_stays_alive():
    model, x = made()
    plan, references = planned(model, x), []
    for leave_at in range(len(plan.replayed)):
        kept = lineage.capture(plan, model, x)[1]
        model.seen.clear()
        output, report = lineage.replay(plan, kept, model, x, leave_at=leave_at)
        references += [*model.seen, *map(weakref.ref, kept.values())]
        del output, kept, report
    gc.collect()
    assert all(dead(references))


def test_late_outputs_keep_alive_what_they_need_and_no_more():
    model, x = made()
    _, trace = lineage.trace(model, x)
    plan = with_late_outputs(trace)
    kept = lineage.capture(plan, model, x)[1]
    output, _ = lineage.replay(plan, kept, model, x)
    references = [weakref.ref(tensor) for tensor in kept.values()]
    del kept, output
    gc.collect()
    assert all(dead(references))


def test_the_batch_is_not_kept_alive():
    model, x = made()
    plan = planned(model, x)
    for run in (
        lambda x: lineage.trace(model, x)[1],
        lambda x: lineage.capture(plan, model, x)[2],
        lambda x: lineage.replay(plan, lineage.capture(plan, model, x)[1], model, x)[1],
    ):
        batch = torch.randn(4, 6)
        reference = weakref.ref(batch)
        report = run(batch)
        del batch
        gc.collect()
        assert reference() is None
        assert report is not None


def test_a_model_dies_with_its_parameters_while_its_trace_lives():
    model, x = made()
    plan = planned(model, x)
    references = [weakref.ref(one) for one in (*model.parameters(), *model.modules())]
    del model
    gc.collect()
    assert all(dead(references))
    assert plan.trace.operations


def test_what_was_replaced_is_put_back():
    model, x = made()
    checkpointing = dict(vars(torch.utils.checkpoint))
    call = nn.Module.__call__
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    lineage.replay(plan, kept, model, x)
    assert nn.Module.__call__ is call
    assert {name for name, value in vars(torch.utils.checkpoint).items()
            if value is not checkpointing.get(name)} == set()  # fmt: skip
    assert not torch._C._len_torch_function_stack()


def test_a_replacement_by_somebody_else_is_left_in_its_place():
    """As a profiler may do, before or during the pass."""
    model, x = made()
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    expected = model(x)["output"]
    real, seen = nn.Module.__call__, []

    def counted(module, *args, **kwargs):
        seen.append(type(module).__name__)
        return real(module, *args, **kwargs)

    nn.Module.__call__ = counted
    try:
        output, report = lineage.replay(plan, kept, model, x)
        assert nn.Module.__call__ is counted
    finally:
        nn.Module.__call__ = real
    assert torch.equal(output["output"], expected)
    assert report.skipped
    assert "Model" in seen


def test_a_model_is_what_it_was():
    model, x = made()
    model.seen = [].__class__()
    state = copy.deepcopy(model.state_dict())
    held = {name: dict(vars(part)) for name, part in model.named_modules()}
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    lineage.replay(plan, kept, model, x)
    model.seen.clear()
    assert look(model.state_dict()) == look(state)
    for name, part in model.named_modules():
        assert vars(part).keys() == held[name].keys()
        assert all(vars(part)[key] is value for key, value in held[name].items())
    again = pickle.loads(pickle.dumps(model))
    assert look(again.state_dict()) == look(state)
    assert torch.equal(copy.deepcopy(model)(x)["output"], model(x)["output"])
    file = io.BytesIO()
    model.seen.clear()
    torch.save(model, file)


def test_a_copy_of_a_model_is_not_taken_for_the_model():
    model, x = made()
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.body[0].weight.mul_(2)
    output, report = lineage.replay(plan, kept, twin, x)
    assert torch.equal(output["output"], twin(x)["output"])
    assert report.left


@pytest.mark.parametrize(
    "call", [lambda x: x * 2, torch.relu, len, "abc".join, type("Step", (), {"run": print})().run]
)
def test_a_callable_without_a_module_is_refused_in_one_sentence(call):
    with pytest.raises(UserError) as caught:
        lineage.trace(call, torch.ones(2))
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert "Module" in said


BAD = {
    "another width": lambda: torch.randn(4, 5),
    "another type": lambda: torch.ones(4, 6).long(),
    "no tensor": lambda: "text",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_batch_that_the_model_does_not_take_raises_the_models_own_error(bad):
    model, x = made()
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    with pytest.raises(Exception) as plain:  # noqa: PT011
        model(bad())
    call = nn.Module.__call__
    for run in (
        lambda: lineage.trace(model, bad()),
        lambda: lineage.capture(plan, model, bad()),
        lambda: lineage.replay(plan, dict(kept), model, bad()),
    ):
        with pytest.raises(type(plain.value)) as caught:
            run()
        assert str(caught.value) == str(plain.value)
        assert nn.Module.__call__ is call
        assert not torch._C._len_torch_function_stack()
    output, report = lineage.replay(plan, kept, model, x)
    assert report.skipped
    assert torch.equal(output["output"], model(x)["output"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration, SystemExit])
def test_an_error_in_the_middle_of_a_pass_leaves_nothing_replaced(error):
    raises = []

    def way(self, x):
        q = self.body(x)
        if raises:
            raise error("here")
        return self.head(q)

    torch.manual_seed(0)
    model, x = Wired(way), torch.randn(4, 6)
    model.body.requires_grad_(False)
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    raises.append(True)
    call = nn.Module.__call__
    for run in (
        lambda: lineage.trace(model, x),
        lambda: lineage.capture(plan, model, x),
        lambda: lineage.replay(plan, {n: t.clone() for n, t in kept.items()}, model, x),
    ):
        with pytest.raises(error, match="here"):
            run()
        assert nn.Module.__call__ is call
        assert not torch._C._len_torch_function_stack()
    raises.clear()
    output, report = lineage.replay(plan, kept, model, x)
    assert report.skipped
    assert torch.equal(output, model(x))


def test_kept_values_that_are_missing_or_misshaped_are_refused():
    model, x = made()
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    (number,) = kept
    for wrong in (
        {},
        {number + 1: kept[number]},
        {number: kept[number][:2]},
        {number: kept[number].double()},
        {number: kept[number].t()},
        {number: kept[number][None]},
    ):
        with pytest.raises(ValueError, match="kept value") as caught:
            lineage.replay(plan, wrong, model, x)
        assert str(caught.value).endswith(".")
    assert nn.Module.__call__.__name__ != "_call"


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_reading_rate_that_cannot_be_is_refused(rate):
    model, x = made()
    _, trace = lineage.trace(model, x)
    with pytest.raises(ValueError, match="reading_rate"):
        lineage.minimum_cut(trace, reading_rate=rate)


def test_two_threads_replay_at_the_same_time():
    model, x = made()
    batches = [torch.randn(4, 6) for _ in range(2)]
    plan = planned(model, x)
    kept = [lineage.capture(plan, model, batch)[1] for batch in batches]
    expected = [model(batch)["output"] for batch in batches]
    barrier, failed = threading.Barrier(2), []

    def run(place):
        try:
            barrier.wait()
            for step in range(40):
                own = {number: tensor.clone() for number, tensor in kept[place].items()}
                leave_at = step % 9 if step % 2 else None
                output, report = lineage.replay(plan, own, model, batches[place], leave_at=leave_at)
                assert torch.equal(output["output"], expected[place])
                assert leave_at is not None or not report.left
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert nn.Module.__call__.__name__ != "_call"


@pytest.mark.parametrize("what", ["trace", "capture", "replay"])
def test_a_thread_that_runs_the_model_plainly_is_not_followed(what):
    model, x = made()
    other = torch.randn(4, 6)
    plan = planned(model, x)
    kept = lineage.capture(plan, model, x)[1]
    expected = [model(x)["output"], model(other)["output"]]
    going, failed = threading.Event(), []

    def plainly():
        try:
            while not going.is_set():
                assert torch.equal(model(other)["output"], expected[1])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=plainly)
    thread.start()
    try:
        for _ in range(25):
            own = {number: tensor.clone() for number, tensor in kept.items()}
            if what == "trace":
                output, trace = lineage.trace(model, x)
                assert len(trace.operations) == len(plan.trace.operations)
            elif what == "capture":
                output, found, _ = lineage.capture(plan, model, x)
                assert all(torch.equal(found[number], kept[number]) for number in kept)
            else:
                output, report = lineage.replay(plan, own, model, x)
                assert not report.left
            assert torch.equal(output["output"], expected[0])
    finally:
        going.set()
        thread.join()
    assert not failed, failed


def test_a_model_that_calls_its_parts_in_threads_of_its_own_is_right():
    """As data parallel modules do: the pass's own thread is followed, the others run plainly."""

    def way(self, x):
        found = {}

        def run(place, part):
            found[place] = self.body(part)

        threads = [threading.Thread(target=run, args=one) for one in enumerate(x.chunk(2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.head(torch.cat([found[0], found[1]]))

    from .harness import check, rows

    check(lambda: Wired(way), rows(6), may_leave=True)


def test_a_replay_in_a_replay_is_right():
    """A model may call another one that is cached, too."""
    inner, x = made()
    plan = planned(inner, x)
    kept = lineage.capture(plan, inner, x)[1]

    def way(self, x):
        own = {number: tensor.clone() for number, tensor in kept.items()}
        with torch.no_grad():
            taught = lineage.replay(plan, own, inner, x)[0]["output"] if self.nested else 0
        return self.head(self.body(x)) + taught

    torch.manual_seed(1)
    model = Wired(way, nested=False)
    model.body.requires_grad_(False)
    outer = planned(model, x)
    own = lineage.capture(outer, model, x)[1]
    model.nested = True
    with torch.no_grad():
        expected = model.head(model.body(x)) + inner(x)["output"]
    output, _ = lineage.replay(outer, own, model, x)
    assert torch.equal(output, expected)
    assert nn.Module.__call__.__name__ != "_call"
