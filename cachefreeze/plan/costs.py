"""Costs of a batch, which every prediction is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Share of a forward pass that must be frozen work for a cache to be worth its while.
LEAST_SHARE = 0.1
# Bytes of kept rows that are read in a second (found, copied, and their input hashed), and that are
# written, to memory and to the directory.
READ_RATE, WRITE_RATE = 1.5e9, 0.75e9
# The same on a GPU, from half of what its memory can do. Never measured.
GPU_READ_RATE, GPU_WRITE_RATE = 5e11, 5e11
# Seconds of the backward pass for each of the forward pass, where they are not measured.
BACKWARD = 2.0


@dataclass(frozen=True)
class Costs:
    """Costs of a batch, in seconds.

    Args:
        forward: Seconds of the forward pass through each unit.
        backward: Seconds of the backward pass and the update, for each second of the forward pass
            through the units that train.
        read: Seconds of reading the batch's kept rows, for each number of frozen units.
        load: Seconds of waiting for the batch's pixels.
        write: Seconds of writing the batch's rows, for each number of frozen units.
        other: Seconds of a step of training that no unit accounts for.
    """

    forward: tuple[float, ...]
    backward: float
    read: tuple[float, ...]
    load: float
    write: tuple[float, ...]
    other: float = 0.0

    @classmethod
    def measured(
        cls,
        step: float,
        load: float,
        forward: Sequence[float],
        sizes: Sequence[int],
        frozen: int,
        served: float = 0.0,
        on_gpu: bool = False,
    ) -> "Costs":
        """Computes costs from measured times.

        Where units are frozen, a step tells little of the backward pass: a last layer takes less
        time than all that belongs to no unit. So the backward pass counts as `BACKWARD` forward
        passes at most, and what is left of the step as time that no unit accounts for.

        Args:
            step: Seconds of a whole step.
            load: Seconds of the step that were spent on waiting for pixels.
            forward: Seconds of the forward pass through each unit.
            sizes: Bytes of the input of each unit.
            frozen: Number of units that were frozen.
            served: Share of the rows that did not pass the frozen units, but were read.
            on_gpu: Whether rows are kept on a GPU.
        """
        kept = (0, *sizes[1:], 0)
        rates = (GPU_READ_RATE, GPU_WRITE_RATE) if on_gpu else (READ_RATE, WRITE_RATE)
        read, write = (tuple(size / rate for size in kept) for rate in rates)
        passed = sum(forward) - served * (sum(forward[:frozen]) - read[frozen])
        rest = max(step - load - passed, 0.0)
        trained = sum(forward[frozen:])
        backward = rest / max(trained, 1e-9)
        if frozen:
            backward = min(backward, BACKWARD)
        other = max(rest - backward * trained, 0.0) if frozen else 0.0
        return cls(tuple(forward), backward, read, load, write, other)

    @classmethod
    def unknown(cls, units: int) -> "Costs":
        """Returns costs of one second for each unit, for when nothing was measured.

        Only their proportions mean anything.
        """
        return cls((1.0,) * units, BACKWARD, (0.0,) * (units + 1), 0.0, (0.0,) * (units + 1))

    @classmethod
    def from_json(cls, found: Mapping[str, Any], units: int) -> "Costs":
        """Reads costs from the dict that `dataclasses.asdict` made of them.

        Args:
            found: Dict of costs.
            units: Number of units of the network.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has another type.
            ValueError: A field is no number, or the costs are those of another network.
        """
        names = ("forward", "read", "write")
        forward, read, write = (tuple(map(float, found[name])) for name in names)
        if (len(forward), len(read), len(write)) != (units, units + 1, units + 1):
            raise ValueError("costs of another network")
        backward, load, other = (float(found[name]) for name in ("backward", "load", "other"))
        return cls(forward, backward, read, load, write, other)
