"""The bar of a run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from cachefreeze.terminal import progress_bar

# How often it is drawn. More often than one can read costs time and tells nothing.
SECONDS_BETWEEN = 0.2
# With its ends, and a space before it: less of a bar says nothing.
LEAST_BAR = 6
# Of a terminal that does not say.
COLUMNS = 80


@dataclass(frozen=True)
class Standing:
    """How far a run has come.

    Args:
        epoch, epochs: the present one, from 1, and all.
        loss: of the last step, or where asking for it would wait for a device, of the last epoch.
        accuracy: of the last validation.
        frozen, units: how many.
        source: whose output comes from the cache: the name of a unit, or `pixels` (decoded ones);
            empty if nothing does.
        images_per_second: of this epoch's steps so far.
        seconds_left: to the end of the run.

    What is not known yet is None.
    """

    epoch: int
    epochs: int
    loss: float | None
    accuracy: float | None
    frozen: int
    units: int
    source: str
    images_per_second: float | None
    seconds_left: float | None


class RunBar:
    """One bar for a whole run, on a terminal. Use it as a context.

    Args:
        steps: of the run.
        standing: asked for what to show, only when it is drawn.
    """

    def __init__(self, steps: int, standing: Callable[[], Standing]) -> None:
        self._standing = standing
        self._bar = progress_bar("", steps, "step", bar_format="{desc} |{bar}|")
        self._next = 0.0

    def update(self, step: int) -> None:
        """So many steps have been taken."""
        if self._bar.disable:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SECONDS_BETWEEN
            columns = self._bar.format_dict["ncols"] or COLUMNS
            self._bar.n = step
            self._bar.set_description_str(status(self._standing(), columns - LEAST_BAR))

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()


def status(standing: Standing, columns: int) -> str:
    """Where a run stands, in as many words as there is room for; the last to go are the epoch and
    the time that is left."""
    now = standing
    number = f"{now.epoch:>{len(str(now.epochs))}}/{now.epochs}"
    epoch = f"epoch {number}"
    loss = "" if now.loss is None else f"loss {now.loss:.3f}"
    accuracy = "" if now.accuracy is None else f"val {now.accuracy:.1%}"
    frozen = f"frozen {now.frozen}/{now.units}"
    speed = "" if now.images_per_second is None else f"{now.images_per_second:,.0f} img/s"
    left = "" if now.seconds_left is None else f"{clock(now.seconds_left)} left"
    kind, source = "cached", f"rows from the cache after {now.source}"
    if not now.source:
        kind, source = "pixels", "rows from pixels"
    elif now.source == "pixels":
        source = "rows from the cache of decoded pixels"
    for words in (
        (epoch, loss, accuracy, frozen, source, speed, left),
        (epoch, loss, accuracy, frozen, kind, speed, left),
        (number, loss, accuracy, frozen, kind, speed, left),
        (number, loss, accuracy, frozen, speed, left),
        (number, loss, accuracy, frozen, left),
        (number, loss, left),
    ):
        line = "  ".join(filter(None, words))
        if len(line) <= columns:
            return line
    return "  ".join(filter(None, (number, left)))


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:12:34`: as short as a time can be told."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
