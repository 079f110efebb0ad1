"""Writes the pictures of a run's report.html to files, for pages that are no HTML.

    python -m cachefreeze.train --arch wrn --t0 0.5 --output-dir runs/pictures
    python scripts/doc_figures.py runs/pictures docs/figures rates frontier seconds predicted

wrote docs/figures. Each picture follows the reader's light or dark theme, with its own background.
"""

import argparse
import re
import sys
from pathlib import Path

from cachefreeze.errors import UserError


def main() -> int:
    """Writes the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("folder", type=Path, help="folder for the pictures")
    parser.add_argument(
        "names", nargs="+", help="names of the pictures: rates, seconds, frontier, and so on"
    )
    args = parser.parse_args()
    try:
        found = pictures(args.run)
        for name in args.names:
            if name not in found:
                raise UserError(f"{args.run} has no picture {name}: it has {', '.join(found)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        path = args.folder / f"{name}.svg"
        path.write_text(found[name])
        print(path)
    return 0


def pictures(run: Path) -> dict[str, str]:
    """Returns the pictures of a run's report by name, each as the text of an SVG file.

    Raises:
        UserError: There is no such run, or the report cannot be drawn.
    """
    from cachefreeze.report.html_report import report  # which may not be had: UserError
    from cachefreeze.report.page import render
    from cachefreeze.report.run_results import RunResults

    page = report(RunResults.load(run), {}).decode()
    style = (
        f"<style>{render('colours.css').decode()}"
        "svg{background:var(--paper);font-family:system-ui,sans-serif}</style>"
    )
    found = {}
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        name = svg.partition('id="')[2].partition("-")[0]
        start = svg.index(">") + 1
        found[name] = f"{svg[:start]}{style}{svg[start:]}\n"
    return found


if __name__ == "__main__":
    sys.exit(main())
