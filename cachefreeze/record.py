"""A run that has come to its end, read from its folder and checked."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.account import amount
from cachefreeze.errors import UserError

# What is needed of the files, by example: a number, a text, a list of such, whatever is in them
# besides. Older runs lack what came later; that is not listed, and whoever shows it has to ask.
_NUMBER, _TEXT = 0.0, ""
_EPOCH = dict.fromkeys(
    (
        "epoch",
        "step",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "frozen_units",
        "boundary",
        "seconds",
        "train_seconds",
        "materialize_seconds",
        "validate_seconds",
        "images_per_second",
    ),
    _NUMBER,
) | {"lr": [_NUMBER]}
_FILLING = dict.fromkeys(
    ("step", "boundary", "rows", "bytes", "seconds", "predicted_seconds", "saving_seconds"), _NUMBER
) | {"unit": _TEXT, "codec": _TEXT, "lossy": True}
_SUMMARY = {
    **dict.fromkeys(
        (
            "wall_seconds",
            "train_seconds",
            "materialize_seconds",
            "validate_seconds",
            "profile_seconds",
            "epochs",
            "steps",
            "val_accuracy",
            "best_val_accuracy",
            "frozen_units",
        ),
        _NUMBER,
    ),
    "weights_sha256": _TEXT,
    "units": [_TEXT],
    "resumed_at": [_NUMBER],
    "cache": {
        "enabled": True,
        "rows_served": _NUMBER,
        "saved_seconds": _NUMBER,
        "boundaries": [_FILLING],
    },
}
_PLAN = {
    "from_step": _NUMBER,
    "predicted": dict.fromkeys(("seconds", "freezing_only", "no_freezing", "limit"), _NUMBER),
    "actual": {"seconds": _NUMBER},
}
_ARGS = {
    "network": _TEXT,
    "dataset": _TEXT,
    "command": [_TEXT],
    "freeze": True,
    "scale_lr": True,
    "schedule": _TEXT,
    "t0": _NUMBER,
    "lr": _NUMBER,
    "cache": True,
    "cache_dir": _TEXT,
    "cache_codec": _TEXT,
    "cache_dtype": _TEXT,
    "augment": True,
    "epochs": _NUMBER,
    "batch_size": _NUMBER,
}


@dataclass(frozen=True)
class Record:
    """What a run left: its settings, a line an epoch, and its result.

    Args:
        folder: of the run.
        args, metrics, summary: what is in args.json, metrics.jsonl and summary.json.
    """

    folder: Path
    args: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """
        Raises:
            UserError: there is no run, it has not come to its end, or its files are damaged.
        """
        if not (folder / "args.json").is_file():
            raise UserError(f"{folder} holds no run: name the folder that a run was given")
        if not (folder / "summary.json").is_file():
            raise UserError(
                f"{folder} has not come to its end: go on with it first (--resume {folder})"
            )
        args = _read(folder / "args.json", json.loads, _ARGS)
        summary = _read(folder / "summary.json", json.loads, _SUMMARY)
        if summary.get("plan") is not None:
            _check(folder / "summary.json", "plan", summary["plan"], _PLAN)
        metrics = _read(folder / "metrics.jsonl", _json_lines, [_EPOCH])
        if not metrics or any(len(line["lr"]) != len(summary["units"]) for line in metrics):
            raise UserError(f"{folder / 'metrics.jsonl'} is not of the run in summary.json")
        return cls(folder, args, metrics, summary)

    def at(self, places: str) -> float:
        """A number in its files, or a sum of several, see `amount`."""
        return amount(vars(self), places)


def _json_lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def _read(path: Path, parse: Callable[[bytes], Any], form: Any) -> Any:
    try:
        content = parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): it cannot be shown") from error
    _check(path, "", content, form)
    return content


def _check(path: Path, place: str, value: Any, form: Any) -> None:
    """Raises UserError, with the place, if a value is not of a form."""
    here = f"{place}." if place else ""
    if isinstance(form, dict) and isinstance(value, dict):
        for key, each in form.items():
            _check(path, here + key, value.get(key), each)
    elif isinstance(form, list) and isinstance(value, list):
        for number, each in enumerate(value):
            _check(path, f"{here}{number}", each, form[0])
    elif isinstance(form, float):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{path} is damaged ({place} is {value!r}, and should be a number)")
    elif not isinstance(value, type(form)):
        raise UserError(f"{path} is damaged ({place or 'it'} is {value!r:.50})")
