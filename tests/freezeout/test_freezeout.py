"""FreezeOutLR is a PyTorch scheduler for any model, and what it freezes stays frozen."""

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze import FreezeOutLR, Schedule, param_groups, units_of
from cachefreeze.freezeout import freeze_units
from cachefreeze.models import build
from tests.freezeout.networks import Language, UNet, bert, timm_vit, vit

STEPS = 24
IMAGES = (4, 3, 32, 32)
ANY = {
    "wrn": (lambda: build("wrn", 3, depth=10, width=1, dropout=0.2), IMAGES),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=3), IMAGES),
    "vit": (vit, IMAGES),
    "timm vit": (timm_vit, IMAGES),
    "unet": (UNet, IMAGES),
    "bert": (bert, (4, 6)),
    "tied weights": (Language, (4, 6)),
}


class Run:
    """A model in training on batches that step and seed decide."""

    def __init__(
        self,
        name: str = "wrn",
        seed: int = 0,
        freeze_first: int = 0,
        lr: float = 0.05,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        make, self.shape = ANY[name]
        self.model = make()
        x = self.batch(0)
        if freeze_first:
            freeze_units(self.model, freeze_first, x)
        self.units = units_of(self.model, x)
        self.optimizer = torch.optim.SGD(
            param_groups(self.model, x), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-2
        )
        options = {"t0": 0.2, "shape": "linear", **options}
        self.scheduler = FreezeOutLR(self.optimizer, self.model, STEPS, **options)

    def batch(self, step: int) -> Tensor:
        random = torch.Generator().manual_seed(step)
        if len(self.shape) == 2:
            return torch.randint(20, self.shape, generator=random)
        return torch.randn(self.shape, generator=random)

    def step(self, number: int) -> None:
        torch.manual_seed(number)  # of dropout
        self.model.train()
        out = self.model(self.batch(number))
        logits = getattr(out, "logits", out).flatten(1)
        loss = F.cross_entropy(logits, torch.arange(4) % 2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def frozen_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that have parameters, and none but of frozen units."""
        frozen = {
            id(one) for unit in self.units[: self.scheduler.frontier] for one in unit.parameters
        }
        for name, module in self.model.named_modules():
            held = [id(one) for one in module.parameters()]
            if held and frozen.issuperset(held):
                yield name, module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ANY)
def test_a_frozen_unit_does_not_change_by_a_bit_until_the_end(name: str) -> None:
    run = Run(name)
    frozen: dict[str, dict[str, Tensor]] = {}
    for number in range(STEPS):
        run.step(number)
        for path, module in run.frozen_modules():
            now = snapshot(module)
            for key, value in frozen.setdefault(path, now).items():
                assert torch.equal(value, now[key]), f"{path}.{key} moved in step {number}"
            assert not any(one.training for one in module.modules()), path
            assert all(one.grad is None for one in module.parameters()), path
    hidden = {id(one) for unit in run.units[:-1] for one in unit.parameters}
    for one in run.model.parameters():
        assert one.requires_grad == (id(one) not in hidden)
    assert run.scheduler.frontier == len(run.units) - 1
    assert len(frozen) >= len(run.units) - 1 >= 3


@pytest.mark.parametrize("name", ["wrn", "unet", "tied weights"])
def test_a_unit_that_is_not_frozen_yet_goes_on_changing(name: str) -> None:
    run = Run(name)
    for number in range(STEPS - 1):
        trained = run.units[run.scheduler.frontier :]
        before = [[one.detach().clone() for one in unit.parameters] for unit in trained]
        run.step(number)
        for unit, values in zip(trained, before, strict=True):
            pairs = zip(unit.parameters, values, strict=True)
            assert any(not torch.equal(one, value) for one, value in pairs), unit.name


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_cut_off() -> None:
    whole = Run()
    for number in range(STEPS):
        whole.step(number)
    first = Run()
    for number in range(STEPS // 2):
        first.step(number)
    file = io.BytesIO()
    parts = (first.model, first.optimizer, first.scheduler)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    model, optimizer, scheduler = torch.load(file, weights_only=True)

    second = Run(seed=1)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.scheduler.load_state_dict(scheduler)
    assert second.scheduler.frontier == first.scheduler.frontier > 0
    for number in range(STEPS // 2, STEPS):
        second.step(number)
    expected = whole.model.state_dict()
    for key, value in second.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_its_state_says_the_schedule_and_wins_over_what_it_was_made_with() -> None:
    run = Run()
    for number in range(STEPS // 2):
        run.step(number)
    twin = Run(lr=0.7, t0=0.9, shape="cubic")
    twin.scheduler.load_state_dict(run.scheduler.state_dict())
    assert twin.scheduler.schedule == run.scheduler.schedule
    for _ in range(STEPS // 2):
        assert twin.scheduler.get_last_lr() == run.scheduler.get_last_lr()
        assert [group["lr"] for group in twin.optimizer.param_groups] == run.scheduler.get_last_lr()
        assert twin.scheduler.frontier == run.scheduler.frontier
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizers are not stepped here
            run.scheduler.step()
            twin.scheduler.step()


def test_a_frozen_network_can_be_copied_and_the_copy_is_frozen_too() -> None:
    run = Run()
    for number in range(STEPS // 2):
        run.step(number)
    twin = copy.deepcopy(run.model)
    twin.train()
    assert not twin[1].training
    assert not twin[1].bn1.weight.requires_grad
    # The copy's pin must hold on to the copy, not to the original.
    assert twin[1].train() is twin[1]


def test_a_frozen_parameter_is_not_moved_by_decay_or_momentum() -> None:
    run = Run()
    for number in range(STEPS // 3):
        run.step(number)
    count = run.scheduler.frontier
    assert count > 0
    frozen = [one for unit in run.units[:count] for one in unit.parameters]
    assert all(run.optimizer.state[one]["momentum_buffer"].any() for one in frozen)
    before = [one.clone() for one in frozen]
    for group in run.optimizer.param_groups:
        group["lr"] = 1.0  # it is not the rate alone that holds them
    run.optimizer.zero_grad(set_to_none=False)
    run.optimizer.step()
    assert all(torch.equal(one, value) for one, value in zip(frozen, before, strict=True))


def test_it_is_a_scheduler_that_keeps_every_group() -> None:
    run = Run(t0=0.5)
    assert isinstance(run.scheduler, LRScheduler)
    schedule = Schedule(5, STEPS, 0.5, "linear")
    assert run.scheduler.schedule == schedule
    assert run.scheduler.names == tuple(unit.name for unit in run.units)
    for step in range(STEPS):
        expected = [0.05 * schedule.factor(unit, step) for unit in range(5)]
        assert run.scheduler.get_last_lr() == pytest.approx(expected, abs=1e-15)
        assert [group["lr"] for group in run.optimizer.param_groups] == run.scheduler.get_last_lr()
        assert run.scheduler.frontier == schedule.frontier(step)
        run.optimizer.step()
        run.scheduler.step()
    assert len(run.optimizer.param_groups) == 5
    assert run.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_will_do_and_groups_may_have_rates_of_their_own(kind: type) -> None:
    run = Run()
    groups = param_groups(run.model)
    for index, group in enumerate(groups):
        group["lr"] = 1e-3 * (index + 1)
    run.optimizer = kind(groups)
    run.scheduler = FreezeOutLR(
        run.optimizer, run.model, STEPS, t0=0.5, shape="linear", scale_lr=False
    )
    assert run.scheduler.get_last_lr() == pytest.approx([1e-3 * (i + 1) for i in range(5)])
    for number in range(18):
        run.step(number)
    before = snapshot(run.model[0])
    run.step(18)
    assert all(torch.equal(before[name], value) for name, value in snapshot(run.model[0]).items())


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    run = Run()
    groups = [{**group, "lr": torch.tensor(0.1)} for group in param_groups(run.model)]
    run.optimizer = torch.optim.SGD(groups)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    run.scheduler = FreezeOutLR(run.optimizer, run.model, STEPS, t0=0.2, shape="linear")
    for number in range(STEPS // 2):
        run.step(number)
    state = run.scheduler.state_dict()
    assert all(isinstance(rate, float) for rate in state["base_lrs"])
    run.scheduler.load_state_dict(state)
    now = [group["lr"] for group in run.optimizer.param_groups]
    assert all(one is other for one, other in zip(rates, now, strict=True))
    schedule = run.scheduler.schedule
    expected = [0.1 * schedule.factor(unit, STEPS // 2) for unit in range(5)]
    assert [float(rate) for rate in now] == pytest.approx(expected)


def test_biases_and_norms_may_be_without_decay_and_freeze_with_their_unit() -> None:
    run = Run()
    groups = param_groups(run.model, decay_all=False)
    assert [group["unit"] for group in groups] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for group in groups:
        assert all((one.dim() < 2) == ("weight_decay" in group) for one in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))
    run.optimizer = torch.optim.SGD(groups, lr=0.05, weight_decay=0.1)
    run.scheduler = FreezeOutLR(run.optimizer, run.model, STEPS, t0=0.2, shape="linear")
    assert run.scheduler.names == tuple(unit.name for unit in run.units)
    while run.scheduler.frontier < 2:
        run.step(run.scheduler.last_epoch)
    rates = run.scheduler.get_last_lr()
    assert rates[:3] == [0.0] * 3
    assert rates[3] == rates[4] > 0
    assert not any(one.requires_grad for one in run.model[1].parameters())


def test_groups_that_do_not_say_are_units_in_their_order() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [{"params": module.parameters()} for module in reversed(model)]
    scheduler = FreezeOutLR(torch.optim.SGD(groups, lr=0.1), model, 4, t0=0.5, shape="linear")
    scheduler.optimizer.step()
    for _ in range(2):
        scheduler.step()
    assert scheduler.names == ("unit 0", "unit 1", "unit 2")
    assert not model[2].weight.requires_grad
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("by_hand", [False, True])
def test_first_units_without_gradient_are_frozen_from_the_start(by_hand: bool) -> None:
    run = Run(freeze_first=0 if by_hand else 2)
    if by_hand:
        run.model[:2].requires_grad_(False)
        run.scheduler = FreezeOutLR(run.optimizer, run.model, STEPS, t0=0.2, shape="linear")
    assert run.scheduler.frontier == 2
    assert run.scheduler.schedule == Schedule(5, STEPS, 0.2, "linear", first=2)
    before = snapshot(run.model[:2])
    for number in range(6):
        run.step(number)
    assert not run.model[1].training, "its batch norms stay in eval mode"
    assert all(torch.equal(before[name], value) for name, value in snapshot(run.model[:2]).items())
    # A model that is not frozen goes on from there.
    twin = Run()
    twin.scheduler.load_state_dict(run.scheduler.state_dict())
    assert twin.scheduler.frontier == run.scheduler.frontier
    assert not twin.model.train()[1].training


def test_a_model_that_is_frozen_altogether_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 5 units are frozen"):
        Run(freeze_first=5)


def test_a_state_of_another_network_is_refused() -> None:
    state = Run().scheduler.state_dict()
    with pytest.raises(ValueError, match="5 parameter groups and the optimizer has 7"):
        Run("unet").scheduler.load_state_dict(state)


def test_an_optimizer_of_other_groups_is_refused() -> None:
    model, other = Run().model, Run().model
    with pytest.raises(ValueError, match=r"1 parameter groups are not .*param_groups\(model\)"):
        FreezeOutLR(torch.optim.SGD(model.parameters(), lr=0.1), model, 10)
    with pytest.raises(ValueError, match="param_groups"):
        FreezeOutLR(torch.optim.SGD(param_groups(other), lr=0.1), model, 10)
    first, _, *others = param_groups(model)
    with pytest.raises(ValueError, match="param_groups"):
        FreezeOutLR(torch.optim.SGD([first, *others], lr=0.1), model, 10)


def test_the_loop_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "tutorials" / "freezeout.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    dataset = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 3)
    names: dict[str, Any] = {
        "torch": torch,
        "model": UNet(),
        "loader": DataLoader(dataset, 4),
        "epochs": 3,
        "loss_function": lambda logits, y: F.cross_entropy(logits, y % 2),
    }
    exec(code, names)
    assert names["scheduler"].frontier == len(names["scheduler"].names) - 1
    assert not names["model"].down.training
    names["cache"].close()
