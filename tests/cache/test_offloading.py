"""Frozen weights that leave their device while all rows are known, on a simulated device."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import cachefreeze
from cachefreeze import ActivationCache
from cachefreeze.cache import away_parameter
from cachefreeze.lineage import devices

from ..support.simulated_device import SimulatedQueue
from .harness import BATCH, assert_same, batches, images


@pytest.fixture(autouse=True)
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedQueue]:
    queue = SimulatedQueue(lag=7)
    monkeypatch.setitem(devices.QUEUES, "cpu", queue)
    yield queue
    assert not queue.faults


class Net(nn.Module):
    """A frozen body, and trained layers with a frozen one between them, tied to the body's last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 64, 32), nn.Linear(32, 32),
        )  # fmt: skip
        self.adapter, self.behind = nn.Linear(32, 32), nn.Linear(32, 32)
        self.behind.weight = self.body[7].weight
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.behind(self.adapter(self.body(x)).relu()))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    cachefreeze.freeze(model.body, model.behind)
    return model.train()


def is_away(model: nn.Module) -> bool:
    return any(type(one) is not nn.Parameter for one in model.parameters())


def steps(
    model: nn.Module, x: torch.Tensor, epochs: range, then: Callable[[], None] | None = None
) -> None:
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    for epoch in epochs:
        for batch in batches(x, epoch):
            loss = F.cross_entropy(model(batch), (batch[:, 0, 0, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if then is not None:
                then()


X = images(80)
MANY = range(12)


def until_away(*models: nn.Module) -> None:
    """Trains models in the same way until the weights of one are away."""
    for epoch in range(60):
        for one in models:
            steps(one, X, range(epoch, epoch + 1))
        if any(map(is_away, models)):
            return
    pytest.fail("no weight has left")


def test_weights_that_only_skipped_work_reads_leave_and_the_result_is_the_plain_one() -> None:
    plain, model = net(), net()
    steps(plain, X, MANY)
    memory = {name: StorageWeakRef(one.untyped_storage()) for name, one in model.named_parameters()}
    with ActivationCache(model, offload_frozen=True) as cache:
        steps(model, X, MANY)
        left = {name for name, one in memory.items() if one.expired()}
        body = {f"body.{name}" for name, _ in model.body.named_parameters()}
        assert left == body - {"body.7.weight"}, "it runs in every step, behind a trained layer"
        assert {one.device for one in model.parameters()} == {torch.device("cpu")}
        assert cache.stats.rows_served > 80 * 8
    assert not is_away(model)
    for name, tensor in plain.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
        assert model.state_dict()[name].stride() == tensor.stride()


def test_nothing_leaves_unless_asked_for() -> None:
    model = net()
    with ActivationCache(model):
        steps(model, X, MANY)
        assert not is_away(model)


def _saved(model: Net) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)["body.0.weight"]


def _average(model: Net) -> Any:
    average = torch.zeros_like(model.body[0].weight)
    torch._foreach_lerp_([average], [model.body[0].weight], 1.0)
    return average


class Doubled(TorchFunctionMode):
    """Doubles all results, so that nothing may be computed under it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if isinstance(result, torch.Tensor) else result


def _in_a_mode(mode: Any, model: Net) -> Any:
    with mode:
        model.body[0].weight.abs()
    return model.body[0].weight


READERS: dict[str, Callable[[Net], Any]] = {
    "state_dict": lambda model: model.state_dict()["body.0.weight"],
    "a checkpoint": _saved,
    "a copy of the model": lambda model: copy.deepcopy(model).body[0].weight,
    "a copy of a layer": lambda model: copy.deepcopy(model.body[0]).weight,
    "a moving average": _average,
    "a penalty": lambda model: model.body[0].weight * torch.ones(1, requires_grad=True),
    "a view": lambda model: model.body[0].weight[:],
    "`.data`": lambda model: model.body[0].weight.data,
    "numpy": lambda model: torch.from_numpy(model.body[0].weight.numpy().copy()),
    "an operator": lambda model: torch.ops.aten.clone.default(model.body[0].weight),
    "another type": lambda model: copy.deepcopy(model).double().body[0].weight.float(),
    "a list": lambda model: torch.tensor(model.body[0].weight.tolist()),
    "inference mode": lambda model: torch.inference_mode()(lambda: model.body[0].weight + 0)(),
    "a function mode": lambda model: _in_a_mode(Doubled(), model),
    "a dispatch mode": lambda model: _in_a_mode(FlopCounterMode(display=False), model),
    "fake tensors": lambda model: _in_a_mode(FakeTensorMode(allow_non_fake_inputs=True), model),
    "the storage": lambda model: torch.empty(0).set_(
        model.body[0].weight.untyped_storage(), 0, (16, 3, 3, 3)
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_weight_finds_it_and_training_goes_on(reader: str) -> None:
    plain, model = net(), net()
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        found = READERS[reader](model)
        assert torch.equal(found.detach().clone(), plain.body[0].weight)
        assert not is_away(model)
        steps(model, X, MANY)
    steps(plain, X, MANY)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


def test_a_batch_that_is_not_known_is_computed_with_the_weights() -> None:
    plain, model, other = net(), net(), images(BATCH, seed=5)
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        assert_same(model(other), plain(other))
        assert not is_away(model)


@pytest.mark.parametrize("training", [False, True])
def test_a_validation_that_is_traced_anew_finds_the_weights(training: bool) -> None:
    plain, model = net(), net()
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        with torch.inference_mode():
            assert_same(model.train(training)(X[:BATCH]), plain.train(training)(X[:BATCH]))
        assert not any(one.is_inference() for one in model.parameters())
        steps(model.train(), X, MANY)
        steps(plain.train(), X, MANY)
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, two)


def test_weights_that_leave_in_inference_mode_can_be_trained_later() -> None:
    plain, model = net().eval(), net().eval()
    with ActivationCache(model, offload_frozen=True):
        for epoch in range(40):
            with torch.inference_mode():
                for batch in batches(X, epoch):
                    model(batch)
            if is_away(model):
                break
        assert is_away(model)
        for one in (plain, model):
            cachefreeze.unfreeze(one.body)
            steps(one.train(), X, range(2))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


class Some(list[Any]):
    """A list of another class."""


MORE_READERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a gradient of torch.func": lambda weight: torch.func.grad(lambda x: (x * weight).sum())(
        torch.ones_like(weight)
    ),
    "another of the same type": lambda weight: type(weight)(torch.ones(2), requires_grad=False),
    "a list of another class": lambda weight: torch.cat(Some([weight, weight])),
}


@pytest.mark.parametrize("reader", MORE_READERS)
def test_unusual_readers_get_what_they_get_from_a_plain_parameter(reader: str) -> None:
    plain, model = net(), net()
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        wanted, found = (MORE_READERS[reader](one.body[0].weight) for one in (plain, model))
        assert type(found) is type(wanted)
        assert torch.equal(found, wanted)
        for one in (plain, model):
            steps(one, X, MANY)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


def test_a_reader_that_asks_nobody_gets_an_error_and_no_numbers() -> None:
    model = net()
    with ActivationCache(model, offload_frozen=True):
        until_away(model)
        with pytest.raises(RuntimeError, match=r"offload_frozen=True"):
            torch.asarray(model.body[0].weight, copy=True)


class Encoder(nn.Module):
    """A frozen layer that chooses its kernels by whether torch may skip asking its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.reshape(len(x), 12, 16)).mean(1))


def test_a_layer_takes_the_same_path_while_its_weights_are_away() -> None:
    torch.manual_seed(0)
    model = Encoder()
    plain = copy.deepcopy(model)
    found = []
    with ActivationCache(model, offload_frozen=True):
        for epoch in range(40):
            for one in (model, plain):
                one.train().body.eval()
                steps(one, X, range(epoch, epoch + 1))
                one.eval()
            with torch.no_grad():
                if is_away(model):  # too small a batch to be followed
                    found.append([one(X[40:43]) for one in (model, plain)])
                for batch in X.split(BATCH):
                    assert_same(model(batch), plain(batch))
    assert found
    for one, other in found:
        assert_same(one, other)


def test_a_weight_that_a_backward_pass_will_read_stays() -> None:
    plain, model = net(), net()
    gradients = []
    for one in (plain, model):
        z = torch.ones(1024, requires_grad=True)
        cache = ActivationCache(one, offload_frozen=True) if one is model else None
        left = False
        for epoch in range(20):
            for batch in batches(X, epoch):
                penalty = (z * one.body[6].weight).sum()
                (one(batch).sum() + penalty).backward()
                left = left or is_away(one)
        assert left == (one is model)
        if cache is not None:
            cache.close()
        gradients.append(z.grad)
    assert_same(*gradients)


class Scale(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.number


def test_a_weight_without_dimensions_leaves_as_well() -> None:
    plain, model = net(), net()
    for one in (plain, model):
        one.body[4] = Scale().requires_grad_(False)
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        assert is_away(model.body[4])
        pickle.dumps(list(model.parameters()))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupt_while_weights_leave_changes_nothing(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = net(), net()
    real, calls = away_parameter._unreadable, []

    def interrupted(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(tensor)

    monkeypatch.setattr(away_parameter, "_unreadable", interrupted)
    with ActivationCache(model, offload_frozen=True):
        with pytest.raises(KeyboardInterrupt):
            steps(model, X, range(40))
        assert not is_away(model)
        plain.load_state_dict(copy.deepcopy(model.state_dict()))
        for one in (plain, model):
            with torch.no_grad():
                one.body[0].weight.mul_(0.5)
                one.body[1].running_mean.add_(1)
            steps(one, X, MANY)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


WRITERS: dict[str, Callable[[Net], Any]] = {
    "in place": lambda model: model.body[0].weight.mul_(0.5),
    "`.data`": lambda model: model.body[0].weight.data.mul_(0.5),
    "one number": lambda model: model.body[0].weight.view(-1)[:1].add_(1),
    "a buffer, which has stayed": lambda model: model.body[1].running_mean.add_(1),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: 0.5 * tensor for name, tensor in model.state_dict().items()}
    ),
    "another tensor": lambda model: setattr(
        model.body[0].weight, "data", torch.ones_like(model.body[0].weight)
    ),
    "unfrozen": lambda model: model.body[6].requires_grad_(True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_that_are_changed_while_they_are_away_are_the_changed_ones(writer: str) -> None:
    plain, model = net(), net()
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        for one in (plain, model):
            with torch.no_grad():
                WRITERS[writer](one)
            steps(one, X, MANY)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


def test_weights_that_are_read_in_every_step_hardly_ever_leave() -> None:
    model, times = net(), [0, 0]
    with ActivationCache(model, offload_frozen=True):

        def average() -> None:
            times[0] += 1
            times[1] += is_away(model)
            model.body[0].weight.norm()

        steps(model, X, range(60), average)
    assert times[0] == 600
    assert 1 <= times[1] <= 5


def test_a_weight_whose_memory_others_share_stays() -> None:
    plain, model = net(), net()
    views = [one.body[0].weight.detach() for one in (plain, model)]
    with ActivationCache(model, offload_frozen=True):
        until_away(model, plain)
        assert is_away(model.body[3])
        for view in views:
            view.mul_(2.0)
        assert_same(model.body[0].weight, views[1])
        for one in (plain, model):
            steps(one, X, MANY)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)


def test_a_host_without_room_ends_it_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = net(), net()
    steps(plain, X, MANY)

    def no_room(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("cachefreeze.cache.away_parameter.HostCopy", no_room)
    with ActivationCache(model, offload_frozen=True) as cache:
        steps(model, X, MANY)
        assert not is_away(model)
        assert cache.stats.rows_served > 80 * 8
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(one, other)
