"""FreezeOut as a PyTorch learning rate scheduler."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cachefreeze.models.units import Units
from cachefreeze.schedule import Schedule


def param_groups(units: Units, *, decay_all: bool = True) -> list[dict[str, Any]]:
    """Parameter groups for any optimiser, by unit and in order: what `FreezeOutLR` expects.

    Args:
        units: see `partition`.
        decay_all: with False, biases and the parameters of norms (all that have one axis or none)
            come in groups of their own, without weight decay.

    Returns:
        One group a unit, or two, each with the name of its unit (`name`) and its number (`unit`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cachefreeze import Units
        >>> units = Units({"stem": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> optimizer = torch.optim.SGD(param_groups(units), lr=0.1, momentum=0.9)
        >>> [group["name"] for group in optimizer.param_groups]
        ['stem', 'head']
    """
    groups = []
    for number, (name, unit) in enumerate(zip(units.names, units, strict=True)):
        of_unit = {"name": name, "unit": number}
        parameters = list(unit.parameters())
        if decay_all:
            groups.append({"params": parameters, **of_unit})
            continue
        small = [parameter for parameter in parameters if parameter.dim() < 2]
        large = [parameter for parameter in parameters if parameter.dim() >= 2]
        groups.append({"params": large, **of_unit})
        groups.append({"params": small, "weight_decay": 0.0, **of_unit})
    return groups


class FreezeOutLR(LRScheduler):
    """Anneals each unit's rate to zero on its own cosine, first units first, and freezes it there.

    Step it after every optimiser step (not once an epoch). A unit whose rate has reached zero is
    frozen through `units.freeze`: out of the backward pass, in eval mode for good. Its parameter
    group stays in the optimiser, at rate 0. (FreezeOut, Brock et al., 2017, section 2.) Units that
    are frozen already stay so; the others follow the schedule of a network that they are all of.

    Args:
        optimizer: any, with the groups of `param_groups(units)`, or one group a unit in the units'
            order; the groups' rates are the base rates, which need not be equal.
        units: of the network that is trained.
        total_steps: optimiser steps of the whole run.
        t0, shape, scale_lr: see `Schedule`.
        last_epoch: the last step taken, as in every PyTorch scheduler; -1 starts a run.

    Raises:
        ValueError: a value outside its range, or parameter groups that are not the units'.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cachefreeze import Units
        >>> units = Units({"stem": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> optimizer = torch.optim.SGD(param_groups(units), lr=0.1)
        >>> scheduler = FreezeOutLR(optimizer, units, total_steps=10, t0=0.5, shape="linear")
        >>> for step in range(10):
        ...     units.run(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> units.frontier, scheduler.get_last_lr()[0]
        (1, 0.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        units: Units,
        total_steps: int,
        t0: float = 0.8,
        shape: str = "cubic",
        scale_lr: bool = True,
        last_epoch: int = -1,
    ) -> None:
        groups = optimizer.param_groups
        # By unit; a group that does not say is the next unit's.
        self._unit_of = [group.get("unit", number) for number, group in enumerate(groups)]
        if sorted(set(self._unit_of)) != list(range(len(units))):
            raise ValueError(
                f"the optimiser's {len(groups)} parameter groups are not those of the network's "
                f"{len(units)} units: give it what param_groups(units) returns"
            )
        self.units = units
        self.schedule = Schedule(len(units), total_steps, t0, shape, scale_lr, units.frontier)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of every unit at the coming step."""
        return [
            base * self.schedule.factor(unit, self.last_epoch)
            for unit, base in zip(self._unit_of, self.base_lrs, strict=True)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the coming step, and freeze the units that have come to their end."""
        super().step(epoch)
        self.units.freeze(self.schedule.frontier(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists only, so that it loads with `torch.load(weights_only=True)`."""
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
        """Go on where the state was taken: rates set, units frozen.

        Raises:
            ValueError: the state is of other parameter groups.
        """
        if len(state_dict["base_lrs"]) != len(self._unit_of):
            raise ValueError(
                f"the scheduler's state is of {len(state_dict['base_lrs'])} parameter groups and "
                f"the optimiser has {len(self._unit_of)}: load it with the network and the groups "
                "that it was saved with"
            )
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        settings = {key: state_dict[key] for key in ("total_steps", "t0", "shape", "scale_lr")}
        # Older checkpoints do not have it.
        self.schedule = Schedule(len(self.units), first=state_dict.get("first", 0), **settings)
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # a compiled or captured step holds on to it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
        self._step_count = self.last_epoch + 1
        self.units.freeze(self.schedule.frontier(self.last_epoch))
