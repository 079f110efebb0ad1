"""A process that trains, and that may be told to die at a moment with a name.

The system's own file operations are watched with an audit hook, which Python calls before each of
them: the program under test has no hooks of its own, and every point between two operations can be
hit.

As a module it is a nursery: it imports everything once, then forks a process for each line of JSON
that it is given, and says what became of it. Importing PyTorch takes longer than a run here.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cachefreeze.plan import forecast, overhead
from cachefreeze.store import format as store_format
from cachefreeze.store.format import NEW
from cachefreeze.train import main
from cachefreeze.training import checkpoint
from cachefreeze.training.trainer import Trainer

Event = Callable[[str, tuple[Any, ...]], bool]


def _renaming(ending: str) -> Event:
    return lambda event, args: event == "os.rename" and str(args[1]).endswith(ending)


def _named(event: str, part: str, argument: int = 0) -> Event:
    return lambda seen, args: seen == event and part in str(args[argument])


def _writing(part: str) -> Event:
    def matches(event: str, args: tuple[Any, ...]) -> bool:
        return event == "open" and part in str(args[0]) and bool(args[2] & os.O_ACCMODE)

    return matches


def _a_change(event: str, args: tuple[Any, ...]) -> bool:
    """Any change of any file."""
    if event == "open":
        return isinstance(args[2], int) and bool(args[2] & os.O_ACCMODE)
    return event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


# Where to die: just before this happens.
FILE_POINTS: dict[str, Event] = {
    "settings": _renaming("args.json"),
    "folder begun": _named("os.mkdir", "/cache"),
    "tag": _renaming("CACHEDIR.TAG"),
    "segment begun": _named("os.mkdir", NEW),
    "segment": _named("os.rename", NEW),
    "chunk begun": _writing("/values/c."),
    "chunk": _named("os.rename", "/values/c."),
    "keys begun": _writing("/keys/c."),
    "keys": _named("os.rename", "/keys/c."),
    "checkpoint begun": _writing("last.pt"),
    "best": _renaming("best.pt"),
    "previous": _renaming("previous.pt"),
    "checkpoint": _renaming("last.pt"),
    "metrics": _writing("metrics.jsonl"),
    "summary": _renaming("summary.json"),
    "any": _a_change,
}
CODE_POINTS = ("step", "validation", "filling")
POINTS = (*FILE_POINTS, *CODE_POINTS)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Dies when it has been called `count` times. Its workers, which are forks of it, do not."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.process = os.getpid()

    def __call__(self) -> None:
        self.left -= os.getpid() == self.process
        if self.left == 0:
            die()


def die_at(point: str, count: int) -> None:
    """Arrange for this process to die just before `point` comes for the `count`th time."""
    tick = Countdown(count)
    if point in FILE_POINTS:
        happens = FILE_POINTS[point]

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if happens(event, args):
                tick()

        sys.addaudithook(watch)
        return
    step, logits, fill = Trainer._step, Trainer._logits, Trainer._fill

    def a_step(trainer: Trainer, *args: Any) -> Any:
        result = step(trainer, *args)
        tick()
        return result

    def validating(trainer: Trainer, x: Any) -> Any:
        if not trainer.model.training:
            tick()
        return logits(trainer, x)

    def filling(trainer: Trainer, *args: Any) -> None:
        fill(trainer, *args)
        tick()

    patches: dict[str, tuple[type, str, Any]] = {
        "step": (Trainer, "_step", a_step),
        "validation": (Trainer, "_logits", validating),
        "filling": (Trainer, "_fill", filling),
    }
    owner, name, patch = patches[point]
    setattr(owner, name, patch)


def live(request: dict[str, Any]) -> int:
    """One life: train, with what is said going to a file."""
    with Path(request["log"]).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if request.get("point"):
        die_at(request["point"], request["count"])
    try:
        return main(request["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def nursery() -> None:
    # So that few rows make several chunks.
    store_format.CHUNK_BYTES = 2**18
    # What is kept and saved must not depend on how fast the machine is just now.
    overhead._FREE_SECONDS = checkpoint.TIME_SHARE = float("inf")
    forecast.COMPARED = forecast.TRACED = 0
    # It may be off, where a shell runs this in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70  # a traceback
            try:
                code = live(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    nursery()
