"""Lines and bars on the terminal, and the verbosity that decides which of them show."""

import logging
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Verbosity:
    """Amount of output on the terminal.

    Args:
        lines: Whether lines about the progress are printed.
        bars: Whether bars are drawn, where the output is a terminal.
        results: Whether warnings and results are printed.
    """

    lines: bool = True
    bars: bool = True
    results: bool = True


EVERYTHING = Verbosity()
NOTHING = Verbosity(lines=False, bars=False, results=False)
# Widths of "accuracy  " and the like, and of the space before a warning.
# A part of a run that takes so many seconds has a bar of its own: that of the run stands still.
SHOW_AFTER = 2.0
_COLUMNS, _INDENTS = 80, (10, 2)
# A process has one terminal, and those who write to it know nothing of each other.
_verbosity = EVERYTHING


# Control and format characters, halves of characters, and ends of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Warnings(logging.Handler):
    """Prints what the cache logs."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextmanager
def speaking(verbosity: Verbosity) -> Iterator[None]:
    """Sets the verbosity inside. What the library logs is printed as warnings."""
    global _verbosity
    before, _verbosity = _verbosity, verbosity
    log, handler = logging.getLogger("cachefreeze"), _Warnings(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        _verbosity = before


def say(line: str, *, always: bool = False, whole: bool = False) -> None:
    """Prints a line without tearing the bars.

    Args:
        line: Line to print.
        always: Whether it is printed even if only warnings and results are wanted.
        whole: Whether it is printed as one line however long it is, as commands are.
    """
    if _verbosity.results if always else _verbosity.lines:
        text = printable(line)
        tqdm.write(text if whole else folded(text))


def folded(line: str) -> str:
    """Breaks a line at 80 columns. The next lines begin below its text, not below its label."""
    label = re.match(r"\S* +", line)
    indent = label.end() if label is not None and label.end() in _INDENTS else 0
    width = _COLUMNS - indent
    rest = textwrap.wrap(line[indent:], width, break_long_words=False, break_on_hyphens=False)
    return line[:indent] + f"\n{' ' * indent}".join(rest)


def printable(text: str) -> str:
    r"""Returns a line in which control characters and the like are spelled out, such as \x1b.

    Names of files and classes may hold characters that a terminal obeys, or cannot print.
    """
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in _UNSEEN else one
        for one in text
    )


def warn(sentence: str) -> None:
    """Prints a warning."""
    say(f"  {sentence}", always=True)


def progress_bar(description: str, total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """Returns a bar that shows only on a terminal, and goes when it is closed.

    Args:
        description: Name of the work, printed before the bar.
        total: Number of pieces of work.
        unit: Name of a piece of work, such as `batch`.
        **options: Options of tqdm.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=None if _verbosity.bars else True,
        **options,
    )


def track(batches: "Iterator[Tensor]", total: int) -> "Iterator[Tensor]":
    """Yields the batches of a pass over the images, and draws a bar meanwhile."""
    with progress_bar("reading images", total, "batch") as bar:
        for batch in batches:
            yield batch
            bar.update()


def this_python() -> str:
    """Returns the name of the running interpreter, as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"
