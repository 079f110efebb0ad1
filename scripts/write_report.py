"""Writes report.html of a run anew, from its files: `python scripts/write_report.py RUN`.

With `--freezing-only RUN` and `--no-freezing RUN` it also shows the times of the same training
without the cache, or without freezing. Exit code 2: a folder is no such run.
"""

import argparse
import sys
from pathlib import Path

from cachefreeze.errors import UserError


def main() -> int:
    """Writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--freezing-only",
        type=Path,
        metavar="RUN",
        help="folder of the same training with --no-cache",
    )
    parser.add_argument(
        "--no-freezing",
        type=Path,
        metavar="RUN",
        help="folder of the same training with --no-freeze --no-cache",
    )
    args = parser.parse_args()
    given = {"freezing only": args.freezing_only, "no freezing": args.no_freezing}
    try:
        from cachefreeze.report.html_report import write_report  # which may not be had: UserError

        print(write_report(args.run, {name: run for name, run in given.items() if run is not None}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
