"""Comparisons of runs, as lines for a terminal and as a page in one file."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import duration, format_table

# Settings that say where a run lies, and not what it does.
PLACES = ("output_dir", "command", "report")
HEADER = ("run", "accuracy", "best", "time", "speed-up", "frozen", "weights")


def load_runs(folders: Sequence[Path]) -> list[RunResults]:
    """Reads several runs.

    Args:
        folders: Folders of the runs.

    Raises:
        UserError: A folder holds no finished run, or is named twice.
    """
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is named twice: name each run once")
        seen.add(folder.resolve())
    return [RunResults.load(folder) for folder in folders]


def comparison_lines(runs: Sequence[RunResults]) -> list[str]:
    """Returns a table of results, and one of the settings that are not the same in all runs.

    Speed-up is the time of the first run divided by the time of each run.
    """
    lines = format_table([HEADER, *_rows(runs)], right=range(1, 6))
    settings = differing_settings(runs)
    if not settings:
        return [*lines, "", "all settings are the same"]
    return [*lines, "", *format_table([("setting", *names_of(runs)), *settings])]


def comparison_page(runs: Sequence[RunResults]) -> bytes:
    """Returns the same tables as a page, with a picture of accuracy against time.

    Raises:
        UserError: The package matplotlib is not installed.
    """
    # matplotlib is an extra, which the lines above do without.
    from cachefreeze.report import figures
    from cachefreeze.report.page import Picture, render

    names = names_of(runs)
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
    return render(
        "comparison.html",
        title="Runs beside each other",
        header=HEADER,
        results=_rows(runs),
        names=names,
        settings=differing_settings(runs),
        picture=Picture(
            "Accuracy against time",
            figures.accuracy_against_time(lines),
            f"Validation accuracy over seconds, a line a run: {last}.",
        ),
    )


def _rows(runs: Sequence[RunResults]) -> list[list[str]]:
    """Returns a row for each run, with the columns of `HEADER`."""
    first = runs[0].summary["wall_seconds"]
    return [
        [
            name,
            f"{run.summary['val_accuracy']:.2%}",
            f"{run.summary['best_val_accuracy']:.2%}",
            duration(run.summary["wall_seconds"]),
            f"{first / run.summary['wall_seconds']:.2f}x",
            f"{run.summary['frozen_units']}/{len(run.summary['units'])}",
            weights,
        ]
        for run, name, weights in zip(runs, names_of(runs), _weights_of(runs), strict=True)
    ]


def names_of(runs: Sequence[RunResults]) -> list[str]:
    """Returns a name for each run: the last parts of its folder's path, as many as are needed."""
    paths = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def differing_settings(runs: Sequence[RunResults]) -> list[list[str]]:
    """Returns a row for every setting that is not the same in all runs.

    It holds the name of the setting, and its value in each run as JSON. `-` stands for no value.
    """
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.args if name not in PLACES):
        values = [json.dumps(run.args[name]) if name in run.args else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return rows


def _weights_of(runs: Sequence[RunResults]) -> list[str]:
    """Returns a letter and a hash for the weights of each run. Equal weights share a letter."""
    hashes = [run.summary["weights_sha256"] for run in runs]
    order = list(dict.fromkeys(hashes))
    return [f"{_letters(order.index(each))} {each[:12]}" for each in hashes]


def _letters(number: int) -> str:
    """Returns A to Z, then AA, AB and so on."""
    before = _letters(number // 26 - 1) if number >= 26 else ""
    return before + chr(ord("A") + number % 26)
