"""The bar of a run, and how long it will still take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachefreeze.training.forecast import Span
from cachefreeze.training.terminal import progress_bar

# How often it is drawn. More often than one can read costs time and tells nothing.
SECONDS_BETWEEN = 0.2
# With its ends, and a space before it: less of a bar says nothing.
LEAST_BAR = 6
# Columns of a terminal that does not say.
COLUMNS = 80
# Share of a prediction in seconds that counts as come true before anything was seen: a first slow
# step must not turn minutes into hours.
TRUST = 0.05


@dataclass(frozen=True)
class Progress:
    """How far a run has come. What is not known yet is None.

    Args:
        epoch: Number of the present epoch, from 1.
        epochs: Number of all epochs.
        loss: Loss of the last step, or where asking for it would wait for a device, of the last
            epoch.
        accuracy: Accuracy of the last validation.
        frozen: Number of frozen units.
        units: Number of all units.
        served: Share of this epoch's rows that came from the cache.
        images_per_second: Speed of this epoch's steps so far.
        seconds_left: Seconds to the end of the run.
    """

    epoch: int
    epochs: int
    loss: float | None
    accuracy: float | None
    frozen: int
    units: int
    served: float | None
    images_per_second: float | None
    seconds_left: float | None


class RunBar:
    """One bar for a whole run, on a terminal. Use it as a context.

    Args:
        steps: Number of steps of the run.
        progress: Function that is asked for what to show, only when it is drawn.
    """

    def __init__(self, steps: int, progress: Callable[[], Progress]) -> None:
        self._progress = progress
        self._bar = progress_bar("", steps, "step", bar_format="{desc} |{bar}|")
        self._next = 0.0

    def update(self, step: int) -> None:
        """Draws the bar, if it is time.

        Args:
            step: Number of steps that have been taken.
        """
        if self._bar.disable:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SECONDS_BETWEEN
            columns = self._bar.format_dict["ncols"] or COLUMNS
            self._bar.n = step
            self._bar.set_description_str(status(self._progress(), columns - LEAST_BAR))

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Eta:
    """How long a run will still take: what is predicted of the rest, at the speed seen so far.

    Epochs get shorter as units freeze, so the steps that are left tell little of the time.

    Args:
        spans: Prediction of the whole run.
        step: Number of steps that were taken when this was made.
        now: Clock at that time, in seconds.
        trust: Share of the prediction that counts as come true; 0 if it is not in seconds.
    """

    def __init__(self, spans: Sequence[Span], step: int, now: float, trust: float = TRUST) -> None:
        self._spans = spans
        self._now = now
        self._all = self._after(step)
        self._believed = trust * self._all

    def _after(self, step: int) -> float:
        """Predicts what is left after so many steps."""
        left, stop = 0.0, sum(span.steps for span in self._spans)
        for span in reversed(self._spans):
            start = stop - span.steps
            left += span.seconds * (stop - max(step, start)) / span.steps
            if step >= max(start, 1):  # what comes before it has been done
                return left
            left, stop = left + span.before, start
        return left

    def seconds_left(self, step: int, now: float) -> float | None:
        """Returns the seconds that are left, or None if nothing was seen yet that could tell.

        Args:
            step: Number of steps that have been taken.
            now: Clock, in seconds.
        """
        ahead = self._after(step)
        behind = self._all - ahead + self._believed
        if behind <= 0:
            return None
        return ahead * (now - self._now + self._believed) / behind


def status(now: Progress, columns: int) -> str:
    """Says how far a run has come, in as many words as there is room for.

    The last to go are the epoch and the time that is left.
    """
    number = f"{now.epoch:>{len(str(now.epochs))}}/{now.epochs}"
    epoch = f"epoch {number}"
    loss = "" if now.loss is None else f"loss {now.loss:.3f}"
    accuracy = "" if now.accuracy is None else f"val {now.accuracy:.1%}"
    frozen = f"frozen {now.frozen}/{now.units}"
    speed = "" if now.images_per_second is None else f"{now.images_per_second:,.0f} img/s"
    left = "" if now.seconds_left is None else f"{clock(now.seconds_left)} left"
    served = "" if now.served is None else f"{now.served:.0%} cached"
    source = served and f"{now.served:.0%} of rows from the cache"
    for words in (
        (epoch, loss, accuracy, frozen, source, speed, left),
        (epoch, loss, accuracy, frozen, served, speed, left),
        (number, loss, accuracy, frozen, served, speed, left),
        (number, loss, accuracy, frozen, speed, left),
        (number, loss, accuracy, frozen, left),
        (number, loss, left),
    ):
        line = "  ".join(filter(None, words))
        if len(line) <= columns:
            return line
    return "  ".join(filter(None, (number, left)))


def clock(seconds: float) -> str:
    """Returns a time as short as it can be told: `0:07`, `12:34`, `3:12:34`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
