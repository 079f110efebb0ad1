"""What a run tells of every epoch, in files: lines of JSON, a table, events for TensorBoard."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefreeze.errors import UserError
from cachefreeze.files import write_atomically
from cachefreeze.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

JSONL, CSV, TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"
Line = Mapping[str, Any]


class Metrics:
    """metrics.jsonl and metrics.csv of a run, and its events for TensorBoard if they are wanted.

    Nothing is written before the first epoch, or `rewrite`.

    Args:
        folder: of the run.
        units: their names, in order.
        tensorboard: see `Events`.

    Raises:
        UserError: nothing can be written.
    """

    def __init__(self, folder: RunFolder, units: Sequence[str], *, tensorboard: bool) -> None:
        self.folder = folder
        self.units = tuple(units)
        self.events = Events(folder.path / TENSORBOARD, units) if tensorboard else None
        # What the table has so far.
        self._columns: list[str] = []

    def add(self, lines: Sequence[Line]) -> None:
        """One more epoch: the last of all lines of the run."""
        with self.folder.writing():
            with (self.folder.path / JSONL).open("a") as file:
                file.write(_json(lines[-1:]))
            row = as_row(lines[-1], self.units)
            if list(row) == self._columns:
                with (self.folder.path / CSV).open("a") as file:
                    file.write(_csv(self._columns, [row]))
            else:
                self._write_table(lines)
            if self.events is not None:
                self.events.add(lines[-1])

    def rewrite(self, lines: Sequence[Line]) -> None:
        """All of it anew: what came after a checkpoint comes again."""
        with self.folder.writing():
            write_atomically(self.folder.path / JSONL, _json(lines).encode())
            self._write_table(lines)
            if self.events is not None:
                self.events.go_on(lines)

    def close(self) -> None:
        """Write what is not written yet."""
        if self.events is not None:
            with self.folder.writing():
                self.events.close()

    def _write_table(self, lines: Sequence[Line]) -> None:
        rows = [as_row(line, self.units) for line in lines]
        # Lines of an older version may have fewer of them.
        self._columns = list(dict.fromkeys(column for row in rows for column in row))
        header = dict(zip(self._columns, self._columns, strict=True))
        content = _csv(self._columns, [header, *rows]) if rows else ""
        write_atomically(self.folder.path / CSV, content.encode())


class Events:
    """Scalars for TensorBoard, by optimiser step: whatever is a number in a line of metrics.
    `check_tensorboard` says whether it is there.

    Args:
        folder: for its files, made when the first is written.
        units: their names, in order.
    """

    def __init__(self, folder: Path, units: Sequence[str]) -> None:
        self.folder = folder
        self.units = tuple(units)
        self._writer: SummaryWriter | None = None

    def add(self, line: Line) -> None:
        """The points of an epoch."""
        writer = self._open(None)
        for name, value in as_row(line, self.units).items():
            if isinstance(value, int | float):
                writer.add_scalar(_tag(name), value, line["step"])
        writer.flush()

    def go_on(self, lines: Sequence[Line]) -> None:
        """Where a run goes on: the points of its epochs so far are there, and no others."""
        held = any(self.folder.glob("events.*"))
        step = lines[-1]["step"] if lines else 0
        # TensorBoard passes over what an earlier file says of this step and later ones.
        self._open(step + 1 if held else None)
        for line in () if held else lines:
            self.add(line)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        return self._writer


def check_tensorboard() -> None:
    """Raises UserError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tensorboard needs the package tensorboard: pip install 'cachefreeze[tensorboard]', "
            "or leave it out"
        ) from error


def as_row(line: Line, units: Sequence[str]) -> dict[str, Any]:
    """A line of metrics with one value a column: rates by unit, as `lr_<unit>`."""
    row: dict[str, Any] = {}
    for name, value in line.items():
        if name == "lr":
            row |= {f"lr_{unit}": rate for unit, rate in zip(units, value, strict=True)}
        else:
            row[name] = value
    return row


def _tag(column: str) -> str:
    """Where TensorBoard shows a column: rates and seconds have a chart group each."""
    if column.startswith("lr_"):
        return f"rate/{column.removeprefix('lr_')}"
    if column.endswith("seconds"):
        return f"seconds/{column.removesuffix('seconds').rstrip('_') or 'all'}"
    return f"run/{column}"


def _json(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
    return file.getvalue()
