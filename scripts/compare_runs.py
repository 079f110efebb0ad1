"""Runs beside each other: `python scripts/compare_runs.py RUN RUN... [--html FILE]`.

Prints accuracy, time, speed-up against the first run, whether weights are the same (equal letters),
and which settings differ; with --html also draws accuracy against time, in one file. Exit code 2: a
folder holds no run that has come to its end, or is named twice, or the page cannot be drawn or
written.
"""

import argparse
import sys
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.files import write_atomically
from cachefreeze.report.compare import comparison_lines, comparison_page, load_runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    args = parser.parse_args()
    try:
        runs = load_runs(args.runs)
        print("\n".join(comparison_lines(runs)))
        if args.html is not None:
            write(args.html, comparison_page(runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, page: bytes) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from error
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
