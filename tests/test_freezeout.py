"""FreezeOutLR is a PyTorch scheduler, and what it freezes stays frozen."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from cachefreeze import FreezeOutLR, Units, param_groups, partition
from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.models import build


def small_network() -> nn.Sequential:
    return build("wrn", 3, depth=10, width=1, dropout=0.2)


def optimizer_for(units: Units, kind: type = torch.optim.SGD, **options: object):
    if kind is torch.optim.SGD:
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, **options}
    return kind(param_groups(units), **options)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    model.train()
    loss = model(torch.randn(4, 3, 16, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_frozen_unit_does_not_change_by_a_bit_until_the_end() -> None:
    model = small_network()
    units = partition(model)
    optimizer = optimizer_for(units)
    scheduler = FreezeOutLR(optimizer, units, 40, t0=0.2, shape="linear")
    frozen: dict[int, dict[str, Tensor]] = {}
    for _ in range(40):
        one_step(model, optimizer, scheduler)
        for index in range(units.frontier):
            now = snapshot(units[index])
            for name, value in frozen.setdefault(index, now).items():
                assert torch.equal(value, now[name]), f"{units.names[index]}.{name} moved"
    assert sorted(frozen) == list(range(len(units) - 1)), "not every hidden unit was frozen"


def test_a_unit_that_is_not_frozen_yet_goes_on_changing() -> None:
    model = small_network()
    units = partition(model)
    optimizer = optimizer_for(units)
    scheduler = FreezeOutLR(optimizer, units, 40, t0=0.2, shape="linear")
    for _ in range(39):
        before = [snapshot(unit) for unit in units]
        trained = units.frontier
        one_step(model, optimizer, scheduler)
        for index in range(trained, len(units)):
            now = snapshot(units[index])
            assert any(not torch.equal(now[name], value) for name, value in before[index].items())


def test_a_frozen_batch_norm_stays_in_eval_mode_after_train() -> None:
    model = small_network()
    units = partition(model)
    units.freeze(2)
    model.train()
    assert not any(module.training for unit in units[:2] for module in unit.modules())
    assert all(module.training for unit in units[2:] for module in unit.modules())


def test_a_frozen_network_can_be_copied_and_the_copy_is_frozen_too() -> None:
    model = small_network()
    partition(model).freeze(2)
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin[1].training
    assert not twin[1].bn1.weight.requires_grad
    # The copy's pin must hold on to the copy, not to the original.
    assert twin[1].train() is twin[1]


def test_frozen_units_are_left_out_of_the_backward_pass() -> None:
    model = small_network()
    units = partition(model)
    units.freeze(2)
    model.train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    for index, unit in enumerate(units):
        for parameter in unit.parameters():
            assert (parameter.grad is None) == (index < 2)


def test_a_frozen_parameter_lets_go_of_its_gradient() -> None:
    model = small_network()
    units = partition(model)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    units.freeze(2)
    assert all(p.grad is None for unit in units[:2] for p in unit.parameters())
    # An optimiser that still found a gradient would go on with weight decay and momentum.
    optimizer = optimizer_for(units)
    before = snapshot(units[0])
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in snapshot(units[0]).items())


def test_it_is_a_scheduler_that_keeps_every_group() -> None:
    units = partition(small_network())
    optimizer = optimizer_for(units)
    scheduler = FreezeOutLR(optimizer, units, 20, t0=0.5, shape="linear")
    assert isinstance(scheduler, LRScheduler)
    schedule = Schedule(len(units), 20, 0.5, "linear")
    for step in range(20):
        expected = [0.1 * schedule.factor(unit, step) for unit in range(len(units))]
        assert scheduler.get_last_lr() == pytest.approx(expected, abs=1e-15)
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert len(optimizer.param_groups) == len(units)
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_it_works_with_any_optimiser_and_base_rates_of_its_groups(kind: type) -> None:
    model = small_network()
    units = partition(model)
    groups = param_groups(units)
    for index, group in enumerate(groups):
        group["lr"] = 1e-3 * (index + 1)
    optimizer = kind(groups)
    scheduler = FreezeOutLR(optimizer, units, 20, t0=0.5, shape="linear", scale_lr=False)
    assert scheduler.get_last_lr() == pytest.approx([1e-3 * (i + 1) for i in range(len(units))])
    for _ in range(15):
        one_step(model, optimizer, scheduler)
    before = snapshot(units[0])
    one_step(model, optimizer, scheduler)
    assert all(torch.equal(before[name], value) for name, value in snapshot(units[0]).items())


def test_a_unit_without_parameters_may_have_an_empty_group() -> None:
    units = Units({"conv": nn.Conv2d(3, 4, 3), "pool": nn.MaxPool2d(2), "head": nn.Flatten()})
    optimizer = torch.optim.SGD(param_groups(units), lr=0.1)
    assert len(FreezeOutLR(optimizer, units, 10).get_last_lr()) == 3


def test_its_state_is_plain_and_goes_on_where_it_was_taken() -> None:
    model = small_network()
    units = partition(model)
    optimizer = optimizer_for(units)
    scheduler = FreezeOutLR(optimizer, units, 40, t0=0.2, shape="linear")
    for _ in range(20):
        one_step(model, optimizer, scheduler)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    optimizer_state, scheduler_state = torch.load(file, weights_only=True)

    twin = partition(small_network())
    twin_optimizer = optimizer_for(twin, lr=0.7)
    twin_scheduler = FreezeOutLR(twin_optimizer, twin, 99)
    twin_optimizer.load_state_dict(optimizer_state)
    twin_scheduler.load_state_dict(scheduler_state)
    assert twin.frontier == units.frontier > 0
    for _ in range(20):
        assert twin_scheduler.get_last_lr() == scheduler.get_last_lr()
        assert twin.frontier == units.frontier
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimisers are not stepped here
            scheduler.step()
            twin_scheduler.step()


def test_a_state_of_another_network_is_refused() -> None:
    units = partition(small_network())
    state = FreezeOutLR(optimizer_for(units), units, 10).state_dict()
    other = Units({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    scheduler = FreezeOutLR(torch.optim.SGD(param_groups(other), lr=0.1), other, 10)
    with pytest.raises(ValueError, match="5 parameter groups"):
        scheduler.load_state_dict(state)


def test_an_optimiser_without_a_group_for_each_unit_is_refused() -> None:
    model = small_network()
    with pytest.raises(ValueError, match="param_groups"):
        FreezeOutLR(torch.optim.SGD(model.parameters(), lr=0.1), partition(model), 10)
