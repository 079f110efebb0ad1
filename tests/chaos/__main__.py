"""Kills runs of the paper's three networks, and compares them: `python -m tests.chaos [KILLS]`.

Prints a line for each network, and exits with 1 if any run ended with other weights or metrics than
one that was never killed.
"""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.conftest import write_images

from .harness import NETWORKS, Chaos, Nursery, Tally, Victim


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=200, help="at least (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    args = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, Nursery() as nursery:
        folder = Path(name)
        write_images(folder / "images" / "train", 50, seed=1)
        write_images(folder / "images" / "val", 11, seed=2)
        for network in args.networks:
            dice = random.Random(f"{args.seed} {network}")
            chaos = Chaos(nursery, network, folder / "images", folder)
            tally = Tally()
            while tally.kills < -(-args.kills // len(args.networks)):
                options = ["-j", dice.choice(["0", "0", "1"])]
                options += ["--cache-codec", dice.choice(["raw", "zstd"])]
                every = dice.choice([None, 1, 3])
                if every is not None:
                    options += ["--checkpoint-every", str(every)]
                victim = Victim(chaos, f"run{tally.runs}", *options)
                victim.torment(dice, tally)
                if str(victim.folder) not in tally.different:
                    shutil.rmtree(victim.folder)
                print(f"\r{network}: {tally.kills} kills", end="", file=sys.stderr, flush=True)
            print("\r", end="", file=sys.stderr)
            where = ", ".join(f"{name} {count}" for name, count in tally.where.most_common())
            print(
                f"{network}: {tally.runs} runs, {tally.kills} kills, "
                f"{tally.interrupts} interrupts, {tally.damages} files damaged in between; "
                f"{len(tally.different)} runs ended differently\n  killed at: {where}",
                flush=True,
            )
            different += len(tally.different)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
