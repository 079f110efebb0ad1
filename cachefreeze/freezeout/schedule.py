"""FreezeOut's arithmetic (Brock et al., 2017, section 2): rates of units, and freezing steps."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "squared": lambda x: x**2,
    "cubic": lambda x: x**3,
}


@dataclass(frozen=True)
class Schedule:
    """The learning rates of all units at every step. Unit i trains for a share t_i of the run.

    Args:
        units: Number of units, including the head, which is the last unit and never freezes.
        total_steps: Number of optimizer steps of the whole run.
        t0: Share of the run after which the first unit freezes, before `shape` is applied; in
            (0, 1]. At 1 nothing freezes, and every unit follows one plain cosine.
        shape: Name of the function g in t_i = g(t0 + (1 - t0) i / L), where the head is unit L:
            `linear`, `squared` or `cubic`.
        scale_lr: Whether unit i's initial rate is divided by t_i, so that the rates of all units
            have equal integrals over the run.
        first: Number of units that are frozen before the first step. The other units follow the
            schedule of a network without these.

    Raises:
        ValueError: A value is outside its range.
    """

    units: int
    total_steps: int
    t0: float = 0.8
    shape: str = "cubic"
    scale_lr: bool = True
    first: int = 0

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"units is {self.units}: a schedule needs at least one")
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}: a schedule needs at least one")
        if not 0 < self.t0 <= 1:
            raise ValueError(f"t0 is {self.t0}: it must be above 0 and at most 1")
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}: it must be one of {', '.join(SHAPES)}")
        if not 0 <= self.first < self.units:
            raise ValueError(
                f"{self.first} of {self.units} units are frozen from the start: one has to train"
            )

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """Share t_i of the run for which each unit trains, in [0, 1]."""
        shape, last = SHAPES[self.shape], self.units - 1 - self.first
        hidden = [shape(self.t0 + (1 - self.t0) * unit / last) for unit in range(last)]
        return (*(0.0 for _ in range(self.first)), *hidden, 1.0)

    @cached_property
    def freeze_steps(self) -> tuple[int, ...]:
        """First step at which each unit is frozen; `total_steps` if it trains to the end."""
        return tuple(_ceil(end * self.total_steps) for end in self.ends)

    def frontier(self, step: int) -> int:
        """Returns the number of units that are frozen at a step (from 0).

        After the last step, it is the number at the last step.
        """
        return bisect_right(self.freeze_steps, min(step, self.total_steps - 1))

    def factor(self, unit: int, step: int) -> float:
        """Returns the factor on the base rate of a unit at a step (from 0)."""
        if step >= self.freeze_steps[unit]:
            return 0.0
        end = self.ends[unit]
        initial = 1 / end if self.scale_lr else 1.0
        return 0.5 * initial * (1 + math.cos(math.pi * step / self.total_steps / end))


def _ceil(steps: float) -> int:
    """Rounds up, but a product that is whole except for rounding errors counts as whole."""
    whole = round(steps)
    return whole if abs(steps - whole) < 1e-9 * steps else math.ceil(steps)
