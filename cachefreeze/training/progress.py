"""The progress bar of a run, and the prediction of the time that is left."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachefreeze.plan.forecast import Span
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
    """Progress of a run. A value that is not known yet is None.

    Args:
        epoch: Number of the present epoch, from 1.
        epochs: Number of all epochs.
        loss: Loss of the last step. On devices other than the CPU, loss of the last epoch: reading
            that of the last step would wait for the device.
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
    """A progress bar for a whole run, on a terminal. Use it as a context.

    Args:
        steps: Number of steps of the run.
        progress: Function that returns the progress. It is called only when the bar is drawn.
    """

    def __init__(self, steps: int, progress: Callable[[], Progress]) -> None:
        self._progress = progress
        self._bar = progress_bar("", steps, "step", bar_format="{desc} |{bar}|")
        self._next = 0.0

    def update(self, step: int) -> None:
        """Draws the bar, unless it was drawn just now.

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
    """Predicts the time that is left: the predicted time of the rest, scaled by the speed so far.

    Epochs get shorter as units freeze, so the number of steps that are left says little.

    Args:
        spans: Prediction of the whole run.
        step: Number of steps that have been taken.
        now: Clock, in seconds.
        trust: Share of the prediction that counts as confirmed from the start. 0 if the prediction
            is not in seconds.
    """

    def __init__(self, spans: Sequence[Span], step: int, now: float, trust: float = TRUST) -> None:
        self._spans = spans
        self._now = now
        self._all = self._after(step)
        self._believed = trust * self._all

    def _after(self, step: int) -> float:
        """Returns the predicted seconds that are left after a number of steps."""
        left, stop = 0.0, sum(span.steps for span in self._spans)
        for span in reversed(self._spans):
            start = stop - span.steps
            left += span.seconds * (stop - max(step, start)) / span.steps
            if step >= max(start, 1):  # what comes before it has been done
                return left
            left, stop = left + span.before, start
        return left

    def seconds_left(self, step: int, now: float) -> float | None:
        """Returns the seconds that are left, or None if no step was seen yet.

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
    """Returns the progress of a run in words, as many as there is room for.

    The epoch and the time that is left are always among them.

    Args:
        now: Progress of the run.
        columns: Number of characters that there is room for.
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
    """Returns a number of seconds as a clock shows it: `0:07`, `12:34`, `3:12:34`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
