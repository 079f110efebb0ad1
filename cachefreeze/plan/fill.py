"""The decision whether keeping the rows of the training set pays, after units have frozen.

A pass over the data set runs every row through the units that have frozen since the last such pass,
and writes the results. Each later step is spared that work. Costs are those of the run's own steps.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fill:
    """A pass over the training set that could be made after units have frozen.

    Args:
        cost: Seconds of the pass.
        again: Seconds of the pass that are spent once more if another pass follows: on reading,
            writing and comparing rows.
        spared: Seconds that each later step saves.
        steps_left: Number of steps that are left of the run.
    """

    cost: float
    again: float
    spared: float
    steps_left: int

    @property
    def gain(self) -> float:
        """Seconds that the pass saves the run, if no more units freeze."""
        return self.spared * self.steps_left - self.cost


def worth_filling(now: Fill, later: Fill | None) -> bool:
    """Says whether a pass over the training set pays now.

    A later pass also serves the units that freeze next. So the pass at this step is left out if it
    saves fewer seconds until the later pass than it adds (`again`).

    Args:
        now: Pass at this step.
        later: Pass when the next units freeze. None if none do.
    """
    if now.gain <= 0:
        return False
    if later is None or later.gain <= 0:
        return True
    return now.spared * (now.steps_left - later.steps_left) > now.again
