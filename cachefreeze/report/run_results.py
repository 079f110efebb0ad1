"""The files of a finished run, read and checked."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError

SCHEMA = 2
# What the files must hold, by example: a number, a text, a list of such. Seconds of different parts
# of a run do not overlap; a line of metrics.jsonl is of one epoch, its bytes of that epoch's end.
_NUMBER, _TEXT = 0.0, ""


def _numbers(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), _NUMBER)


_EPOCH = {
    **_numbers("epoch step train_loss val_loss val_accuracy frozen_units rows_served"),
    **_numbers("rows_computed seconds train_seconds fill_seconds validate_seconds"),
    **_numbers("saved_seconds cache_bytes images_per_second"),
    "lr": [_NUMBER],
}
_SUMMARY = {
    **_numbers("epochs steps val_accuracy best_val_accuracy train_loss frozen_units"),
    **_numbers("wall_seconds train_seconds fill_seconds validate_seconds checkpoint_seconds"),
    "weights_sha256": _TEXT,
    "units": [_TEXT],
    "initial_rates": [_NUMBER],
    "freeze_steps": [_NUMBER],
    "numerics": {},
    "cache": {  # and the directory, None for memory
        "enabled": True,
        **_numbers("rows_served rows_computed rows_kept bytes seconds_saved"),
        "messages": [_TEXT],
        "fills": [{**_numbers("step rows seconds"), "unit": _TEXT}],
    },
    "resumed_at": [_NUMBER],
    # Arguments of `summary_text.opening_words`.
    "about": {"parameters": _NUMBER, "data_set": _TEXT, "where": _TEXT},
}
# Seconds of the whole run. The forecast may be None.
_FORECAST = _numbers("without_freezing freezing_only cached limit")
_ARGS = {
    **dict.fromkeys(("network", "dataset", "schedule"), _TEXT),
    **dict.fromkeys(("freeze", "scale_lr", "cache", "augment"), True),
    **_numbers("t0 lr epochs batch_size"),
    "command": [_TEXT],
}


@dataclass(frozen=True)
class RunResults:
    """Results of a finished run.

    Args:
        folder: Folder of the run.
        args: Settings of the run, from args.json.
        metrics: Lines of metrics.jsonl, one for every epoch.
        summary: Contents of summary.json.
    """

    folder: Path
    args: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "RunResults":
        """Reads the files of a run.

        Args:
            folder: Folder of the run.

        Raises:
            UserError: There is no run, it is not finished, another version wrote it, or a file is
                damaged.
        """
        if not (folder / "args.json").is_file():
            raise UserError(f"{folder} holds no run: name the --output-dir of a run")
        path = folder / "summary.json"
        if not path.is_file():
            raise UserError(
                f"the run in {folder} is not finished: go on with it first (--resume {folder})"
            )
        summary = _read(path, json.loads, {})
        if summary.get("schema") != SCHEMA:
            raise UserError(
                f"{path} is not of schema {SCHEMA}: another version of cachefreeze made this run, "
                "so show it with that version, or train again with this one"
            )
        _check(path, "", summary, _SUMMARY)
        if summary.get("forecast") is not None:
            _check(path, "forecast", summary["forecast"], _FORECAST)
        args = _read(folder / "args.json", json.loads, _ARGS)
        metrics = _read(folder / "metrics.jsonl", _json_lines, [_EPOCH])
        units = len(summary["units"])
        lists = [summary["initial_rates"], summary["freeze_steps"], *(m["lr"] for m in metrics)]
        if not metrics or any(len(each) != units for each in lists):
            raise UserError(
                f"{folder / 'metrics.jsonl'} does not belong to the run in summary.json: "
                "name another run, or train again"
            )
        return cls(folder, args, metrics, summary)


def _json_lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def _read(path: Path, parse: Callable[[bytes], Any], form: Any) -> Any:
    try:
        content = parse(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable, or name another run"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    _check(path, "", content, form)
    return content


def _check(path: Path, place: str, value: Any, form: Any) -> None:
    """Raises a UserError that names the place if a value does not have the types of an example."""
    here = f"{place}." if place else ""
    if isinstance(form, dict) and isinstance(value, dict):
        for key, each in form.items():
            _check(path, here + key, value.get(key), each)
    elif isinstance(form, list) and isinstance(value, list):
        for number, each in enumerate(value):
            _check(path, f"{here}{number}", each, form[0])
    elif isinstance(form, float):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise _damaged(path, f"{place} is {value!r}, and should be a number")
    elif not isinstance(value, type(form)):
        raise _damaged(path, f"{place or 'it'} is {value!r:.50}")


def _damaged(path: Path, how: object) -> UserError:
    return UserError(f"{path} is damaged ({how}): name another run, or train again")
