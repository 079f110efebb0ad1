"""The page report.html of a run, made of the files in the run's folder. It needs matplotlib."""

import json
import shlex
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.report import figures
from cachefreeze.report.page import Picture, render
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import duration, opening_words
from cachefreeze.report.time_breakdown import Way, saved, spent, ways
from cachefreeze.store.files import write_atomically

REPORT = "report.html"
# The first use of each in the page leads here.
WORDS = {
    "unit": "the smallest part of a network that freezes: its first layers, a block, the "
    "classifier",
    "measured": "the time of a whole run, by the clock",
    "estimated": "the time of this run, plus the seconds that the cache saved, less the seconds "
    "that filling the cache took",
    "predicted": "the time of a whole run, computed from the first steps of this run",
    "freezing only": "the same training with FreezeOut and without a cache: frozen units run in "
    "every step",
    "no freezing": "the same training with all units trained to the end, without a cache",
    "with the cache": "the same training with FreezeOut and with a cache",
    "limit": "the same training if frozen units cost nothing: no cache can be faster",
    "row": "the output of the frozen units for one image",
}


def write_report(folder: Path, measured: dict[str, Path] | None = None) -> Path:
    """Makes the page of a run, and returns its path.

    Args:
        folder: Folder of a finished run.
        measured: Folders of runs of the same training, by "freezing only" and "no freezing". The
            page shows estimated or predicted times for those that are left out.

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
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space, or make it writable"
        ) from error
    return path


def _refuse_another(run: RunResults, name: str, other: RunResults) -> None:
    """Raises UserError if the other run is not what its name says."""
    same = ("network", "dataset", "epochs", "batch_size", "precision", "weights", "freeze_first")
    for setting in same:
        if run.args.get(setting) != other.args.get(setting):
            raise UserError(
                f"{other.folder} was run with {setting} {other.args.get(setting)}, and "
                f"{run.folder} with {run.args.get(setting)}: name a run of the same training"
            )
    if other.args["freeze"] != (name == "freezing only") or other.args["cache"]:
        options = "--no-cache" if name == "freezing only" else "--no-freeze --no-cache"
        raise UserError(
            f"{other.folder} is no run with {name}: name a run that was given {options}"
        )


def report(run: RunResults, measured: dict[str, RunResults]) -> bytes:
    """Returns the page, as bytes of UTF-8.

    Args:
        run: Results of the run.
        measured: Results of runs of the same training, by "freezing only" and "no freezing".
    """
    found = ways(run.summary, {k: other.summary["wall_seconds"] for k, other in measured.items()})
    return render(
        "report.html",
        title=f"{run.args['network']} on {run.args['dataset']}",
        run=run,
        ways=found,
        words=WORDS,
        command=shlex.join(["python", "-m", "cachefreeze.train", *run.args["command"]]),
        opening=_opening(run),
        spent=spent(run.summary),
        saved=saved(run.summary),
        pictures={
            "rates": _rates(run),
            "seconds": _seconds(run),
            "frontier": _frontier(run),
            "learning": _learning(run),
            "kept": _kept(run),
            "predicted": _predicted(found),
        },
        epochs={"header": list(_epoch_columns(run)), "rows": _epochs(run)},
        units=_units(run),
        fills=_fills(run),
        settings=[
            (name, json.dumps(value))
            for name, value in run.args.items()
            if name != "command"  # which stands above
        ],
    )


def _opening(run: RunResults) -> list[tuple[str, str]]:
    summary = run.summary
    first = summary["freeze_steps"].count(0)
    lines = opening_words(run.args, summary["units"], **summary["about"], first=first)
    machine = ", ".join(f"{name} {value}" for name, value in summary["numerics"].items())
    # A word, and from the tenth column on what there is to say.
    return [*((line[:10].strip(), line[10:]) for line in lines), ("machine", machine)]


def _rates(run: RunResults) -> Picture:
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
    return Picture(
        "Rate of every unit",
        figures.rates(_curves(run), names, freezes, len(run.metrics)),
        f"Learning rates of {len(names)} units over {_count(len(run.metrics), 'epoch')}; {how}.",
    )


def _curves(run: RunResults) -> list[list[tuple[float, float]]]:
    """Returns pairs of epoch and rate for every unit: at the start, after epochs, at its freeze."""
    summary = run.summary
    curves = []
    for unit, (rate, freeze) in enumerate(
        zip(summary["initial_rates"], summary["freeze_steps"], strict=True)
    ):
        noted = [(0, rate), *((line["step"], line["lr"][unit]) for line in run.metrics)]
        before = [(step, rate) for step, rate in noted if step < freeze]
        curves.append([(_epochs_at(run, step), rate) for step, rate in [*before, (freeze, 0.0)]])
    return curves


def _seconds(run: RunResults) -> Picture:
    lines = run.metrics
    keys = ("train_seconds", "fill_seconds", "validate_seconds")
    parts = {
        part: [line[key] for line in lines] for part, key in zip(figures.PARTS, keys, strict=True)
    }
    return Picture(
        "Seconds of every epoch",
        figures.seconds(parts),
        f"Seconds of {_count(len(lines), 'epoch')}, stacked by what they were spent on: "
        f"{', '.join(name for name in parts if any(parts[name]))}.",
    )


def _frontier(run: RunResults) -> Picture:
    title, summary = "Frozen units, and where rows come from", run.summary
    if not summary["frozen_units"]:
        return Picture(title, why="no unit was frozen in this run")
    frozen = sorted(step for step in summary["freeze_steps"] if step < summary["steps"])
    served = [
        line["rows_served"] / max(line["rows_served"] + line["rows_computed"], 1)
        for line in run.metrics
    ]
    units = len(summary["units"])
    return Picture(
        title,
        figures.frontier([_epochs_at(run, step) for step in frozen], units, served),
        f"Of {units} units, {summary['frozen_units']} are frozen in the end. Up to "
        f"{max(served):.0%} of an epoch's rows come from the cache.",
    )


def _learning(run: RunResults) -> Picture:
    lines = run.metrics
    train, val, accuracy = (
        [line[name] for line in lines] for name in ("train_loss", "val_loss", "val_accuracy")
    )
    return Picture(
        "Accuracy and loss",
        figures.learning(train, val, accuracy),
        f"Validation accuracy over {_count(len(lines), 'epoch')}, from {accuracy[0]:.2%} to "
        f"{accuracy[-1]:.2%}; below, the training and validation loss.",
    )


def _kept(run: RunResults) -> Picture:
    title, sizes = "Memory of kept rows", [line["cache_bytes"] for line in run.metrics]
    if not any(sizes):
        enabled = run.summary["cache"]["enabled"]
        return Picture(title, why="no row was kept" if enabled else "there was no cache")
    return Picture(
        title,
        figures.kept(sizes),
        f"Bytes that are kept at the end of every epoch, {max(sizes):,} at most.",
    )


def _predicted(found: list[Way]) -> Picture:
    title = "Predicted beside measured"
    if found[0].predicted is None:
        return Picture(title, why="nothing was predicted in this run")
    return Picture(
        title,
        figures.predicted(found),
        f"Bars of predicted and measured seconds: {', '.join(way.name for way in found)}.",
    )


def _epochs_at(run: RunResults, step: float) -> float:
    return step * len(run.metrics) / run.summary["steps"]


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _epoch_columns(run: RunResults) -> dict[str, tuple[str, str]]:
    """Returns the columns of the table of epochs, each with its key in metrics.jsonl and format."""
    return {
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


def _epochs(run: RunResults) -> list[list[str]]:
    columns = _epoch_columns(run).values()
    return [[how.format(line[key]) for key, how in columns] for line in run.metrics]


def _units(run: RunResults) -> list[tuple[str, str, str]]:
    summary = run.summary
    names, rates, steps = summary["units"], summary["initial_rates"], summary["freeze_steps"]
    return [
        (name, f"{rate:.3g}", f"{step:,}" if step < summary["steps"] else "never")
        for name, rate, step in zip(names, rates, steps, strict=True)
    ]


def _fills(run: RunResults) -> list[tuple[str, str, str, str]]:
    return [
        (f"{each['step']:,}", each["unit"], f"{each['rows']:,}", duration(each["seconds"]))
        for each in run.summary["cache"]["fills"]
    ]
