"""Write a run's report.html anew, from what is in its folder: `python scripts/write_report.py RUN`.

Where the same run was measured without the cache, or without freezing, its times are shown too:
`--freezing-only RUN` and `--no-freezing RUN`. Exit code 2: a folder is no such run.
"""

import argparse
import sys
from pathlib import Path

from cachefreeze.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument(
        "--freezing-only", type=Path, metavar="RUN", help="of the same run with --no-cache"
    )
    parser.add_argument(
        "--no-freezing", type=Path, metavar="RUN", help="likewise, with --no-freeze --no-cache"
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
