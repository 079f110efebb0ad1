"""Shows in a minute what the cache is for: `make demo`.

    python scripts/demo.py

It trains a small network by FreezeOut on scikit-learn's handwritten digits. Then it trains the head
of that network further, twice: the second time no frozen layer is computed.
"""

import argparse
import json
import shlex
import sys
from datetime import datetime
from pathlib import Path

from cachefreeze.train import main as train
from cachefreeze.training.terminal import this_python

HEAD = "--freeze-first -1 --no-report"


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description="Show what the cache is for.")
    parser.add_argument("--epochs", type=int, default=6, help="number of epochs of each run")
    epochs = parser.parse_args(argv).epochs
    runs = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    best = f"--weights {runs / 'freezeout' / 'best.pt'}"
    seconds = {}
    for name, what, options in (
        ("freezeout", "Train from scratch. Layers freeze one by one.", "--t0 0.5"),
        ("head", "Train the last layer of that network only.", f"{best} {HEAD}"),
        ("again", "Once more, with another learning rate.", f"{best} {HEAD} --lr 0.1"),
    ):
        # The rows of the first run would serve the second.
        cache = runs / ("cache-freezeout" if name == "freezeout" else "cache-head")
        command = f"--arch wrn16_1 --epochs {epochs} {options}"
        command += f" --cache-dir {cache} --output-dir {runs / name}"
        print(f"\n{what}\n$ {this_python()} -m cachefreeze.train {command}\n", flush=True)
        code = train(shlex.split(command))
        if code:
            return code
        summary = json.loads((runs / name / "summary.json").read_text())
        seconds[name] = summary["train_seconds"] + summary["validate_seconds"]
    first, second = seconds["head"], seconds["again"]
    print(f"\nThe last layer took {first:.1f} s to train and validate, and {second:.1f} s with the")
    print("other rate: its frozen layers came from the cache from the first epoch on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
