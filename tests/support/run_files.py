"""The files of a run, written without training: numbers that are chosen, and differ."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.freezeout.schedule import Schedule
from cachefreeze.report.metrics import Metrics
from cachefreeze.report.run_results import SCHEMA, RunResults

EPOCHS, STEPS_PER_EPOCH = 12, 23
ROWS = 1797  # of an epoch, in training and validation
RATE = 0.1


@dataclass
class Folder:
    """A folder for `Metrics`."""

    path: Path

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield


def units(count: int) -> list[str]:
    """Names: a stem, blocks, a head."""
    return ["stem", *(f"block{number}" for number in range(1, count - 1)), "head"]


def make_run(
    folder: Path,
    *,
    cache: bool = True,
    freeze: bool = True,
    epochs: int = EPOCHS,
    names: list[str] | None = None,
    forecast: bool = True,
    tensorboard: bool = False,
) -> RunResults:
    """Writes args.json, metrics.jsonl, metrics.csv and summary.json of a run, and reads them.

    Args:
        folder: Folder that is made.
        cache: Whether the cache was on.
        freeze: Whether units froze.
        epochs: Number of epochs.
        names: Names of the units. None for eight.
        forecast: Whether times were predicted.
        tensorboard: Whether events are written, too.
    """
    names = units(8) if names is None else names
    steps = epochs * STEPS_PER_EPOCH
    schedule = Schedule(len(names), steps, 0.8 if freeze else 1.0)
    ends = schedule.freeze_steps
    rates = [[RATE * schedule.factor(u, s) for u in range(len(names))] for s in range(steps + 1)]
    folder.mkdir(parents=True)
    metrics = Metrics(Folder(folder), names, tensorboard=tensorboard)
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        step = epoch * STEPS_PER_EPOCH
        frozen = schedule.frontier(step)
        served = ROWS - 97 if cache and frozen > 1 else 0
        filled = [end for end in ends if step - STEPS_PER_EPOCH < end <= step and end < steps]
        train = 2.3 * (1 - 0.9 * frozen / len(names)) if served else 2.3 - 0.1 * frozen
        fill = 0.31 * bool(cache and filled)
        lines.append(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": 2.0 / epoch**2,
                "val_loss": 1.9 / epoch,
                "val_accuracy": 1 - 0.9 / epoch,
                "lr": rates[min(step, steps - 1)],
                "frozen_units": frozen,
                "rows_served": served,
                "rows_computed": ROWS - served if cache and frozen else 0,
                "seconds": train + fill + 0.17,
                "train_seconds": train,
                "fill_seconds": fill,
                "validate_seconds": 0.17,
                "saved_seconds": 0.8 * bool(served),
                "cache_bytes": 118_000_000 // frozen if cache and frozen else 0,
                "images_per_second": 1438 / train,
            }
        )
        metrics.add(lines)
    metrics.close()
    sums = {
        name: sum(line[name] for line in lines)
        for name in ("seconds", "train_seconds", "fill_seconds", "validate_seconds")
    }
    fills = [
        {"step": end, "unit": name, "rows": ROWS, "seconds": 0.31}
        for name, end in zip(names, ends, strict=True)
        if cache and end < steps
    ]
    summary = {
        "schema": SCHEMA,
        "epochs": epochs,
        "steps": steps,
        **{name: lines[-1][name] for name in ("val_accuracy", "train_loss", "frozen_units")},
        "best_val_accuracy": 0.9944,
        "weights_sha256": "42c5ff28c139eccb" * 4,
        "units": names,
        "initial_rates": rates[0],
        "freeze_steps": list(ends),
        "numerics": {"precision": "bf16", "device": "cpu", "threads": "2"},
        "wall_seconds": sums.pop("seconds") + 1.75,
        **sums,
        "checkpoint_seconds": 0.4,
        "cache": {
            "enabled": cache,
            "directory": "data/cache" if cache else None,
            "rows_served": sum(line["rows_served"] for line in lines),
            "rows_computed": sum(line["rows_computed"] for line in lines),
            "rows_kept": 8985 if fills else 0,
            "bytes": lines[-1]["cache_bytes"],
            "seconds_saved": sum(line["saved_seconds"] for line in lines),
            "messages": [],
            "fills": fills,
        },
        "forecast": {"without_freezing": 39.1, "freezing_only": 33.3, "cached": 29.9, "limit": 28.2}
        if forecast
        else None,
        "resumed_at": [],
        "about": {
            "parameters": 693_498,
            "data_set": "digits: 1,438 training and 359 validation images, 3x32x32, 10 classes",
            "where": "cpu, bf16 autocast",
        },
    }
    args = {
        "network": "wrn16_2",
        "dataset": "digits",
        "command": ["--arch", "wrn"]
        + ["--no-cache"] * (not cache)
        + ["--no-freeze"] * (not freeze),
        "freeze": freeze,
        "scale_lr": True,
        "schedule": "cubic",
        "t0": 0.8,
        "lr": RATE,
        "cache": cache,
        "cache_dir": "data/cache",
        "augment": False,
        "epochs": epochs,
        "batch_size": 64,
        "output_dir": str(folder),
    }
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary))
    return RunResults.load(folder)


def rewrite(run: RunResults) -> Path:
    """Writes the files of a run anew, after something in them was changed; returns its folder."""
    (run.folder / "args.json").write_text(json.dumps(run.args))
    (run.folder / "summary.json").write_text(json.dumps(run.summary))
    lines = "".join(json.dumps(line) + "\n" for line in run.metrics)
    (run.folder / "metrics.jsonl").write_text(lines)
    return run.folder
