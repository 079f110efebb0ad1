"""FreezeOut as a PyTorch learning rate scheduler."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cachefreeze.models.units import Units
from cachefreeze.schedule import Schedule


def param_groups(units: Units) -> list[dict[str, Any]]:
    """One parameter group a unit, in order: what `FreezeOutLR` expects of an optimiser.

    Example:
        >>> optimizer = torch.optim.SGD(param_groups(units), lr=0.1)  # doctest: +SKIP
    """
    return [
        {"params": list(unit.parameters()), "name": name}
        for name, unit in zip(units.names, units, strict=True)
    ]


class FreezeOutLR(LRScheduler):
    """Anneals each unit's rate to zero on its own cosine, first units first, and freezes it there.

    Step it after every optimiser step (not once an epoch). A unit whose rate has reached zero is
    frozen through `units.freeze`: out of the backward pass, in eval mode for good. Its parameter
    group stays in the optimiser, at rate 0. (FreezeOut, Brock et al., 2017, section 2.)

    Args:
        optimizer: any, with one parameter group a unit in the units' order (`param_groups`); the
            groups' rates are the base rates, which need not be equal.
        units: of the network that is trained.
        total_steps: optimiser steps of the whole run.
        t0, shape, scale_lr: see `Schedule`.
        last_epoch: the last step taken, as in every PyTorch scheduler; -1 starts a run.

    Raises:
        ValueError: a value outside its range, or not one parameter group a unit.

    Example:
        >>> scheduler = FreezeOutLR(optimizer, units, total_steps=1000)  # doctest: +SKIP
        >>> optimizer.step(); scheduler.step()  # doctest: +SKIP
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
        if len(optimizer.param_groups) != len(units):
            raise ValueError(
                f"the optimiser has {len(optimizer.param_groups)} parameter groups and the network "
                f"{len(units)} units: give it one group a unit, as param_groups(units) does"
            )
        self.units = units
        self.schedule = Schedule(len(units), total_steps, t0, shape, scale_lr)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of every unit at the coming step."""
        return [
            base * self.schedule.factor(unit, self.last_epoch)
            for unit, base in enumerate(self.base_lrs)
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
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken: rates set, units frozen.

        Raises:
            ValueError: the state is of a network with another number of units.
        """
        if len(state_dict["base_lrs"]) != len(self.units):
            raise ValueError(
                f"the scheduler's state is of {len(state_dict['base_lrs'])} units and the network "
                f"has {len(self.units)}: load it into the network that it was saved with"
            )
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self.schedule = Schedule(
            len(self.units),
            *(state_dict[key] for key in ("total_steps", "t0", "shape", "scale_lr")),
        )
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # a compiled or captured step holds on to it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
        self._step_count = self.last_epoch + 1
        self.units.freeze(self.schedule.frontier(self.last_epoch))
