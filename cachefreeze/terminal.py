"""What is told on the terminal: lines, bars, and how much of both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Manner:
    """How much is told. `lines`: also what goes on, not only warnings and results. `bars`: where
    the output is a terminal."""

    lines: bool = True
    bars: bool = True


EVERYTHING = Manner()
# A process has one terminal, and those who write to it know nothing of each other.
_manner = EVERYTHING


@contextmanager
def speaking(manner: Manner) -> Iterator[None]:
    """Tell so much inside."""
    global _manner
    before, _manner = _manner, manner
    try:
        yield
    finally:
        _manner = before


def say(line: str, *, always: bool = False) -> None:
    """Print a line without tearing the bars; `always`, even if only warnings and results are
    wanted."""
    if always or _manner.lines:
        tqdm.write(line)


def warn(sentence: str) -> None:
    """Print what is not as it should be."""
    say(f"  {sentence}", always=True)


def progress_bar(description: str, total: int, unit: str, **options: Any) -> "tqdm[Any]":
    """A bar that shows only on a terminal, and only if bars are wanted; it goes when it is closed.
    `options` are tqdm's."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=None if _manner.bars else True,
        **options,
    )


def track(batches: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    """A bar around a pass over the images."""
    with progress_bar("reading images", total, "batch") as bar:
        for batch in batches:
            yield batch
            bar.update()
