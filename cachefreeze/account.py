"""The time of a run: what it is made of, and what it would have been otherwise.

The time of a run is what its user waited: from the command to the end of the last epoch, with
loading, measuring, filling, validation and checkpoints. Starting Python and drawing the report are
not in it, nor is, where a run was cut off, the time until it went on.

Every time here is a sum of numbers in summary.json and is written as such, so that whoever shows it
can show where it comes from: `summary.wall_seconds - summary.profile_seconds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WHOLE = "summary.wall_seconds"
# What the cache saved, less all that it cost; and the other way round.
SAVED = "summary.cache.saved_seconds - summary.profile_seconds"
COST = "summary.profile_seconds - summary.cache.saved_seconds"


@dataclass(frozen=True)
class Time:
    """Of this run, or of another way to train the same.

    Args:
        name: of the way.
        actual: a sum: of this run what it took, of others what its clocks say that they would have
            taken; None is not known.
        predicted: likewise, what the plan said beforehand. What it says nothing of (loading,
            checkpoints, what came before it) is taken as it was.
    """

    name: str
    actual: str | None
    predicted: str | None

    @property
    def known(self) -> str:
        """How the best of both is known; empty if nothing is."""
        if self.actual is not None:
            return "measured" if self.actual == WHOLE else "estimated"
        return "" if self.predicted is None else "predicted"

    @property
    def best(self) -> str:
        """The sum that is known best."""
        best = self.actual or self.predicted
        assert best is not None
        return best


def amount(files: Mapping[str, Any], places: str) -> float:
    """A number by its place, such as `metrics.0.lr.3`, or a sum of several, `a + b - c`.

    Raises:
        KeyError, IndexError: there is none.
    """
    total, sign = 0.0, 1
    for word in places.split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
        else:
            value: Any = files
            for key in word.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            total += sign * value
    return total


def spent(summary: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a run's time by name, each a sum; together they are the whole."""
    names = {"training": "train", "filling the cache": "materialize", "validation": "validate"}
    names["measuring"] = "profile"
    if not summary["cache"]["enabled"]:
        del names["filling the cache"], names["measuring"]
    parts = {name: f"summary.{key}_seconds" for name, key in names.items()}
    return {**parts, "the rest": " - ".join([WHOLE, *parts.values()])}


def ways(summary: Mapping[str, Any]) -> list[Time]:
    """This run, freezing only, no freezing, and the limit: what is known of their times."""
    actual, predicted = {"this run": WHOLE}, {}
    if summary["cache"]["enabled"] and timed(summary):
        without = "freezing only" if summary["frozen_units"] else "no freezing"
        actual[without] = f"{WHOLE} + {SAVED}"
    if (plan := summary.get("plan")) is not None:
        outside = f"{WHOLE} - summary.plan.actual.seconds"
        predicted["this run"] = f"{outside} + summary.plan.predicted.seconds"
        # The plan of a run that went on is of what was left, and so are its other times.
        if not summary["resumed_at"]:
            outside += " - summary.profile_seconds"
            for name in ("freezing only", "no freezing", "limit"):
                key = name.replace(" ", "_")
                predicted[name] = f"{outside} + summary.plan.predicted.{key}"
            if plan["actual"].get("limit") is not None:
                actual["limit"] = f"{outside} + summary.plan.actual.limit"
    names = ("this run", "freezing only", "no freezing", "limit")
    return [Time(name, actual.get(name), predicted.get(name)) for name in names]


def reached(summary: Mapping[str, Any]) -> float | None:
    """The efficiency of a run by its own clocks; None if it is not known of the whole."""
    plan = summary.get("plan")
    if plan is None or summary["resumed_at"]:
        return None
    found: float | None = plan["actual"].get("efficiency")
    return found


def timed(summary: Mapping[str, Any]) -> bool:
    """Whether the parts of a step are known. On other devices work is not done when it was asked
    for, and waiting would slow it down; older runs do not say."""
    return summary.get("numerics", {}).get("device") in ("cpu", "cuda")
