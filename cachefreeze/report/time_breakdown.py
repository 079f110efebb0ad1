"""The time of a run by its parts, and the times of other ways to train the same.

The time of a run goes from the command to the end of the last epoch. Starting Python and drawing
the report are not in it, nor is the time between an interruption and `--resume`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Ways to train the same, and what the forecast calls them.
_FORECAST = {
    "freezing only": "freezing_only",
    "no freezing": "without_freezing",
    "with the cache": "cached",
    "limit": "limit",
}


@dataclass(frozen=True)
class Way:
    """One way to train, and its time.

    Args:
        name: Name of the way: "this run", "freezing only", "no freezing", "with the cache", or
            "limit".
        seconds: Best known time of the whole run.
        known: Source of that time: "measured", "estimated", or "predicted".
        predicted: Seconds that were predicted from the first steps of this run. None if there was
            no forecast.
    """

    name: str
    seconds: float
    known: str
    predicted: float | None

    def by(self, run: "Way") -> float:
        """Returns this time divided by that of a run."""
        return self.seconds / run.seconds


def saved(summary: Mapping[str, Any]) -> float:
    """Returns the estimated seconds that the cache saved, less those that filling it took."""
    return float(summary["cache"]["seconds_saved"] - summary["fill_seconds"])


def spent(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the parts of a run's time by name, in seconds. Together they are the whole."""
    names = {"training": "train", "filling the cache": "fill", "validation": "validate"}
    names["checkpoints"] = "checkpoint"
    if not summary["cache"]["enabled"]:
        del names["filling the cache"]
    parts = {name: summary[f"{key}_seconds"] for name, key in names.items()}
    return {**parts, "the rest": summary["wall_seconds"] - sum(parts.values())}


def ways(summary: Mapping[str, Any], measured: Mapping[str, float] | None = None) -> list[Way]:
    """Returns this run, then the other ways to train the same whose times are known.

    Args:
        summary: Contents of summary.json.
        measured: Measured seconds of whole runs, by name of the way.
    """
    cached, frozen = summary["cache"]["enabled"], summary["frozen_units"] > 0
    own = "no freezing" if not frozen else "with the cache" if cached else "freezing only"
    forecast = summary.get("forecast") or {}
    found = [Way("this run", summary["wall_seconds"], "measured", forecast.get(_FORECAST[own]))]
    for name, key in _FORECAST.items():
        predicted = forecast.get(key)
        if measured and name in measured:
            found.append(Way(name, measured[name], "measured", predicted))
        elif name == own:
            continue
        elif name == "freezing only" and own == "with the cache":
            seconds = summary["wall_seconds"] + saved(summary)
            found.append(Way(name, seconds, "estimated", predicted))
        elif predicted is not None:
            found.append(Way(name, predicted, "predicted", predicted))
    return found


def efficiency(freezing_only: float, cached: float, limit: float) -> float | None:
    """Returns the saving of a cache as a share of the most that any cache can save.

    None is returned if the most is less than a thousandth of the time.

    Args:
        freezing_only: Seconds without a cache.
        cached: Seconds with the cache.
        limit: Seconds if frozen units cost nothing.
    """
    possible = freezing_only - limit
    return (freezing_only - cached) / possible if possible > freezing_only / 1000 else None
