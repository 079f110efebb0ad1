"""Kills runs until they are done, and compares what comes of them."""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .victim import POINTS

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "wrn": ("--arch", "wrn10_1", "--dropout", "0.3"),
    "densenet": ("--arch", "densenet16_4", "--dropout", "0.2"),
    "vgg": ("--arch", "vgg11"),
}
# 30 steps of 5 an epoch; the first units freeze at steps 8 to 10.
SCHEDULE = ("--epochs", "6", "--t0", "0.25", "--schedule", "linear", "--lr", "0.05")
SCHEDULE += ("-b", "32", "-j", "0", "--precision", "fp32", "--no-report")
# Of a run: after so many kills it is left in peace.
MOST_KILLS = 8
# What a run must have in common with one that was never killed.
RESULTS = ("epoch", "step", "train_loss", "val_loss", "val_accuracy", "lr", "frozen_units")


class Nursery:
    """Lives, one at a time, forked from a process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def live(
        self,
        argv: list[str],
        log: Path,
        *,
        point: str | None = None,
        count: int = 1,
        after: float | None = None,
        number: int = signal.SIGKILL,
    ) -> int:
        """Runs the program; returns its exit code, or minus the signal that ended it.

        It dies at the `count`th `point`, or gets the signal `number` after so many seconds.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": argv, "log": str(log), "point": point, "count": count}
        self._process.stdin.write(json.dumps(request) + "\n")
        child = int(self._process.stdout.readline())
        if after is not None and not select.select([self._process.stdout], [], [], after)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))


@dataclass
class Tally:
    """What was done to runs of one network, and what came of it."""

    runs: int = 0
    kills: int = 0
    interrupts: int = 0
    damages: int = 0
    different: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)


class Chaos:
    """Kills runs of one network.

    Args:
        nursery: to run them.
        network: one of `NETWORKS`.
        images: a folder of images.
        folder: for runs and caches.
    """

    def __init__(self, nursery: Nursery, network: str, images: Path, folder: Path) -> None:
        self.nursery = nursery
        self.folder = folder / network
        self.folder.mkdir(parents=True)
        self.options = [*NETWORKS[network], *SCHEDULE, "--dataset", "imagefolder"]
        self.options += ["--data-dir", str(images), "--image-size", "32"]
        # What is right: a run without a cache that nobody disturbs; and how long one takes.
        reference = self.folder / "reference"
        argv = [*self.options, "--no-cache", "--output-dir", str(reference)]
        assert self.nursery.live(argv, self.folder / "reference.log") == 0
        self.right = results(reference)
        start = time.perf_counter()
        quiet = Victim(self, "quiet")
        assert quiet.attempt() == 0
        self.seconds = time.perf_counter() - start
        assert quiet.result() == self.right


class Victim:
    """One run in one folder, whose command is given again and again."""

    def __init__(self, chaos: Chaos, name: str, *options: str) -> None:
        self.chaos = chaos
        self.folder = chaos.folder / name
        self.folder.mkdir()
        self.run = self.folder / "run"
        self.cache = self.folder / "cache"
        self.log = self.folder / "log"
        self.argv = [*chaos.options, *options, "--cache-dir", str(self.cache)]
        self.argv += ["--output-dir", str(self.run), "--resume", "auto"]

    def attempt(self, **death: Any) -> int:
        """See `Nursery.live`."""
        return self.chaos.nursery.live(self.argv, self.log, **death)

    def result(self) -> dict[str, Any]:
        return results(self.run)

    def torment(self, dice: random.Random, tally: Tally, most: int = MOST_KILLS) -> None:
        """Kill it at random until it is done, and see what came of it."""
        killed, left = 0, most
        while True:
            death: dict[str, Any] = {}
            how = dice.choice(["time", "time", "any", "point", "interrupt"]) if left else ""
            if how in ("time", "interrupt"):
                number = signal.SIGKILL
                if how == "interrupt":
                    number = dice.choice([signal.SIGINT, signal.SIGTERM])
                death = {"after": dice.uniform(0, self.chaos.seconds), "number": number}
            elif how == "any":
                death = {"point": "any", "count": dice.randint(1, 120)}
            elif how == "point":
                death = {"point": dice.choice(POINTS), "count": dice.randint(1, 5)}
            code = self.attempt(**death)
            if code == 0:
                break
            left -= 1
            if code == -signal.SIGKILL:
                killed += 1
                tally.where[death.get("point", "random time")] += 1
            elif code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM):
                tally.interrupts += 1
            else:
                told = self.log.read_text().splitlines()[-30:]
                raise AssertionError("\n".join([f"exit code {code} after {death}", *told]))
            if dice.random() < 0.25:
                tally.damages += damage_something(self.folder, dice)
        tally.runs += 1
        tally.kills += killed
        if self.result() != self.chaos.right:
            tally.different.append(str(self.folder))


def damage_something(folder: Path, dice: random.Random) -> bool:
    """As a power cut may: a file of the cache or the newest checkpoint is not what was written."""
    files = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
    last, previous = folder / "run" / "last.pt", folder / "run" / "previous.pt"
    if last.exists() and previous.exists():
        files.append(last)
    files = [path for path in files if path.name not in ("lock", "CACHEDIR.TAG")]
    if not files:
        return False
    path = dice.choice(files)
    content = bytearray(path.read_bytes())
    if not content:
        return False
    place = dice.randrange(len(content))
    if dice.random() < 0.5:
        content[place] ^= 1 << dice.randrange(8)
    else:
        del content[place:]
    path.unlink()  # best.pt may be the same file
    path.write_bytes(content)
    return True


def results(run: Path) -> dict[str, Any]:
    """All that a run must have in common with one that was never killed."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights_sha256": summary["weights_sha256"],
        "steps": summary["steps"],
        "metrics": [{key: line[key] for key in RESULTS} for line in lines],
    }
