"""Draws the picture of docs/frontier.md, and writes the page's tables.

    python scripts/frontier_page.py docs/figures/worth.jsonl docs

The results are those of `scripts/frontier.py`. What stands in the page between the lines
`<!-- answer -->` and `<!-- end of answer -->` is replaced, and so are the tables.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doc_figures import STYLE

# Colours and shapes: blue and round is cubic, orange and square is linear, hollow is not scaled.
MARKS = """<style>
.plain{stroke:#475569;fill:none;stroke-width:2}.dot{fill:#475569}
.cubic{stroke:#2563eb}.linear{stroke:#c2410c}.path{fill:none;stroke-width:1;stroke-dasharray:3 3}
.bar{stroke-width:1.5}.cubic.full{fill:#2563eb}.linear.full{fill:#c2410c}.hollow{fill:#fff}
.mark{stroke-width:2}
@media (prefers-color-scheme:dark){
.plain{stroke:#cbd5e1}.dot{fill:#cbd5e1}.cubic{stroke:#60a5fa}.linear{stroke:#fb923c}
.cubic.full{fill:#60a5fa}.linear.full{fill:#fb923c}.hollow{fill:#0f172a}}
</style>"""
FAMILIES = (("cubic", True), ("cubic", False), ("linear", True), ("linear", False))
WIDTH, LEFT, RIGHT = 440, 52, 424

PARTS = (("scratch", "From scratch"), ("fine-tuning", "Fine-tuning"))

Run = dict[str, Any]


@dataclass
class Point:
    """A setting with the runs of all seeds.

    Attributes:
        epochs: Number of epochs.
        runs: One run a seed.
        seconds: Seconds of the fastest run that did the same work.
        plain: Error of plain training of the same seconds, for the seeds of which there is one.
        limit: The same for the seconds that are predicted with a cache that takes no time.
        t0: The setting; None if nothing freezes.
        schedule: Its schedule.
        scaled: Whether rates are scaled.
    """

    epochs: int
    runs: list[Run]
    seconds: float
    plain: dict[int, float]
    limit: dict[int, float]
    t0: float | None = None
    schedule: str = ""
    scaled: bool = False

    @property
    def errors(self) -> list[float]:
        return [100 * run["error"] for run in self.runs]

    @property
    def differences(self) -> list[float]:
        """Points of error above plain training of the same seconds, by seed."""
        return self._above(self.plain)

    @property
    def differences_at_limit(self) -> list[float]:
        """The same, if the cache took no time."""
        return self._above(self.limit)

    def _above(self, plain: dict[int, float]) -> list[float]:
        known = [run for run in self.runs if run["seed"] in plain]
        return [100 * (run["error"] - plain[run["seed"]]) for run in known]

    def predicted(self, way: str) -> list[float]:
        """Returns the predicted share of the time without freezing that a way takes, by run."""
        known = [run["forecast"] for run in self.runs if run["forecast"]]
        return [one[way] / one["without_freezing"] for one in known]

    @property
    def words(self) -> str:
        return f"{self.t0} {self.schedule}, {'scaled' if self.scaled else 'not scaled'}"


def least_seconds(runs: Iterable[Run]) -> float:
    """Returns the seconds of the fastest of some runs that do the same work.

    So do all seeds, whether rates are scaled or not. Other processes only add to their time.
    """
    return float(min(run["seconds"] for run in runs))


def points(lines: Iterable[Run], part: str) -> tuple[list[Point], list[Point]]:
    """Returns plain training by its length, and the settings that freeze layers.

    Args:
        lines: Results.
        part: Part of the study: `scratch` or `fine-tuning`.
    """
    here = [line for line in lines if line["part"] == part and line["error"] is not None]
    plain: dict[int, list[Run]] = {}
    freezing: dict[tuple[float, str, bool], list[Run]] = {}
    for line in here:
        if line["way"] == "plain":
            plain.setdefault(line["epochs"], []).append(line)
        else:
            key = (line["t0"], line["schedule"], line["scale_lr"])
            freezing.setdefault(key, []).append(line)
    order = {family: place for place, family in enumerate(FAMILIES)}
    found = []
    for key, runs in sorted(freezing.items(), key=lambda one: (order[one[0][1:]], one[0][0])):
        work = [freezing[one] for one in freezing if one[:2] == key[:2]]
        seconds = least_seconds(itertools.chain(*work))
        same = {run["seed"]: at(seconds, run["seed"], here) for run in runs}
        limit = {run["seed"]: at(_limit(run, here), run["seed"], here) for run in runs}
        found.append(Point(runs[0]["epochs"], runs, seconds, _known(same), _known(limit), *key))
    lengths = sorted(plain.items())
    return [Point(epochs, runs, least_seconds(runs), {}, {}) for epochs, runs in lengths], found


def _known(errors: dict[int, float | None]) -> dict[int, float]:
    return {seed: error for seed, error in errors.items() if error is not None}


def _limit(run: Run, lines: list[Run]) -> float:
    """Returns the seconds that a run would take if the cache took no time."""
    if not run["forecast"]:
        return float(run["seconds"])
    same = [one for one in lines if one["way"] == "plain" and one["epochs"] == run["epochs"]]
    share = run["forecast"]["limit"] / run["forecast"]["without_freezing"]
    return float(share * least_seconds(same))


def at(seconds: float, seed: int, lines: Iterable[Run]) -> float | None:
    """Returns the error of plain training of some seconds, with the same seed.

    It is on the straight line between the next shorter and the next longer plain run, and the
    error of the longest one if there are even more seconds. Seconds of a length are the least of
    all seeds. None if all plain runs are longer.
    """
    plain = [line for line in lines if line["way"] == "plain"]
    curve = sorted(
        (least_seconds(one for one in plain if one["epochs"] == line["epochs"]), line["error"])
        for line in plain
        if line["seed"] == seed
    )
    for (start, before), (end, after) in itertools.pairwise(curve):
        if start <= seconds <= end:
            return float(before + (after - before) * (seconds - start) / (end - start))
    return float(curve[-1][1]) if curve and seconds > curve[-1][0] else None


def spread(values: list[float], sign: str = "") -> str:
    """Returns the mean of some numbers, with the least and the greatest if there are several."""
    text = f"{statistics.mean(values):{sign}.1f}"
    if len(values) > 1:
        text += f" ({min(values):{sign}.1f} to {max(values):{sign}.1f})"
    return text


def tables(lines: list[Run]) -> str:
    """Returns the tables as Markdown."""
    text = []
    for part, title in PARTS:
        plain, freezing = points(lines, part)
        if not plain:
            continue
        text += [f"**{title}**", ""]
        text += ["| plain training | n | seconds | error, % |", "|---|---|---|---|"]
        text += [
            f"| {_epochs(one)} | {len(one.runs)} | {one.seconds:.0f} | {spread(one.errors)} |"
            for one in plain
        ]
        longest = plain[-1]
        text += [
            "",
            f"| t0 and schedule, {longest.epochs} epochs | n | seconds | time saved "
            "| predicted: without the cache, and if it took no time | error, % "
            "| plain training of the same seconds, % | difference in points "
            "| difference if the cache took no time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        text += [_row(one, longest) for one in freezing]
        text.append("")
    stopped = [line for line in lines if line["error"] is None]
    if stopped:
        text += [f"In {len(stopped)} runs the weights became infinite; they are left out.", ""]
    return "\n".join(text)


def _epochs(one: Point) -> str:
    return "1 epoch" if one.epochs == 1 else f"{one.epochs} epochs"


def _row(one: Point, longest: Point) -> str:
    alone, limit = one.predicted("freezing_only"), one.predicted("limit")
    same = [100 * error for error in one.plain.values()]
    cells = [
        one.words,
        str(len(one.runs)),
        f"{one.seconds:.0f}",
        f"{1 - one.seconds / longest.seconds:.0%}",
        f"{1 - statistics.mean(alone):.0%}, {1 - statistics.mean(limit):.0%}" if alone else "",
        spread(one.errors),
        f"{statistics.mean(same):.1f}" if same else "",
        spread(one.differences, "+") if same else "",
        spread(one.differences_at_limit, "+") if one.limit else "",
    ]
    return f"| {' | '.join(cells)} |"


def answer(lines: list[Run]) -> str:
    """Returns what the results say, as Markdown."""
    text = []
    for part, title in PARTS:
        _, freezing = points(lines, part)
        known = [one for one in freezing if one.differences]
        if known:
            text += [f"**{title}: {_headline(known)}** {_details(known)}", ""]
    return "\n".join(text)


def _headline(known: list[Point]) -> str:
    means = [statistics.mean(one.differences) for one in known]
    better = sum(mean < 0 for mean in means)
    which = {0: "no setting", len(known): "all settings"}.get(
        better, f"{better} of {len(known)} settings"
    )
    return (
        f"{which} of FreezeOut with the cache had less error than plain training of the same time."
    )


def _details(known: list[Point]) -> str:
    always = sum(max(one.differences) < 0 for one in known)
    never = sum(min(one.differences) > 0 for one in known)
    means = sorted((statistics.mean(one.differences), one.words) for one in known)
    seeds = sorted({len(one.runs) for one in known})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = (
        f"({len(known)} settings, means of the seeds, n = {n}; with every seed {always} had less "
        f"error and {never} had more.) The difference goes from {means[0][0]:+.1f} points of error "
        f"({means[0][1]}) to {means[-1][0]:+.1f} ({means[-1][1]})."
    )
    limits = [statistics.mean(one.differences_at_limit) for one in known if one.limit]
    if limits:
        text += (
            f" If the cache took no time, {sum(mean < 0 for mean in limits)} of {len(limits)} "
            f"would have had less error ({min(limits):+.1f} to {max(limits):+.1f})."
        )
    return text


def picture(lines: list[Run]) -> str:
    """Draws error against seconds, from scratch and for fine-tuning; returns an SVG file."""
    parts = [(title, *points(lines, part)) for part, title in PARTS]
    parts = [one for one in parts if one[1]]
    clock = "processor seconds" if lines[0]["device"] == "cpu" else "seconds"
    body, y = [], 8
    for title, plain, freezing in parts:
        height = 270 if title == "From scratch" else 190
        body += _panel(title, plain, freezing, y, height, clock)
        y += height + 62
    body += _legend(y)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 84}" '
        f'width="{WIDTH * 1.2:.0f}" role="img">',
        "<title>Error against time: plain training, and FreezeOut with the cache"
        "</title>",
        STYLE, MARKS, *body, "</svg>", "",
    ])  # fmt: skip


def _panel(
    title: str, plain: list[Point], freezing: list[Point], top: int, height: int, clock: str
) -> list[str]:
    every = [error for one in (*plain, *freezing) for error in one.errors]
    low, high = min(every), max(every)
    step = next(step for step in (1, 2, 5, 10, 20, 100) if (high - low) / step <= 6)
    low, high = step * (low // step), step * (high // step + 1)
    last = max(one.seconds for one in (*plain, *freezing))
    unit = next(unit for unit in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 1e9) if last / unit <= 6)
    bottom = top + height

    def across(seconds: float) -> float:
        return LEFT + (RIGHT - LEFT) * seconds / (1.04 * last)

    def up(error: float) -> float:
        return bottom - (height - 26) * (error - low) / (high - low)

    seeds = sorted({len(one.runs) for one in (*plain, *freezing)})
    n = f"n = {seeds[0]}" if len(seeds) == 1 else f"n = {seeds[0]} to {seeds[-1]}"
    lines = [f'<text x="{LEFT}" y="{top + 12}">{title}: error ({n})</text>']
    for tick in range(int((high - low) / step) + 1):
        y = up(low + tick * step)
        lines.append(f'<path d="M{LEFT},{y:.1f} H{RIGHT}" class="line" stroke-opacity="0.25"/>')
        lines.append(
            f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end" class="small">'
            f"{low + tick * step:.0f} %</text>"
        )
    for tick in range(int(1.04 * last / unit) + 1):
        lines.append(
            f'<text x="{across(tick * unit):.1f}" y="{bottom + 18}" text-anchor="middle" '
            f'class="small">{tick * unit:g}</text>'
        )
    lines.append(
        f'<text x="{RIGHT}" y="{bottom + 36}" text-anchor="end" class="small">'
        f"{clock} of training</text>"
    )

    def mean(one: Point) -> tuple[float, float]:
        return across(one.seconds), up(statistics.mean(one.errors))

    def path(some: list[Point], kind: str) -> str:
        places = " L".join(f"{x:.1f},{y:.1f}" for x, y in map(mean, some))
        return f'<path d="M{places}" class="{kind}"/>'

    def bar(one: Point, kind: str) -> str:
        x, (least, most) = across(one.seconds), (min(one.errors), max(one.errors))
        return f'<path d="M{x:.1f},{up(most):.1f} V{up(least):.1f}" class="{kind}"/>'

    for schedule, scaled in FAMILIES:
        family = [one for one in freezing if (one.schedule, one.scaled) == (schedule, scaled)]
        if family:
            lines.append(path(family, f"path {schedule}"))
        for one in family:
            lines.append(bar(one, f"bar {schedule}"))
            lines.append(_mark(*mean(one), schedule, scaled))
    lines.append(path(plain, "plain"))
    for one in plain:
        x, y = mean(one)
        lines.append(bar(one, "plain"))
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot"/>')
    return lines


def _mark(x: float, y: float, schedule: str, scaled: bool) -> str:
    kind = f"mark {schedule} {'full' if scaled else 'hollow'}"
    if schedule == "cubic":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}"/>'
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" class="{kind}"/>'


def _legend(top: int) -> list[str]:
    lines = [
        f'<path d="M{LEFT - 8},{top + 4} h24" class="plain"/>',
        f'<circle cx="{LEFT + 4}" cy="{top + 4}" r="3.5" class="dot"/>',
        f'<text x="{LEFT + 24}" y="{top + 9}" class="small">plain training of several lengths'
        "</text>",
    ]
    for place, (schedule, scaled) in enumerate(FAMILIES):
        x, y = LEFT + 4 + 190 * (place % 2), top + 26 + 22 * (place // 2)
        text = f"{schedule}, {'scaled' if scaled else 'not scaled'}"
        lines.append(_mark(x, y, schedule, scaled))
        lines.append(f'<text x="{x + 20}" y="{y + 5}" class="small">{text}</text>')
    lines.append(
        f'<text x="{LEFT - 8}" y="{top + 75}" class="small">'
        "marks: means of the seeds; bars: least to greatest</text>"
    )
    return lines


def main() -> int:
    """Draws and writes; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results of frontier.py")
    parser.add_argument("docs", type=Path, help="folder with frontier.md and figures/")
    args = parser.parse_args()
    page = args.docs / "frontier.md"
    text = page.read_text()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    for name, written in (("answer", answer(lines)), ("tables", tables(lines))):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        if begin not in text or end not in text:
            print(f"error: {page} has no lines {begin.strip()}, {end.strip()}", file=sys.stderr)
            return 2
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{written}\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
    path = args.docs / "figures" / "worth.svg"
    path.write_text(picture(lines))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
