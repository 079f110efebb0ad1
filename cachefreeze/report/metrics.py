"""Metrics of every epoch, written as lines of JSON, a table, and events for TensorBoard.

`run_results` says what a line holds.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cachefreeze.errors import UserError
from cachefreeze.store.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

JSONL, CSV, TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"
Line = Mapping[str, Any]


class Folder(Protocol):
    """The folder of a run.

    Attributes:
        path: Path of the folder.
    """

    path: Path

    def writing(self) -> AbstractContextManager[None]:
        """Returns a context that turns errors of the file system into a UserError."""


class Metrics:
    """Writes metrics.jsonl, metrics.csv and, if wanted, events for TensorBoard.

    Nothing is written before the end of the first epoch, or `rewrite`.

    Args:
        folder: Folder of the run.
        units: Names of the units, in order.
        tensorboard: Whether every number is written for TensorBoard as well.

    Raises:
        UserError: A file cannot be written.
    """

    def __init__(self, folder: Folder, units: Sequence[str], *, tensorboard: bool) -> None:
        self._folder = folder
        self._units = tuple(units)
        self._tensorboard = tensorboard
        self._events: SummaryWriter | None = None

    def add(self, lines: Sequence[Line]) -> None:
        """Adds the line of one more epoch to all files.

        Args:
            lines: Lines of all epochs so far. The last one is new.
        """
        with self._folder.writing():
            with (self._folder.path / JSONL).open("a") as file:
                file.write(_json(lines[-1:]))
            with (self._folder.path / CSV).open("a") as file:
                file.write(self._csv(lines[-1:], header=file.tell() == 0))
            self._add_events(lines[-1:], purge_step=None)

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Writes all files anew, without the epochs that came after a checkpoint.

        Args:
            lines: Lines of all epochs so far.
        """
        with self._folder.writing():
            write_atomically(self._folder.path / JSONL, _json(lines).encode())
            table = self._csv(lines, header=True) if lines else ""
            write_atomically(self._folder.path / CSV, table.encode())
            if any((self._folder.path / TENSORBOARD).glob("events.*")):
                # TensorBoard passes over what an earlier file says of this step and later ones.
                self._add_events([], purge_step=lines[-1]["step"] + 1 if lines else 1)
            else:
                self._add_events(lines, purge_step=None)

    def close(self) -> None:
        """Writes the events that are not written yet."""
        if self._events is not None:
            with self._folder.writing():
                self._events.close()

    def _csv(self, lines: Sequence[Line], *, header: bool) -> str:
        rows = [as_row(line, self._units) for line in lines]
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    def _add_events(self, lines: Sequence[Line], purge_step: int | None) -> None:
        if not self._tensorboard:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder.path / TENSORBOARD
            self._events = SummaryWriter(str(folder), purge_step=purge_step)
        for line in lines:
            for name, value in as_row(line, self._units).items():
                self._events.add_scalar(_tag(name), value, line["step"])
        self._events.flush()


def check_tensorboard() -> None:
    """Checks that TensorBoard is installed.

    Raises:
        UserError: The package tensorboard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install 'cachefreeze[tensorboard]', "
            "or leave it out"
        ) from error


def as_row(line: Line, units: Sequence[str]) -> dict[str, float]:
    """Returns a line with one number in each column. The rate of a unit is in `lr_<unit>`."""
    row: dict[str, float] = {}
    for name, value in line.items():
        if name == "lr":
            row |= {f"lr_{unit}": rate for unit, rate in zip(units, value, strict=True)}
        else:
            row[name] = value
    return row


def _tag(column: str) -> str:
    """Returns the name of a column in TensorBoard, where rates and seconds are groups of charts."""
    if column.startswith("lr_"):
        return f"rate/{column.removeprefix('lr_')}"
    if column.endswith("seconds"):
        return f"seconds/{column.removesuffix('seconds').rstrip('_') or 'all'}"
    return f"run/{column}"


def _json(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
