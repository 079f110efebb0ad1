"""Several runs beside each other: as lines for a terminal, and as a page in one file."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.report.markup import code, document, figure, frozen_units, number, table
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import duration, format_table

# Settings that say where a run lies, and not what it does.
PLACES = ("output_dir", "command", "report")
HEADER = ("run", "accuracy", "best", "time", "speed-up", "frozen", "weights")


def load_runs(folders: Sequence[Path]) -> list[RunResults]:
    """
    Raises:
        UserError: one holds no run that has come to its end, or is named twice.
    """
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is named twice: name each run once")
        seen.add(folder.resolve())
    return [RunResults.load(folder) for folder in folders]


def comparison_lines(runs: Sequence[RunResults]) -> list[str]:
    """A table of results, and one of the settings that are not the same in all runs.

    Speed-up is the time of the first run by that of another.
    """
    first = runs[0].summary["wall_seconds"]
    rows = [list(HEADER)]
    for run, name, weights in zip(runs, names_of(runs), weights_of(runs), strict=True):
        summary = run.summary
        rows.append(
            [
                name,
                f"{summary['val_accuracy']:.2%}",
                f"{summary['best_val_accuracy']:.2%}",
                duration(summary["wall_seconds"]),
                f"{first / summary['wall_seconds']:.2f}x",
                f"{summary['frozen_units']}/{len(summary['units'])}",
                weights,
            ]
        )
    lines = format_table(rows, right=range(1, 6))
    settings = differing_settings(runs)
    if not settings:
        return [*lines, "", "all settings are the same"]
    header = ["setting", *names_of(runs)]
    return [*lines, "", *format_table([header, *([name, *each] for name, each in settings)])]


def comparison_page(runs: Sequence[RunResults]) -> bytes:
    """The same as a page of UTF-8, with accuracy against time.

    Raises:
        UserError: matplotlib is not installed.
    """
    from cachefreeze.report import figures  # an extra, which the lines above do without

    names, wall = names_of(runs), "summary.wall_seconds"
    rows = [
        [
            code(name),
            number(run, "summary.val_accuracy", "percent"),
            number(run, "summary.best_val_accuracy", "percent"),
            number(run, wall, "seconds"),
            number(runs[0], wall, "times", by=(run, wall)),
            frozen_units(run, "summary.frozen_units"),
            code(weights),
        ]
        for run, name, weights in zip(runs, names, weights_of(runs), strict=True)
    ]
    lines = [
        (
            name,
            list(accumulate(line["seconds"] for line in run.metrics)),
            [line["val_accuracy"] for line in run.metrics],
        )
        for run, name in zip(runs, names, strict=True)
    ]
    last = ", ".join(
        f"{name} ends at {accuracy[-1]:.2%} after {duration(seconds[-1])}"
        for name, seconds, accuracy in lines
    )
    picture = figure(
        "Accuracy against time",
        figures.accuracy_against_time(lines),
        f"Validation accuracy over seconds, a line a run: {last}.",
        "At the end of every epoch; loading and saving are not counted.",
    )
    settings = [
        [code(setting), *(code(value) for value in values)]
        for setting, values in differing_settings(runs)
    ]
    differ = (
        table(("setting", *names), settings, wide="stack")
        if settings
        else "<p>All are the same.</p>"
    )
    body = f"""<h1>Runs beside each other</h1>
<p>Speed-up is the time of the first run by that of another, everything included. Weights with the
same letter are the same to the last bit.</p>
{table(HEADER, rows, right=range(1, 6), wide="stack")}
<div class="figures">{picture}</div>
<h2>Settings that differ</h2>
{differ}"""
    return document("Runs beside each other", body, figures.COLOURS)


def names_of(runs: Sequence[RunResults]) -> list[str]:
    """The runs' folders, by as many of their last parts as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    deepest = max(len(path) for path in paths)
    for count in range(1, deepest + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def weights_of(runs: Sequence[RunResults]) -> list[str]:
    """A letter and a hash for each run's weights: equal ones have the same letter."""
    hashes = [run.summary["weights_sha256"] for run in runs]
    order = list(dict.fromkeys(hashes))
    return [f"{_letters(order.index(each))} {each[:12]}" for each in hashes]


def _letters(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    before = _letters(number // 26 - 1) if number >= 26 else ""
    return before + chr(ord("A") + number % 26)


def differing_settings(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with each run's value as JSON has it; `-` where
    a run of another version has none."""
    settings = dict.fromkeys(name for run in runs for name in run.args if name not in PLACES)
    values = {
        name: [json.dumps(run.args[name]) if name in run.args else "-" for run in runs]
        for name in settings
    }
    return [(name, each) for name, each in values.items() if len(set(each)) > 1]
