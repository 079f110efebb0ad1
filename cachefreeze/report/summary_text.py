"""Lines of text that a run prints on the terminal."""

import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefreeze.report.time_breakdown import efficiency, saved, spent, ways
from cachefreeze.store.files import human_bytes

_INDENT = " " * 10
# How the lines begin that are wanted even of a quiet run: all of `closing_words` but its hints.
RESULT = ("accuracy", "time", "plan", "cache", "run", "weights", _INDENT)


def opening_words(
    settings: Mapping[str, Any],
    units: Sequence[str],
    parameters: int,
    data_set: str,
    where: str,
    weights: tuple[str, Sequence[str]] | None = None,
    first: int = 0,
) -> list[str]:
    """Returns the lines that a run prints before it begins.

    Args:
        settings: Contents of args.json.
        units: Names of the units, in order.
        parameters: Number of parameters of the network.
        data_set: Description of the data set.
        where: Device and precision, in words.
        weights: Description of the weights that the run starts from, and the names of the
            parameters that are new. None if the network is freshly initialised.
        first: Number of units that are frozen from the start.
    """
    if settings["freeze"]:
        rates = "scaled" if settings["scale_lr"] else "unscaled"
        whom = " for the others" if first else ""
        plan = f"FreezeOut{whom}, {settings['schedule']}, t0 = {settings['t0']:g}, {rates} rates"
    else:
        plan = f"nothing {'else ' if first else ''}freezes, one cosine for all units"
    if first:
        start = f"{first} of {len(units)} units, to {units[first - 1]}"
        plan = f"frozen from the start: {start}; {plan}"
    if settings["cache"]:
        cache = f"activations of frozen units are kept in {settings['cache_dir']}"
        views = settings.get("views")
        if views is not None:
            flips = "each image and its mirror image"
            cache += f", of {flips if views == 'flips' else f'{views} views of each image'}"
    elif settings["augment"]:
        cache = "off: augmented pixels are new in every epoch, so there is nothing to keep"
    else:
        cache = "off: frozen units are computed in every step"
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    return [
        f"network   {settings['network']}: {len(units)} units, {parameters / 1e6:.2f} M parameters",
        *([] if weights is None else [weights_line(*weights)]),
        f"data      {data_set}",
        f"training  {epochs} in batches of {settings['batch_size']} on {where}",
        f"schedule  {plan}",
        f"cache     {cache}",
    ]


def weights_line(words: str, new: Sequence[str]) -> str:
    """Returns a line about the weights that a network starts from."""
    fresh = f"; new for these classes: {', '.join(new)}" if new else ""
    return f"weights   {words}{fresh}"


def forecast_line(forecast: Mapping[str, float]) -> str:
    """Returns a line about the time that a run with the cache will take.

    Args:
        forecast: Seconds of the whole run: without_freezing, freezing_only, cached, limit.
    """
    only, cached, limit = (forecast[name] for name in ("freezing_only", "cached", "limit"))
    share = _efficiency_words(only, cached, limit)
    return (
        f"plan      {duration(cached)} predicted; {duration(only)} with freezing only, "
        f"{duration(forecast['without_freezing'])} without freezing, {duration(limit)} at the limit"
        f"{share and f', {share}'}"
    )


def plan_words(
    names: Sequence[str],
    freeze_steps: Sequence[int],
    total_steps: int,
    steps_per_epoch: int,
    forecast: Mapping[str, float] | None,
    measured_steps: int | None = None,
) -> list[str]:
    """Returns tables of the steps at which units freeze, and of the predicted times.

    Args:
        names: Names of the units, in order.
        freeze_steps: First step at which each unit is frozen; `total_steps` if it never is.
        total_steps: Number of steps of the run.
        steps_per_epoch: Number of steps of an epoch.
        forecast: Seconds of the whole run: without_freezing, freezing_only, cached, limit. If None,
            no times are shown.
        measured_steps: Number of steps that the forecast was made from. If None, it is not shown.
    """
    rows = [["unit", "freezes at step", "epoch", "share of the run"]]
    for name, step in zip(names, freeze_steps, strict=True):
        if step >= total_steps:
            rows.append([name, "trains to the end", "", ""])
        else:
            epoch = f"{step // steps_per_epoch + 1:,}"
            rows.append([name, f"{step:,}", epoch, f"{step / total_steps:.1%}"])
    lines = format_table(rows, right=(1, 2, 3))
    if forecast is None:
        return lines
    only = forecast["freezing_only"]
    rows = [["predicted", "time", "share of freezing only"]]
    for name, seconds in (
        ("no freezing", forecast["without_freezing"]),
        ("freezing only", only),
        ("with the cache", forecast["cached"]),
        ("limit: frozen units cost nothing", forecast["limit"]),
    ):
        rows.append([name, duration(seconds), f"{seconds / only:.1%}"])
    lines += ["", *format_table(rows, right=(1, 2))]
    share = _efficiency_words(only, forecast["cached"], forecast["limit"])
    if share.startswith("efficiency"):
        share += ": the share of the saving at the limit"
    measured = "" if measured_steps is None else f"predicted from {measured_steps} steps"
    return [*lines, "", *filter(None, (share, measured))]


def views_line(rows: int, row_bytes: float, epochs: int, views: int) -> str:
    """Returns a line about the most that the cache can save, and about the space that it takes.

    Args:
        rows: Number of training images.
        row_bytes: Most bytes that a kept row takes.
        epochs: Number of epochs.
        views: Number of views of each image. Each is computed once.
    """
    count = "1 view" if views == 1 else f"{views} views"
    share = max(1 - views / epochs, 0.0)
    return (
        f"of the work frozen from the start, 1 - {views}/{epochs} = {share:.0%} can be left out "
        f"({count} of each image); the kept rows take up to {human_bytes(rows * views * row_bytes)}"
    )


def epoch_line(metrics: Mapping[str, Any], epochs: int, units: Sequence[str]) -> str:
    """Returns a line about an epoch.

    Args:
        metrics: Line of the epoch in metrics.jsonl.
        epochs: Number of epochs of the run.
        units: Names of the units.
    """
    rows = metrics["rows_served"] + metrics["rows_computed"]
    source = f"  {metrics['rows_served'] / rows:.0%} cached" if rows else ""
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {metrics['train_loss']:.4f}  val {metrics['val_accuracy']:7.2%}  "
        f"frozen {metrics['frozen_units']}/{len(units)}  "
        f"{metrics['images_per_second']:7,.0f} img/s{source}"
    )


def fill_line(fill: Mapping[str, Any]) -> str:
    """Returns a line that says that the rows of the data set have been kept.

    Args:
        fill: Step, unit (name of the last frozen one), number of rows, and seconds.
    """
    return (
        f"  step {fill['step']:,}: kept {fill['rows']:,} rows after {fill['unit']} in "
        f"{duration(fill['seconds'])}"
    )


def reduced_line(step: int, count: int) -> str:
    """Returns a line about the gradients that processes exchange from a step on.

    Args:
        step: Number of the step, from 0.
        count: Number of bytes of gradients that each process gives in a step.
    """
    return f"  step {step:,}: {human_bytes(count)} of gradients are reduced in each step"


def closing_words(
    summary: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, python: str, exact: bool
) -> list[str]:
    """Returns the results of a run, where its files are, and commands to type next.

    Args:
        summary: Contents of summary.json.
        settings: Contents of args.json.
        folder: Folder of the run.
        python: Name of the interpreter, as one would type it here.
        exact: Whether the device gives the same weights with and without the cache.
    """
    lines = [
        "",
        f"accuracy  {summary['val_accuracy']:.2%} of the validation images "
        f"(best epoch {summary['best_val_accuracy']:.2%})",
        *_time_words(summary),
        *_cache_words(summary),
        f"run       {folder} (args.json, metrics.jsonl and .csv, summary.json, last.pt, best.pt)",
        f"weights   SHA-256 {summary['weights_sha256'][:16]}...",
    ]
    hints = _hints(summary, settings, python, exact)
    return [*lines, "", "what to type next:", *hints] if hints else lines


def _time_words(summary: Mapping[str, Any]) -> list[str]:
    own, *others = ways(summary)
    parts = [f"{name} {duration(seconds)}" for name, seconds in spent(summary).items()]
    lines = [f"time      {duration(own.seconds)}: {', '.join(parts)}"]
    if others:
        beside = (f"{way.name} {duration(way.seconds)} ({way.known})" for way in others)
        lines.append(f"{_INDENT}{', '.join(beside)}")
    if own.predicted is not None:
        lines.append(
            f"plan      {duration(own.predicted)} predicted, {duration(own.seconds)} taken "
            f"({own.seconds / own.predicted - 1:+.0%})"
        )
    return lines


def _cache_words(summary: Mapping[str, Any]) -> list[str]:
    """Returns lines about the time that the cache saved, and about the rows in it."""
    cache, seconds = summary["cache"], saved(summary)
    if not (cache["enabled"] and summary["frozen_units"]):
        return []
    total = cache["rows_served"] + cache["rows_computed"]
    if not cache["rows_served"]:
        why = (
            "the warnings above say why"
            if cache["messages"]
            else "too few steps were left when units froze; use more --epochs or a smaller --t0"
        )
        lines = [f"cache     no row came from it: {why}"]
    else:
        time = duration(abs(seconds))
        verdict = f"saved {time}" if seconds >= 0 else f"cost {time} more than it saved"
        lines = [
            f"cache     {verdict} (estimated), filling included; "
            f"{cache['rows_served']:,} of {total:,} rows that passed frozen units came from it"
        ]
    if cache["rows_kept"]:
        rows, size = f"{cache['rows_kept']:,} rows in", human_bytes(cache["bytes"])
        folder = cache["directory"]
        kept = f"{rows} memory, {size}" if folder is None else f"{rows} {folder}, {size} in memory"
        again = ": an image has a row for each unit after which it was kept"
        several = len({fill["unit"] for fill in cache["fills"]}) > 1
        lines.append(f"{_INDENT}{kept}{again if several else ''}")
    return lines


def _hints(
    summary: Mapping[str, Any], settings: Mapping[str, Any], python: str, exact: bool
) -> list[str]:
    """Returns commands to type next, each with a line about its result."""
    hints, cache = [], summary["cache"]
    processes = summary.get("processes", [1])  # on which the weights depend
    program = python if processes == [1] else f"torchrun --nproc-per-node {processes[0]}"
    train = f"{program} -m cachefreeze.train"
    if cache["rows_served"]:
        alike = exact and len(processes) == 1
        same = "the same weights" if alike else "nearly the same weights"
        slower = ", in more time" if saved(summary) > 0 else ""
        hints = [
            f"  {train} {shlex.join([*settings['command'], '--no-cache'])}",
            f"      {same}{slower}",
        ]
    if cache["rows_kept"] and cache["directory"] is not None:
        hints += [
            f"  {python} scripts/cache_stats.py {shlex.quote(cache['directory'])}",
            "      what is in the cache",
        ]
    if settings["dataset"] == "digits":
        hints += [f"  {train} --dataset cifar10", "      the paper's setting (wants a GPU)"]
    return hints


def _efficiency_words(freezing_only: float, cached: float, limit: float) -> str:
    """Returns the share of the best saving that is reached, or the seconds lost, in words."""
    if cached > freezing_only:
        return f"the cache costs {duration(cached - freezing_only)} more than it saves"
    share = efficiency(freezing_only, cached, limit)
    return "" if share is None else f"efficiency {share:.2f}"


def format_table(
    rows: Sequence[Sequence[str]], *, right: Container[int] = (), divider: str = "  "
) -> list[str]:
    """Returns the lines of a table, with columns as wide as their widest cell.

    Args:
        rows: Cells of every row. The first row is the header.
        right: Numbers of the columns that are aligned to the right.
        divider: Text between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        divider.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown.

    Args:
        rows: Cells of every row. The first row is the header.
    """
    widths = ["-" * max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"| {line} |" for line in format_table([rows[0], widths, *rows[1:]], divider=" | ")]


def duration(seconds: float) -> str:
    """Returns a time in its largest two units: `48.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
