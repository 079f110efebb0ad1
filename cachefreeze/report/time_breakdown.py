"""The time of a run: what it was spent on, and what it would have been otherwise.

The time of a run is what its user waited: from the command to the end of the last epoch. Starting
Python and drawing the report are not in it, nor is the time between an interruption and `--resume`.

Every time here is a sum of numbers in summary.json and is written as such, so that a page can show
where it comes from: `summary.wall_seconds - summary.fill_seconds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WHOLE = "summary.wall_seconds"
# What the cache saved, less what filling it cost; and the other way round.
SAVED = "summary.cache.seconds_saved - summary.fill_seconds"
COST = "summary.fill_seconds - summary.cache.seconds_saved"
# Ways to train the same, and where the forecast has their times.
_FORECAST = {
    "no freezing": "summary.forecast.without_freezing",
    "freezing only": "summary.forecast.freezing_only",
    "with the cache": "summary.forecast.cached",
    "limit": "summary.forecast.limit",
}


@dataclass(frozen=True)
class Way:
    """One way to train, and its time.

    Args:
        name: "this run", or one of "no freezing", "freezing only", "with the cache" and "limit".
        actual: Sum for the time that it took, or would have taken by this run's own clocks. None if
            it is not known.
        predicted: Sum for the time that the forecast of this run gave it. None if there was none.
    """

    name: str
    actual: str | None
    predicted: str | None

    @property
    def known(self) -> str:
        """How the best known time is known; empty if none is."""
        if self.actual is not None:
            return "measured" if self.actual == WHOLE else "estimated"
        return "" if self.predicted is None else "predicted"

    @property
    def best(self) -> str:
        """Sum for the time that is known best."""
        best = self.actual or self.predicted
        assert best is not None
        return best


def amount(files: Mapping[str, Any], sum_of: str) -> float:
    """Adds up numbers that are named by their places.

    Args:
        files: Contents of a run's files by name, such as "summary".
        sum_of: A place such as `metrics.0.lr.3`, or several: `a + b - c`.

    Raises:
        KeyError, IndexError: There is no such place.
    """
    total, sign = 0.0, 1
    for word in sum_of.split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
        else:
            value: Any = files
            for key in word.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            total += sign * value
    return total


def spent(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns the parts of a run's time by name, each as a sum. Together they are the whole."""
    names = {"training": "train", "filling the cache": "fill", "validation": "validate"}
    names["checkpoints"] = "checkpoint"
    if not summary["cache"]["enabled"]:
        del names["filling the cache"]
    parts = {name: f"summary.{key}_seconds" for name, key in names.items()}
    return {**parts, "the rest": " - ".join([WHOLE, *parts.values()])}


def ways(summary: Mapping[str, Any]) -> list[Way]:
    """Returns this run, then the other ways to train the same."""
    cached, frozen = summary["cache"]["enabled"], summary["frozen_units"] > 0
    own = "no freezing" if not frozen else "with the cache" if cached else "freezing only"
    predicted = _FORECAST if summary.get("forecast") else {}
    actual = {"freezing only": f"{WHOLE} + {SAVED}"} if own == "with the cache" else {}
    others = [Way(name, actual.get(name), predicted.get(name)) for name in _FORECAST if name != own]
    return [Way("this run", WHOLE, predicted.get(own)), *others]


def efficiency(freezing_only: float, cached: float, limit: float) -> float | None:
    """Returns the share of what a cache can save at most; None if that is less than a
    thousandth of the time.

    Args:
        freezing_only: Seconds without a cache.
        cached: Seconds with the cache.
        limit: Seconds if frozen units cost nothing.
    """
    possible = freezing_only - limit
    return (freezing_only - cached) / possible if possible > freezing_only / 1000 else None
