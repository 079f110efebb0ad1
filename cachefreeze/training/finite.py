"""Refuses losses and weights that are infinite or not a number, and says where they came up."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cachefreeze.errors import UserError
from cachefreeze.freezeout import FreezeOutLR
from cachefreeze.training.run_state import RunState


class FiniteChecks:
    """Checks the numbers of a run. Methods raise UserError.

    Args:
        state: Progress of the run.
        scheduler: Schedule of the rates.
        last: Path of the newest checkpoint, if there is one.
    """

    def __init__(self, state: RunState, scheduler: FreezeOutLR, last: Path) -> None:
        self._state, self._scheduler, self._last = state, scheduler, last

    def losses(self, losses: Sequence[Tensor]) -> None:
        """Checks the last losses of training."""
        if losses and not (finite := torch.stack(list(losses)).isfinite()).all():
            index = int((~finite).nonzero()[0])
            step = self._state.step - len(losses) + index + 1
            raise self._error("loss", float(losses[index]), step)

    def validation(self, loss: float) -> None:
        """Checks the loss of a validation."""
        if not torch.tensor(loss).isfinite():
            raise self._error("validation loss", loss, self._state.step)

    def weights(self, model: nn.Module) -> None:
        """Checks weights and running statistics."""
        for name, tensor in model.state_dict().items():
            if not (finite := tensor.isfinite()).all():
                value = float(tensor[~finite][0])
                raise self._error(f"weight {name}", value, self._state.step)

    def _error(self, what: str, value: float, step: int) -> UserError:
        schedule, names = self._scheduler.schedule, list(self._scheduler.names)
        rates = rates_at(self._scheduler, step - 1)
        kept = f"; {self._last} was saved before that" if self._last.exists() else ""
        return UserError(
            f"the {what} is {value} at step {step:,} (epoch {self._state.epoch + 1}), with "
            f"{schedule.frontier(step - 1)} of {len(names)} units frozen and rates from "
            f"{rates[0]:.3g} ({names[0]}) to {rates[-1]:.3g} ({names[-1]}): try a smaller "
            f"--lr{kept}"
        )


def rates_at(scheduler: FreezeOutLR, step: int) -> list[float]:
    """Returns the rate of every unit at a step.

    Args:
        scheduler: Schedule of the rates.
        step: Number of the step, from 0.
    """
    factor = scheduler.schedule.factor
    return [float(base) * factor(unit, step) for unit, base in enumerate(scheduler.base_lrs)]
