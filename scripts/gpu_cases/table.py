"""One table of everything that was measured."""

import statistics
from typing import Any

# Largest share of a step that keys and look-up may take.
KEYS_SHARE = 0.01
HEAD = (
    "case", "steps", "plain ms", "first", "later", "limit", "asked", "keys %", "memory", "waits",
    "gather", "weights",
)  # fmt: skip
LEGEND = """\
steps: in an epoch (FreezeOut: in a run) x repeats. plain ms: a step without the cache.
first, later, limit: how many times faster an epoch is that fills the cache; one that is served; and
the trained part alone, on values that lie on the device. FreezeOut: first is freezing alone beside
plain; later and limit are beside freezing alone. keys %: making keys and finding rows, of a plain
step. memory: largest memory of the GPU beside that of plain. waits: in a step, plain / cached.
gather: rate of gathering rows beside index_select. weights: equal to the bit, or the largest
difference.
"""


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def memory_ratio(case: dict[str, Any]) -> float | None:
    """Returns the largest memory with the cache beside that without it."""
    peaks = case.get("peak_bytes", {})
    plain = peaks.get("freeze_only", peaks.get("plain"))
    most = [peaks[way] for way in ("first", "later", "last", "cached") if peaks.get(way)]
    return max(most) / plain if plain and most else None


def keys_share(case: dict[str, Any]) -> float | None:
    """Returns the share of a plain step that making keys and finding rows takes."""
    counted = case.get("counted", {})
    if "keys_seconds" not in counted:
        return None
    seconds: float = counted["keys_seconds"] + counted["look_up_seconds"]
    return seconds / statistics.median(case["seconds_of_a_step"]["plain"])


def _waits(case: dict[str, Any]) -> str:
    found = [case.get(name, {}).get("waits") for name in ("plain_waits", "counted")]
    return " / ".join(_number(one and one["per_step"], "{:.1f}") for one in found)


def _weights(case: dict[str, Any]) -> str:
    weights = case.get("weights", {"failed": "was not compared"})
    if "failed" in weights:
        return "-"
    if not weights["rows_served"]:
        return "nothing served"
    return "equal" if weights["equal"] else f"{weights['largest_difference']:.1e}"


def _cells(name: str, case: dict[str, Any]) -> list[str]:
    plain = case["seconds_of_a_step"]["plain"]
    gather = case.get("counted", {}).get("gather")
    share, keys = None, keys_share(case)
    if gather:
        share = gather["rows_per_second"] / gather["index_select_rows_per_second"]
    return [
        name, f"{case['steps']} x {case['repeats']}", _number(1e3 * statistics.median(plain)),
        _number(case.get("ratio_first", case.get("ratio_freeze_only"))),
        _number(case["ratio_later"]), _number(case["ratio_limit"]),
        _number(case.get("asked"), "{:g}"), _number(None if keys is None else 100 * keys),
        _number(memory_ratio(case)), _waits(case), _number(share), _weights(case),
    ]  # fmt: skip


def _status(case: dict[str, Any]) -> str:
    why = f": {case['why']}" if "why" in case else ""
    return f"{case['status']}{why}"


def line_of(name: str, case: dict[str, Any]) -> str:
    """Returns one line about a case, as soon as it has ended."""
    if "ratio_later" not in case:
        return f"{name}: {_status(case)}"
    return (
        f"{name}: {case['ratio_later']:.2f} times faster, weights {_weights(case)}, {_status(case)}"
    )


def faults(name: str, case: dict[str, Any], tiny: bool) -> list[str]:
    """Returns what was asked and is not so, in sentences. Of tiny networks, weights alone count."""
    parts = ("weights", "counted", "plain_waits", "beside")
    found = [
        f"{one} failed: {case[one]['failed']}" for one in parts if "failed" in case.get(one, {})
    ]
    weights, counted = case.get("weights", {}), case.get("counted", {})
    if weights.get("equal") is False:
        other = "; ".join(weights["not_deterministic"])
        found.append(f"weights differ{f' ({other})' if other else ''}")
    if weights.get("rows_served") == 0:
        found.append(" ".join(["the cache served nothing:", *weights["messages"]]))
    if counted.get("served_of_an_epoch", case.get("rows")) != case.get("rows"):
        found.append(
            f"{counted['served_of_an_epoch']} of {case['rows']} rows of an epoch are served"
        )
    if tiny:
        case = {}
    if case.get("asked") and case.get("ratio_later", case["asked"]) < case["asked"]:
        found.append(f"{case['ratio_later']:.2f} times faster, asked {case['asked']:g}")
    if (keys := keys_share(case)) is not None and keys > KEYS_SHARE:
        found.append(f"keys and look-up take {keys:.1%} of a step, asked at most {KEYS_SHARE:.0%}")
    if (memory := memory_ratio(case)) is not None and memory > 1:
        found.append(f"memory is {memory:.2f} times that of plain, asked at most 1")
    return [f"- {name}: {sentence}" for sentence in found]


def table_of(found: dict[str, Any]) -> str:
    """Returns a table of all cases, with what it means and what is not as asked.

    Args:
        found: Results, as in results.json.
    """
    cases = found["cases"]
    rows = [HEAD, *(_cells(name, one) for name, one in cases.items() if "ratio_later" in one)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEAD))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    tests = found["tests"]
    said = [machine, *([f"tests: {tests['status']}, {tests.get('summary', tests.get('why', ''))}"]
                       if tests else [])]  # fmt: skip
    tiny = found["arguments"].get("tiny") == "True"
    if tiny:
        said.append(
            "tiny networks on a CPU: these numbers say nothing about a GPU or a real network"
        )
    rest = [
        f"- {name}: {_status(one)}" for name, one in cases.items() if one["status"] != "measured"
    ]
    more = [sentence for name, one in cases.items() for sentence in faults(name, one, tiny)]
    for name, one in cases.items():
        if (beside := one.get("beside", {})).get("probe_later", 0) > 0:
            plain = statistics.median(one["seconds_of_a_step"]["plain"])
            ratio = plain / beside["probe_later"]
            more.append(f"- {name}: cachefreeze.probe is {ratio:.1f} times faster in later epochs")
    if "stopped" in found:
        rest.append(f"- ended by {found['stopped']}")
    return "\n".join(["", *said, "", *lines, "", LEGEND, *rest, *more]) + "\n"
