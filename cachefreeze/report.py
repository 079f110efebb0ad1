"""What a run tells: lines and bars on the terminal, and the files in its folder."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes, why_not_writable, write_atomically


def say(line: str) -> None:
    """Print a line without tearing the bars."""
    tqdm.write(line)


def progress_bar(description: str, total: int, unit: str, *, leave: bool = False) -> "tqdm[Any]":
    """A bar that shows only on a terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit != "epoch",
        leave=leave,
        dynamic_ncols=True,
        disable=None,
    )


def track(batches: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """A bar around a pass over the images."""
    yield from tqdm(batches, "reading images", total, unit="batch", leave=False, disable=None)


class RunFolder:
    """The folder of one run: args.json, metrics.jsonl, summary.json, last.pt.

    Nothing is written before `create`.

    Raises:
        UserError: here and later: it holds a run already, or cannot be written.
    """

    # args.json alone is of a run that ended before its first epoch: there is nothing to lose.
    RESULTS = ("metrics.jsonl", "summary.json", "last.pt")

    def __init__(self, path: Path) -> None:
        self.path = path
        problem = why_not_writable(path)
        if problem is not None:
            raise self._cannot_be_written(problem)
        held = [name for name in self.RESULTS if (path / name).exists()]
        if held:
            raise UserError(
                f"{path} holds a run already ({', '.join(held)}): choose another --output-dir, "
                "or remove that one"
            )

    def create(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, with the run's settings in args.json."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("args.json", settings)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with self.writing():
            write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        with self.writing(), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Errors of the file system inside are the user's to mend."""
        try:
            yield
        except OSError as error:
            raise self._cannot_be_written(error.strerror or str(error)) from error

    def _cannot_be_written(self, reason: str) -> UserError:
        return UserError(
            f"the output folder {self.path} cannot be written ({reason}): "
            "make room or choose another with --output-dir"
        )


def epoch_line(metrics: Mapping[str, Any], epochs: int, units: Sequence[str]) -> str:
    """One epoch in one line."""
    boundary = metrics["boundary"]
    if metrics["source"] == "cache":
        source = f"rows from the cache after {units[boundary - 1]}"
    else:
        source = "rows from pixels"
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {metrics['train_loss']:.4f}  val {metrics['val_accuracy']:7.2%}  "
        f"frozen {metrics['frozen_units']}/{len(units)}  "
        f"{metrics['images_per_second']:7,.0f} img/s  {source}"
    )


def materialize_line(event: Mapping[str, Any], unit: str) -> str:
    """One materialisation in one line."""
    verb = "found in the cache" if event["reused"] else "written to the cache"
    return (
        f"  step {event['step']}: activations after {unit} {verb}: {event['rows']:,} rows, "
        f"{human_bytes(event['bytes'])}, {event['seconds']:.1f} s"
    )


def opening_words(
    settings: Mapping[str, Any], units: int, parameters: int, data_set: str, where: str
) -> list[str]:
    """What is about to be done."""
    if settings["freeze"]:
        rates = "scaled" if settings["scale_lr"] else "unscaled"
        plan = f"FreezeOut, {settings['schedule']}, t0 = {settings['t0']:g}, {rates} rates"
    else:
        plan = "nothing freezes, one cosine for all units"
    if settings["cache"]:
        cache = f"activations of frozen units are kept in {settings['cache_dir']}"
    elif settings["augment"]:
        cache = "off: augmented pixels are new in every epoch, so there is nothing to keep"
    else:
        cache = "off: frozen units are computed in every step"
    epochs = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    return [
        f"network   {settings['network']}: {units} units, {parameters / 1e6:.2f} M parameters",
        f"data      {data_set}",
        f"training  {epochs} in batches of {settings['batch_size']} on {where}",
        f"schedule  {plan}",
        f"cache     {cache}",
    ]


def closing_words(
    summary: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, python: str, exact: bool
) -> list[str]:
    """What came out, where it lies, and what to type next.

    Args:
        summary, settings: what is in summary.json and args.json.
        folder: of the run.
        python: the interpreter, as one would type it here.
        exact: the device gives the same weights with and without the cache.
    """
    cache = summary["cache"]
    spent = {
        "training": summary["train_seconds"],
        "filling the cache": summary["materialize_seconds"],
        "validation": summary["validate_seconds"],
    }
    if not cache["enabled"]:
        del spent["filling the cache"]
    spent["the rest"] = summary["wall_seconds"] - sum(spent.values())
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items())
    lines = [
        "",
        f"accuracy  {summary['val_accuracy']:.2%} of the validation images "
        f"(best epoch {summary['best_val_accuracy']:.2%})",
        f"time      {duration(summary['wall_seconds'])}: {parts}",
    ]
    if cache["boundaries"]:
        saved = cache["saved_seconds"]
        verdict = "saved about" if saved >= 0 else "cost about"
        lines += [
            f"cache     {verdict} {duration(abs(saved))}, filling included, against running the "
            f"frozen units: {cache['rows_served']:,} rows came from it",
            f"store     {cache['store'] or 'none left'} (until a later run fills its own)",
        ]
    elif cache["enabled"] and summary["frozen_units"]:
        lines.append(
            "cache     held nothing: units froze too late in the run for a store to pay; "
            "try more --epochs or a smaller --t0"
        )
    lines += [
        f"run       {folder} (args.json, metrics.jsonl, summary.json, last.pt)",
        f"weights   SHA-256 {summary['weights_sha256'][:16]}...",
    ]
    hints = []
    train = f"{python} -m cachefreeze.train"
    command = f"{train} {shlex.join(settings['command'])}".rstrip()
    same = "the same weights" if exact else "nearly the same weights"
    if cache["boundaries"]:
        hints += [
            f"  {command} --no-cache",
            f"      {same}, in more time",
            f"  {python} scripts/cache_stats.py {settings['cache_dir']}",
            "      what is in the cache",
        ]
    if settings["dataset"] == "digits":
        hints += [f"  {train} --dataset cifar10", "      the paper's setting (wants a GPU)"]
    return [*lines, "", "what to type next:", *hints] if hints else lines


def duration(seconds: float) -> str:
    """A time in the largest two units: `48.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"
