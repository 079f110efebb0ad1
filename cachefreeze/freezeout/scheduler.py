"""Stand-in until the package of the other branch is merged."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cachefreeze.freezeout.freezing import freeze
from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.freezeout.units import units_of


def param_groups(model: nn.Module, *example: Any, decay_all: bool = True) -> list[dict[str, Any]]:
    return [
        {"params": list(u.parameters), "name": u.name, "unit": n}
        for n, u in enumerate(units_of(model, *example))
    ]


class FreezeOutLR(LRScheduler):
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
        self.model = model
        groups = optimizer.param_groups
        self.names = [g["name"] for g in groups]
        first = 0
        while not any(p.requires_grad for p in groups[first]["params"]):
            first += 1
        self.schedule = Schedule(len(groups), total_steps, t0, shape, scale_lr, first)
        self.frontier = first
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [b * self.schedule.factor(u, self.last_epoch) for u, b in enumerate(self.base_lrs)]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._freeze()

    def _freeze(self) -> None:
        self.frontier = self.schedule.frontier(self.last_epoch)
        frozen = {id(p) for g in self.optimizer.param_groups[: self.frontier] for p in g["params"]}
        for child in self.model.children():
            ps = list(child.parameters())
            if ps and all(id(p) in frozen for p in ps) and any(p.requires_grad for p in ps):
                freeze(child)

    def state_dict(self) -> dict[str, Any]:
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
        if len(state_dict["base_lrs"]) != len(self.base_lrs):
            raise ValueError("other parameter groups")
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        settings = {key: state_dict[key] for key in ("total_steps", "t0", "shape", "scale_lr")}
        self.schedule = Schedule(len(self.base_lrs), first=state_dict["first"], **settings)
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates
        self._step_count = self.last_epoch + 1
        self._freeze()
