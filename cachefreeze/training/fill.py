"""When it pays to keep the rows of the training set, after units have frozen.

A pass over the data set computes, for every row, what has frozen since the last such pass, and
writes it. Each later step is spared that work. Costs are those seen in the run's own steps.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fill:
    """A pass over the training set that could be made after units have frozen.

    Args:
        cost: Seconds of the pass.
        again: Seconds of it that are spent once more if another pass follows: on reading, writing
            and comparing rows.
        spared: Seconds that each later step is spared.
        steps_left: Number of steps that are left of the run.
    """

    cost: float
    again: float
    spared: float
    steps_left: int

    @property
    def gain(self) -> float:
        """Seconds that it spares the run, if units freeze no more."""
        return self.spared * self.steps_left - self.cost


def worth_filling(now: Fill, later: Fill | None) -> bool:
    """Says whether a pass over the training set pays, and whether it pays now.

    The units that freeze next may be served too by a pass that comes later. This one is left out
    for its sake if, until then, it spares less than it costs.

    Args:
        now: Pass at this step.
        later: Pass when the next units freeze. None if none do.
    """
    if now.gain <= 0:
        return False
    if later is None or later.gain <= 0:
        return True
    return now.spared * (now.steps_left - later.steps_left) > now.again
