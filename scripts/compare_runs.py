"""Compares finished runs: `python scripts/compare_runs.py RUN RUN... [--html FILE]`.

It prints the accuracy, the time, the speed-up against the first run, a letter for the weights
(equal weights have equal letters), and the settings that differ. With --html it also writes a page
with a picture of accuracy against time. Exit code 2: a folder holds no finished run, or is named
twice, or the page cannot be drawn or written.
"""

import argparse
import sys
from pathlib import Path

from cachefreeze.errors import UserError
from cachefreeze.report.compare import comparison_lines, comparison_page, load_runs
from cachefreeze.store.files import write_atomically


def main() -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
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
    """Writes the page.

    Raises:
        UserError: The page cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another") from error
    print(f"\n{path}")


if __name__ == "__main__":
    sys.exit(main())
