"""Draws the pictures of the documentation.

    python scripts/benchmark_finetune.py --plain --blocks 0 --images 1280 --processor --json FILE
    python scripts/doc_figures.py idea FILE docs/figures
    python scripts/views_curve.py CIFAR10 --results docs/figures/views.jsonl
    python scripts/doc_figures.py views docs/figures/views.jsonl docs/figures
    python -m cachefreeze.train --arch wrn --t0 0.5 --output-dir runs/pictures
    python scripts/doc_figures.py run runs/pictures docs/figures rates frontier seconds predicted

wrote docs/figures, but for lineage.svg, which is drawn by hand. Each picture follows the reader's
light or dark theme, with its own background.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cachefreeze.errors import UserError

# Ways of `benchmark_finetune.py --plain --blocks 0`, and their names in the picture.
WAYS = {
    "0 blocks, plain": "without the cache",
    "0 blocks, first": "first run with it",
    "0 blocks, second": "second run with it",
}
STYLE = """<style>
svg{background:#fff;font-family:system-ui,sans-serif}
text{fill:#0f172a;font-size:14px}.small{fill:#475569;font-size:12.5px}
.frozen{fill:#93c5fd}.kept{fill:#bbf7d0}.trained{fill:#fdba74}.start{fill:#cbd5e1}
.box{stroke:#475569}.gone{fill:none;stroke:#475569;stroke-dasharray:5 4}
.line{stroke:#475569;fill:none}.head{fill:#475569}
@media (prefers-color-scheme:dark){
svg{background:#0f172a}text{fill:#f1f5f9}.small{fill:#cbd5e1}
.frozen{fill:#1d4ed8}.kept{fill:#166534}.trained{fill:#c2410c}.start{fill:#475569}
.box,.gone,.line{stroke:#cbd5e1}.head{fill:#cbd5e1}}
</style>"""


def main() -> int:
    """Draws what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_idea = kinds.add_parser("idea", help="picture of the README")
    of_idea.add_argument("measured", type=Path, help="file of benchmark_finetune.py --json")
    of_idea.add_argument("folder", type=Path, help="folder for the picture")
    of_views = kinds.add_parser("views", help="picture of accuracy by the number of views")
    of_views.add_argument("measured", type=Path, help="results of views_curve.py")
    of_views.add_argument("folder", type=Path, help="folder for the picture")
    of_run = kinds.add_parser("run", help="pictures of a run's report.html")
    of_run.add_argument("run", type=Path, help="folder of a run")
    of_run.add_argument("folder", type=Path, help="folder for the pictures")
    of_run.add_argument(
        "names", nargs="+", help="names of the pictures: rates, seconds, frontier, and so on"
    )
    args = parser.parse_args()
    try:
        if args.kind == "idea":
            chosen = {"idea": idea(json.loads(args.measured.read_text()))}
        elif args.kind == "views":
            lines = args.measured.read_text().splitlines()
            chosen = {"views": views([json.loads(line) for line in lines])}
        else:
            found = pictures(args.run)
            for name in args.names:
                if name not in found:
                    raise UserError(f"{args.run} has no picture {name}: it has {', '.join(found)}")
            chosen = {name: found[name] for name in args.names}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, picture in chosen.items():
        path = args.folder / f"{name}.svg"
        path.write_text(picture)
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


def idea(measured: dict[str, Any]) -> str:
    """Draws what the cache leaves out, and how long each epoch takes with it and without.

    Args:
        measured: Contents of the file of `benchmark_finetune.py --plain --blocks 0 --json`.

    Returns:
        Text of an SVG file. Seconds are medians of the runs.
    """
    totals = {way: statistics.median(run["of_processor"] for run in measured[way]) for way in WAYS}
    scale = 510 / totals["0 blocks, plain"]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 322" role="img">',
        "<title>Frozen work runs once; later epochs and runs take kept rows in its place</title>",
        STYLE,
        *_pass("epoch 1", 14, runs=True),
        *_pass("then", 74, runs=False),
        f'<text x="14" y="164" class="small">{_caption(measured)}</text>',
    ]
    for place, (way, name) in enumerate(WAYS.items()):
        y = 184 + 40 * place
        lines.append(f'<text x="14" y="{y + 19}">{name}</text>')
        epochs = [
            statistics.median(epoch)
            for epoch in zip(*(run["epochs"] for run in measured[way]), strict=True)
        ]
        x = 150.0
        for number, took in enumerate([totals[way] - sum(epochs), *epochs]):
            width = took * scale
            kind = "start" if number == 0 else "frozen" if took > 1 else "trained"
            gap = 1.0 if width > 3 else 0.0
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width - gap, 0.5):.1f}" height="26" '
                f'class="{kind}"/>'
            )
            x += width
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 19}">{totals[way]:.0f} s</text>')
    lines.append(
        '<text x="14" y="312" class="small">grey: start of Python and torch; blue: epochs of more '
        "than a second, most of it frozen work; orange: shorter ones</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def _pass(name: str, y: int, runs: bool) -> Iterator[str]:
    """Yields the boxes of a forward pass in which frozen work runs, or is left out."""
    boxes = [("batch", 100, 80, "start box"), ("frozen layers", 220, 150, "frozen box")]
    boxes += [("kept rows", 410, 120, "kept box"), ("trained layers", 570, 150, "trained box")]
    yield f'<text x="14" y="{y + 28}">{name}</text>'
    for text, x, width, kind in boxes:
        if not runs and text == "frozen layers":
            text, kind = "left out", "gone"
        yield f'<rect x="{x}" y="{y}" width="{width}" height="44" rx="5" class="{kind}"/>'
        yield f'<text x="{x + width / 2:.0f}" y="{y + 27}" text-anchor="middle">{text}</text>'
    ends = [(180, 220), (370, 410), (530, 570)] if runs else [(530, 570)]
    for start, end in ends:
        yield f'<path d="M{start},{y + 22} H{end - 7}" class="line"/>'
        yield f'<path d="M{end - 8},{y + 17} L{end},{y + 22} L{end - 8},{y + 27} z" class="head"/>'
    if not runs:  # the batch is only looked up
        yield f'<path d="M140,{y + 44} v8 H470 v-2" class="line"/>'
        yield f'<path d="M465,{y + 52} L470,{y + 44} L475,{y + 52} z" class="head"/>'


def views(runs: list[dict[str, Any]]) -> str:
    """Draws accuracy by the number of views.

    Args:
        runs: Lines of the results of `views_curve.py`.

    Returns:
        Text of an SVG file: means over the seeds with their standard errors, and each run.
    """
    by: dict[str, list[float]] = {}
    for run in runs:
        by.setdefault(str(run["views"]), []).append(100 * run["accuracy"])
    every = [one for some in by.values() for one in some]
    low, high = math.floor(min(every)), math.ceil(max(every))

    def height(accuracy: float) -> float:
        return 266 - 240 * (accuracy - low) / (high - low)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 322" role="img">',
        "<title>Accuracy on test images rises with the number of views of each image</title>",
        STYLE,
    ]
    for accuracy in range(low, high + 1, 2):
        y = height(accuracy)
        lines.append(f'<path d="M60,{y:.1f} H740" class="line" stroke-opacity="0.25"/>')
        lines.append(f'<text x="50" y="{y + 5:.1f}" text-anchor="end">{accuracy} %</text>')
    for place, (name, found) in enumerate(by.items()):
        x, mean = 110 + 84 * place, statistics.mean(found)
        error = statistics.stdev(found) / len(found) ** 0.5
        lines += [
            f'<circle cx="{x + 12}" cy="{height(one):.1f}" r="2.5" class="start"/>' for one in found
        ]
        top, bottom = height(mean + error), height(mean - error)
        lines.append(f'<path d="M{x},{top:.1f} V{bottom:.1f}" class="line" stroke-width="2"/>')
        lines.append(f'<circle cx="{x}" cy="{height(mean):.1f}" r="6" class="frozen box"/>')
        lines.append(f'<text x="{x}" y="290" text-anchor="middle">{name}</text>')
    count = min(map(len, by.values()))
    lines.append(
        '<text x="60" y="314" class="small">views of each image; large: means, with standard '
        f"errors; small: each of {count} seeds</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def _caption(measured: dict[str, Any]) -> str:
    epochs = len(measured["0 blocks, plain"][0]["epochs"])
    runs = len(measured["0 blocks, plain"])
    return (
        "Processor seconds of a whole run: new head on a frozen ResNet-18, 1,280 images, "
        f"{epochs} epochs, medians of {runs}"
    )


if __name__ == "__main__":
    sys.exit(main())
