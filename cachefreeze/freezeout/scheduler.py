"""FreezeOut as a PyTorch learning rate scheduler."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.freezeout.units import freeze_parameters, units_of


def param_groups(
    model: nn.Module, /, *example: Any, decay_all: bool = True, **kwargs: Any
) -> list[dict[str, Any]]:
    """Returns parameter groups for any optimizer: one for each unit, in order.

    Args:
        model: Model to train.
        *example: Positional arguments of a forward pass, which shows the order of the units.
        decay_all: Whether weight decay applies to all parameters. If False, biases and the
            parameters of norms (all that have one axis or none) are in groups of their own,
            without weight decay.
        **kwargs: Keyword arguments of that pass.

    Returns:
        Groups, each with the name of its unit (`name`) and its number (`unit`).

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(param_groups(model), lr=0.1, momentum=0.9)
        >>> [group["name"] for group in optimizer.param_groups]
        ['0', '2']
    """
    groups = []
    for number, unit in enumerate(units_of(model, *example, **kwargs)):
        of_unit = {"name": unit.name, "unit": number}
        if decay_all:
            groups.append({"params": list(unit.parameters), **of_unit})
            continue
        small = [one for one in unit.parameters if one.dim() < 2]
        large = [one for one in unit.parameters if one.dim() >= 2]
        if large:
            groups.append({"params": large, **of_unit})
        if small:
            groups.append({"params": small, "weight_decay": 0.0, **of_unit})
    return groups


class FreezeOutLR(LRScheduler):
    """Anneals each unit's rate to zero on its own cosine, first units first, and freezes it there.

    Step it after every optimizer step (not once an epoch). A unit whose rate has reached zero takes
    no gradient any more. A module whose parameters are all frozen stays in eval mode whatever
    `train()` is called (see `freeze`). Its parameter group stays in the optimizer, at rate 0.
    (FreezeOut, Brock et al., 2017, section 2.) First units that take no gradient when the scheduler
    is made count as frozen. The other units follow the schedule of a model without these.

    Args:
        optimizer: Optimizer with the groups of `param_groups(model)`, or with one group for each
            unit, in the order in which units freeze. The rates of the groups are the base rates.
            They may differ.
        model: Model that is trained.
        total_steps: Number of optimizer steps of the whole run.
        t0: Share of the run after which the first unit freezes, before `shape` is applied; in
            (0, 1]. At 1 nothing freezes.
        shape: Name of the function that spreads the other freezes between the first one and the end
            of the run: `linear`, `squared` or `cubic`.
        scale_lr: Whether each unit's initial rate is divided by the share of the run for which it
            trains.
        last_epoch: Last step taken, as in every PyTorch scheduler. -1 starts a run.

    Attributes:
        names: Names of the units.
        schedule: Rates and freezes of the units at every step.

    Raises:
        ValueError: A value is outside its range, the optimizer holds other parameters than the
            model's, or it holds all of them in one group.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
        >>> scheduler = FreezeOutLR(optimizer, model, total_steps=10, t0=0.5, shape="linear")
        >>> for step in range(10):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.frontier, scheduler.get_last_lr()[0]
        (1, 0.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        total_steps: int,
        t0: float = 0.8,
        shape: str = "cubic",
        scale_lr: bool = True,
        last_epoch: int = -1,
    ) -> None:
        groups = optimizer.param_groups
        # By unit. A group that does not say is the next unit's.
        self._unit_of = [int(group.get("unit", number)) for number, group in enumerate(groups)]
        count = max(self._unit_of) + 1
        known = {id(one) for one in model.parameters()}
        given = [id(one) for group in groups for one in group["params"]]
        # One group of everything, as of `model.parameters()`, would never freeze.
        is_plain = len(groups) == 1 and "unit" not in groups[0]
        if (
            is_plain
            or sorted(set(self._unit_of)) != list(range(count))
            or not known.issuperset(given)
        ):
            raise ValueError(
                f"the optimizer's {len(groups)} parameter groups are not those of "
                f"{type(model).__name__}: give it what param_groups(model) returns"
            )
        names: dict[int, str] = {}
        for unit, group in zip(self._unit_of, groups, strict=True):
            names.setdefault(unit, str(group.get("name", f"unit {unit}")))
        self.names = tuple(names[unit] for unit in range(count))
        self.model = model
        self.optimizer = optimizer
        trained = [any(one.requires_grad for one in self._parameters(n)) for n in range(count)]
        first = [*trained, True].index(True)
        self.schedule = Schedule(count, total_steps, t0, shape, scale_lr, first)
        self._frontier = 0
        super().__init__(optimizer, last_epoch)  # which takes a first step, and so freezes

    @property
    def frontier(self) -> int:
        """Number of units that are frozen: the first ones. It only grows."""
        return self._frontier

    def _parameters(self, unit: int) -> list[nn.Parameter]:
        groups = zip(self._unit_of, self.optimizer.param_groups, strict=True)
        return [one for number, group in groups if number == unit for one in group["params"]]

    def _freeze(self, count: int) -> None:
        if count > self._frontier:
            units = range(self._frontier, count)
            freeze_parameters(self.model, [one for n in units for one in self._parameters(n)])
            self._frontier = count

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of every group at the coming step."""
        return [
            base * self.schedule.factor(unit, self.last_epoch)
            for unit, base in zip(self._unit_of, self.base_lrs, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the coming step, and freezes the units that have come to their end."""
        super().step(epoch)
        self._freeze(self.schedule.frontier(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers and lists, which load with `torch.load(weights_only=True)`."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "total_steps": self.schedule.total_steps,
            "t0": self.schedule.t0,
            "shape": self.schedule.shape,
            "scale_lr": self.schedule.scale_lr,
            "first": self.schedule.first,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was taken: rates are set, units frozen.

        Args:
            state_dict: State from `state_dict`.

        Raises:
            ValueError: The state was saved with other parameter groups.
        """
        if len(state_dict["base_lrs"]) != len(self._unit_of):
            raise ValueError(
                f"the scheduler's state has {len(state_dict['base_lrs'])} parameter groups and the "
                f"optimizer has {len(self._unit_of)}: load it with the network and the groups that "
                "it was saved with"
            )
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        settings = {
            key: state_dict[key] for key in ("total_steps", "t0", "shape", "scale_lr", "first")
        }
        self.schedule = Schedule(len(self.names), **settings)
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # a compiled or captured step holds on to it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
        self._step_count = self.last_epoch + 1
        self._freeze(self.schedule.frontier(self.last_epoch))
