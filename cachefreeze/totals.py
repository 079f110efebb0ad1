"""Sums over the processes of a run that was cut off and went on."""

from collections.abc import Mapping
from typing import Any


def totals_of(found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says has come together so far, in the form of `own`."""
    return {
        "seconds": numbers_of(found["seconds"], own["seconds"]),
        "cache": numbers_of(found["cache"], own["cache"]),
        "events": [dict(event) for event in found["events"]],
        "resumed": [int(step) for step in found["resumed"]],
    }


def numbers_of(found: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, float]:
    """The same numbers by name."""
    return {name: type(value)(found[name]) for name, value in own.items()}


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    return {name: value + other.get(name, 0) for name, value in one.items()}
