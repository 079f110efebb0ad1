"""report.html: a run as a page in one file, made of what is in its folder. Needs matplotlib."""

import json
import shlex
from html import escape
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes, write_atomically
from cachefreeze.report import figures
from cachefreeze.report.markup import (
    code,
    document,
    figure,
    folded,
    left_out,
    linked,
    table,
    terms,
    tiles,
)
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import duration, opening_words
from cachefreeze.report.time_breakdown import Way, saved, spent, ways

REPORT = "report.html"
# The first use of each in the page leads here.
WORDS = {
    "unit": "the smallest part of a network that freezes: its first layers, a block, the "
    "classifier",
    "measured": "the time of a whole run that was made",
    "estimated": "this run's time, and what the cache saved by its own clocks less what filling it "
    "took",
    "predicted": "what the first steps of this run let expect of the whole",
    "freezing only": "the same with FreezeOut and without a cache: frozen units run in every step",
    "no freezing": "the same with all units trained to the end, without a cache",
    "with the cache": "the same with FreezeOut and with a cache",
    "limit": "the same with frozen units that cost nothing: what no cache can beat",
    "row": "what frozen units make of one image",
}


def write_report(folder: Path, measured: dict[str, Path] | None = None) -> Path:
    """Makes a run's folder into a page, and returns the path of the page.

    Args:
        folder: Folder of a run that has ended.
        measured: Folders of the same run by "freezing only" and "no freezing", as far as they were
            made. In the place of others stands what is estimated or predicted.

    Raises:
        UserError: There is no such run, its files are damaged, another run differs in more than
            cache and freezing, or the page cannot be written.
    """
    run = RunResults.load(folder)
    others = {name: RunResults.load(path) for name, path in (measured or {}).items()}
    for name, other in others.items():
        _refuse_another(run, name, other)
    path = folder / REPORT
    try:
        write_atomically(path, report(run, others))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room for it") from error
    return path


def _refuse_another(run: RunResults, name: str, other: RunResults) -> None:
    """Raises UserError if the other run is not what its name says."""
    same = ("network", "dataset", "epochs", "batch_size", "precision", "weights", "freeze_first")
    for setting in same:
        if run.args.get(setting) != other.args.get(setting):
            raise UserError(
                f"{other.folder} was run with {setting} {other.args.get(setting)}, and "
                f"{run.folder} with {run.args.get(setting)}: their times cannot be compared"
            )
    if other.args["freeze"] != (name == "freezing only") or other.args["cache"]:
        options = "--no-cache" if name == "freezing only" else "--no-freeze --no-cache"
        raise UserError(f"{other.folder} is no run with {name}: that is one with {options}")


def report(run: RunResults, measured: dict[str, RunResults]) -> bytes:
    """Returns the page, as bytes of UTF-8.

    Args:
        run: Results of the run.
        measured: Results of the same run by name of the way; see `write_report`.
    """
    title = f"{run.args['network']} on {run.args['dataset']}"
    pictures = [draw(run) for draw in (_rates, _seconds, _frontier, _learning, _kept)]
    found = ways(run.summary, {k: other.summary["wall_seconds"] for k, other in measured.items()})
    pictures.append(_predicted(found))
    command = shlex.join(["python", "-m", "cachefreeze.train", *run.args["command"]])
    tables = {"every epoch": _epochs(run), "every unit": _units(run)}
    if run.summary["cache"]["fills"]:
        tables["every filling of the cache"] = _fills(run)
    tables["all settings"] = _settings(run)
    newline = "\n"
    body = f"""<header><h1>{escape(title)}</h1>
<p>A training run of cachefreeze: {linked("unit", "units")} of the network freeze one after another,
and what the frozen ones compute is kept instead of computed again.</p></header>
<main>
{tiles(_result(run, found))}
<h2>What was run</h2>
<pre>{code(command)}</pre>
{terms(_what_was_run(run))}
<h2>What took how long</h2>
{_times(run)}
{_beside(found)}
{_saving(run)}
<h2>How it went</h2>
<div class="figures">
{newline.join(pictures)}
</div>
<h2>All numbers</h2>
{newline.join(folded(name, content) for name, content in tables.items())}
<h2>Words</h2>
{terms([(word, escape(meaning)) for word, meaning in WORDS.items()], linkable=True)}
</main>"""
    return document(title, body, figures.COLOURS)


def _result(run: RunResults, found: list[Way]) -> list[tuple[str, str]]:
    summary, (own, *others) = run.summary, found
    shown = [
        (f"{summary['val_accuracy']:.2%}", "of the validation images are right"),
        (f"{summary['best_val_accuracy']:.2%}", "in the best epoch"),
        (duration(own.seconds), "is the time of the run"),
    ]
    shown += [
        (f"{way.by(own):.2f}x", f"as fast as {linked(way.name)} ({linked(way.known)})")
        for way in others
        if way.name in ("freezing only", "no freezing")
    ]
    frozen = f"{summary['frozen_units']}/{len(summary['units'])}"
    return [*shown, (frozen, "units are frozen in the end")]


def _what_was_run(run: RunResults) -> list[tuple[str, str]]:
    summary = run.summary
    first = summary["freeze_steps"].count(0)
    lines = opening_words(run.args, summary["units"], **summary["about"], first=first)
    # A word, and from the tenth column on what there is to say.
    pairs = [(line[:10].strip(), code(line[10:])) for line in lines]
    machine = ", ".join(f"{name} {value}" for name, value in summary["numerics"].items())
    pairs.append(("machine", code(machine)))
    if summary["resumed_at"]:
        steps = ", ".join(f"{step:,}" for step in summary["resumed_at"])
        pairs.append(("resumed", f"after step {steps}"))
    pairs += [("the cache said", code(message)) for message in summary["cache"]["messages"]]
    return [*pairs, ("weights", code(f"SHA-256 {summary['weights_sha256']}"))]


def _times(run: RunResults) -> str:
    rows = [[name, duration(seconds)] for name, seconds in spent(run.summary).items()]
    rows.append(["<b>the time of the run</b>", f"<b>{duration(run.summary['wall_seconds'])}</b>"])
    cut_off = ", nor is the time until it went on after it was cut off"
    return (
        "<p>The time of the run is what its user waited: from the command to the end of the last "
        "epoch, everything included. Starting Python and drawing this page are not in it"
        f"{cut_off if run.summary['resumed_at'] else ''}. The rest is loading and the like.</p>"
        f"{table(('', 'time'), rows, right=[1])}"
    )


def _beside(found: list[Way]) -> str:
    """Returns what the run took, and beside it what it would have taken otherwise."""
    if len(found) == 1:
        return (
            "<p>Nothing is known to set beside it: "
            f"{code('scripts/write_report.py')} shows other runs, with "
            f"{code('--freezing-only RUN')} and {code('--no-freezing RUN')}.</p>"
        )
    rows = [
        [
            linked(way.name) if way.name in WORDS else way.name,
            duration(way.seconds),
            linked(way.known),
            f"{way.by(found[0]):.2f}x",
            "" if way.predicted is None else duration(way.predicted),
        ]
        for way in found
    ]
    return (
        "<p>Beside it stands what it would have taken otherwise. Speed-up is that time by this "
        f"run's; where it is only {linked('predicted')}, by what was predicted of this run.</p>"
        f"{table(('', 'time', 'known', 'speed-up over it', 'predicted'), rows, right=(1, 3, 4))}"
    )


def _saving(run: RunResults) -> str:
    """Returns what the cache brought or cost, by this run's own clocks."""
    cache, seconds = run.summary["cache"], saved(run.summary)
    if not cache["enabled"]:
        return ""
    if not cache["rows_served"]:
        return f"<p>No {linked('row')} came from the cache.</p>"
    said = f"The cache saved {duration(seconds)} (estimated), filling included"
    if seconds < 0:
        said = f"The cache cost {duration(-seconds)} more than it saved (estimated)"
    total = f"{cache['rows_served'] + cache['rows_computed']:,} {linked('row', 'rows')}"
    return f"<p>{said}; {cache['rows_served']:,} of {total} came from it.</p>"


def _rates(run: RunResults) -> str:
    summary = run.summary
    names = summary["units"]
    freezes = [
        None if step >= summary["steps"] else _epochs_at(run, step)
        for step in summary["freeze_steps"]
    ]
    frozen = [
        f"{name} at {time:.4g}"
        for name, time in zip(names, freezes, strict=True)
        if time is not None
    ]
    how = f"these freeze, in epochs: {', '.join(frozen)}" if frozen else "none freezes"
    return figure(
        "Rate of every unit",
        figures.rates(_curves(run), names, freezes, len(run.metrics)),
        f"Learning rates of {len(names)} units over {_count(len(run.metrics), 'epoch')}; {how}.",
        "A row a unit, the first of the network on top, each as high as its highest rate (on the "
        "right), by what the run noted at the end of every epoch. Where a rate comes to nothing, "
        "the unit is frozen for good.",
    )


def _curves(run: RunResults) -> list[list[tuple[float, float]]]:
    """Returns epochs and rates of every unit: at the start, after every epoch, at its freeze."""
    summary = run.summary
    curves = []
    for unit, (rate, freeze) in enumerate(
        zip(summary["initial_rates"], summary["freeze_steps"], strict=True)
    ):
        noted = [(0, rate), *((line["step"], line["lr"][unit]) for line in run.metrics)]
        before = [(step, rate) for step, rate in noted if step < freeze]
        curves.append([(_epochs_at(run, step), rate) for step, rate in [*before, (freeze, 0.0)]])
    return curves


def _seconds(run: RunResults) -> str:
    lines = run.metrics
    keys = ("train_seconds", "fill_seconds", "validate_seconds")
    parts = {
        part: [line[key] for line in lines] for part, key in zip(figures.PARTS, keys, strict=True)
    }
    first, last = (duration(lines[which]["seconds"]) for which in (0, -1))
    took = f"The first epoch took {first}, the last" if len(lines) > 1 else "The epoch took"
    return figure(
        "Seconds of every epoch",
        figures.seconds(parts),
        f"Seconds of {_count(len(lines), 'epoch')}, stacked by what they were spent on: "
        f"{', '.join(name for name in parts if any(parts[name]))}.",
        f"Filling runs every image through newly frozen units once. {took} {last}.",
    )


def _frontier(run: RunResults) -> str:
    title, summary = "Frozen units, and where rows come from", run.summary
    if not summary["frozen_units"]:
        return left_out(title, "no unit was frozen in this run")
    frozen = sorted(step for step in summary["freeze_steps"] if step < summary["steps"])
    served = [
        line["rows_served"] / max(line["rows_served"] + line["rows_computed"], 1)
        for line in run.metrics
    ]
    units = len(summary["units"])
    return figure(
        title,
        figures.frontier([_epochs_at(run, step) for step in frozen], units, served),
        f"Of {units} units, {summary['frozen_units']} are frozen in the end. Up to "
        f"{max(served):.0%} of an epoch's rows come from the cache.",
        "Above, the units, the first of the network at the bottom. Below, the share of an epoch's "
        f"{linked('row', 'rows')}, in training and validation, that came from the cache.",
    )


def _learning(run: RunResults) -> str:
    lines = run.metrics
    train, val, accuracy = (
        [line[name] for line in lines] for name in ("train_loss", "val_loss", "val_accuracy")
    )
    return figure(
        "Accuracy and loss",
        figures.learning(train, val, accuracy),
        f"Validation accuracy over {_count(len(lines), 'epoch')}, from {accuracy[0]:.2%} to "
        f"{accuracy[-1]:.2%}; below, the training and validation loss.",
        f"At the end of every epoch. The last training loss is {train[-1]:.4f}.",
    )


def _kept(run: RunResults) -> str:
    title, sizes = "What the cache keeps", [line["cache_bytes"] for line in run.metrics]
    if not any(sizes):
        enabled = run.summary["cache"]["enabled"]
        return left_out(title, "no row was kept" if enabled else "there was no cache")
    rows, size = run.summary["cache"]["rows_kept"], human_bytes(run.summary["cache"]["bytes"])
    return figure(
        title,
        figures.kept(sizes),
        f"Bytes that are kept at the end of every epoch, {max(sizes):,} at most.",
        f"At the end of every epoch. In the end: {rows:,} {linked('row', 'rows')}, {size}.",
    )


def _predicted(found: list[Way]) -> str:
    title, own = "Predicted beside measured", found[0]
    if own.predicted is None:
        return left_out(title, "nothing was predicted in this run")
    return figure(
        title,
        figures.predicted(found),
        f"Bars of predicted and measured seconds: {', '.join(way.name for way in found)}.",
        f"{duration(own.predicted)} predicted from the first steps, {duration(own.seconds)} taken. "
        "What was only predicted has one bar.",
    )


def _epochs_at(run: RunResults, step: float) -> float:
    return step * len(run.metrics) / run.summary["steps"]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _epochs(run: RunResults) -> str:
    columns = {
        "epoch": ("epoch", "{:,}"),
        "step": ("step", "{:,}"),
        "training loss": ("train_loss", "{:.4f}"),
        "validation loss": ("val_loss", "{:.4f}"),
        "accuracy": ("val_accuracy", "{:.2%}"),
        "frozen": ("frozen_units", f"{{}}/{len(run.summary['units'])}"),
        "rows served": ("rows_served", "{:,}"),
        "rows computed": ("rows_computed", "{:,}"),
        "seconds": ("seconds", "{:.1f}"),
        "images/s": ("images_per_second", "{:,.0f}"),
    }
    rows = [[how.format(line[key]) for key, how in columns.values()] for line in run.metrics]
    return table(list(columns), rows, right=range(len(columns)))


def _units(run: RunResults) -> str:
    summary = run.summary
    names, rates, steps = summary["units"], summary["initial_rates"], summary["freeze_steps"]
    rows = [
        [code(name), f"{rate:.3g}", f"{step:,}" if step < summary["steps"] else "never"]
        for name, rate, step in zip(names, rates, steps, strict=True)
    ]
    return table(("unit", "initial rate", "frozen from step"), rows, right=[1, 2])


def _fills(run: RunResults) -> str:
    rows = [
        [f"{each['step']:,}", code(each["unit"]), f"{each['rows']:,}", duration(each["seconds"])]
        for each in run.summary["cache"]["fills"]
    ]
    return table(("at step", "rows after", "rows", "time"), rows, right=[0, 2, 3])


def _settings(run: RunResults) -> str:
    rows = [
        [code(name), code(json.dumps(value))]
        for name, value in run.args.items()
        if name != "command"  # which stands above
    ]
    return table(("setting", "value"), rows)
