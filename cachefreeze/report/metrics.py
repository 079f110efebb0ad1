"""What a run writes after every epoch: lines of JSON, a table, and events for TensorBoard.

One line has these values: epoch, step, train_loss, val_loss, val_accuracy, lr (a list, a rate a
unit), frozen_units, rows_served and rows_computed (in training and validation), seconds,
train_seconds, fill_seconds, validate_seconds, saved_seconds (the cache's estimate), cache_bytes
(after the epoch) and images_per_second.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cachefreeze.errors import UserError
from cachefreeze.files import write_atomically

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
    """Writes metrics.jsonl, metrics.csv and, if wanted, the files of TensorBoard.

    Nothing is written before the first epoch, or `rewrite`.

    Args:
        folder: Folder of the run.
        units: Names of the units, in order.
        tensorboard: Whether events for TensorBoard are written.

    Raises:
        UserError: A file cannot be written.
    """

    def __init__(self, folder: Folder, units: Sequence[str], *, tensorboard: bool) -> None:
        self._folder = folder
        self._units = tuple(units)
        self._events = Events(folder.path / TENSORBOARD, units) if tensorboard else None

    def add(self, lines: Sequence[Line]) -> None:
        """Writes one more epoch.

        Args:
            lines: Lines of all epochs so far. The last is new.
        """
        with self._folder.writing():
            with (self._folder.path / JSONL).open("a") as file:
                file.write(_json(lines[-1:]))
            with (self._folder.path / CSV).open("a") as file:
                file.write(self._csv(lines[-1:], header=file.tell() == 0))
            if self._events is not None:
                self._events.add(lines[-1])

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Writes all files anew. What came after a checkpoint is written again later.

        Args:
            lines: Lines of all epochs so far.
        """
        with self._folder.writing():
            write_atomically(self._folder.path / JSONL, _json(lines).encode())
            table = self._csv(lines, header=True) if lines else ""
            write_atomically(self._folder.path / CSV, table.encode())
            if self._events is not None:
                self._events.go_on(lines)

    def close(self) -> None:
        """Writes what is not written yet."""
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


class Events:
    """Writes scalars for TensorBoard: every number of a line, at its optimizer step.

    Args:
        folder: Folder for the files. It is made when the first is written.
        units: Names of the units, in order.
    """

    def __init__(self, folder: Path, units: Sequence[str]) -> None:
        self._folder = folder
        self._units = tuple(units)
        self._writer: SummaryWriter | None = None

    def add(self, line: Line) -> None:
        """Writes the scalars of an epoch."""
        writer = self._open(None)
        for name, value in as_row(line, self._units).items():
            writer.add_scalar(_tag(name), value, line["step"])
        writer.flush()

    def go_on(self, lines: Sequence[Line]) -> None:
        """Begins a new file in which the scalars of these epochs hold, and no later ones."""
        held = any(self._folder.glob("events.*"))
        step = lines[-1]["step"] if lines else 0
        # TensorBoard passes over what an earlier file says of this step and later ones.
        self._open(step + 1 if held else None)
        for line in () if held else lines:
            self.add(line)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        return self._writer


def check_tensorboard() -> None:
    """
    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install 'cachefreeze[tensorboard]', "
            "or leave it out"
        ) from error


def as_row(line: Line, units: Sequence[str]) -> dict[str, float]:
    """Returns a line with one number a column: the rate of a unit is in `lr_<unit>`."""
    row: dict[str, float] = {}
    for name, value in line.items():
        if name == "lr":
            row |= {f"lr_{unit}": rate for unit, rate in zip(units, value, strict=True)}
        else:
            row[name] = value
    return row


def _tag(column: str) -> str:
    """Returns the name in TensorBoard: rates and seconds have a group of charts each."""
    if column.startswith("lr_"):
        return f"rate/{column.removeprefix('lr_')}"
    if column.endswith("seconds"):
        return f"seconds/{column.removesuffix('seconds').rstrip('_') or 'all'}"
    return f"run/{column}"


def _json(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
