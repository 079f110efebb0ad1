"""The pictures of a run, drawn from numbers as SVG text.

This module needs matplotlib. Without it, the import raises a UserError.

A picture is 360 units wide, with text of size 10, so that it can be read on a phone. Colours are
CSS variables, so that a page can be light or dark. One thing has one colour in every picture. The
colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.report.time_breakdown import Way
from cachefreeze.store.files import human_bytes

try:
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
except ModuleNotFoundError as missing:
    raise UserError("reports need matplotlib: pip install matplotlib") from missing


# Name: on a light page, on a dark one.
COLOURS = {
    "ink": ("#1f2933", "#e6e9ec"),
    "muted": ("#5b6773", "#a3adb8"),
    "grid": ("#dde2e7", "#333c46"),
    "paper": ("#ffffff", "#161b21"),
    "training": ("#0072b2", "#3d9fdb"),
    "frozen": ("#e69f00", "#f0b030"),
    "cache": ("#009e73", "#1fbf92"),
    "filling": ("#d55e00", "#ee7a22"),
    "validation": ("#9aa5b1", "#6b7784"),
    "other": ("#b0578d", "#dd8fbc"),
}
# Looks by which runs are told apart: colours, and where they repeat, dashes and markers.
SERIES = ("training", "filling", "cache", "other", "frozen", "muted")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv*"
# What seconds are spent on, from the bottom of a bar to its top; each has a colour of its name.
PARTS = ("training", "filling", "validation")

WIDTH, TEXT, POINTS = 360, 10, 72
# Losses that differ by more than this factor would all lie at the bottom of a plain axis.
LOG_FROM = 20
# Rows of names that stand below each other without touching.
MOST_NAMES = 24

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be read out and searched
    "svg.hashsalt": "cachefreeze",  # the same file from the same numbers
    "text.parse_math": False,  # names are no formulas
    **dict.fromkeys(
        ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"),
        TEXT,
    ),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["muted"][0]),
    **dict.fromkeys(
        ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"),
        COLOURS["ink"][0],
    ),
    "grid.color": COLOURS["grid"][0],
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def rates(
    curves: Sequence[Sequence[tuple[float, float]]],
    names: Sequence[str],
    freezes: Sequence[float | None],
    end: float,
) -> str:
    """Draws the learning rate of every unit over time: a row for each, with a dot where it freezes.

    Each row is scaled to its highest rate, which is written at the end of the row.

    Args:
        curves: Pairs of time, in epochs, and rate for every unit, in order of time.
        names: Names of the units.
        freezes: Time at which each unit freezes, in epochs. None for a unit that never does.
        end: Length of the run, in epochs.
    """
    units = len(names)
    row = 20 if units <= MOST_NAMES else 10
    highest = [max(rate for _, rate in curve) for curve in curves]
    with _drawing(60 + row * units) as figure:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for number, (curve, freeze) in enumerate(zip(curves, freezes, strict=True)):
            base = number + 0.9
            axes.plot([0, end], [base, base], color=_c("grid"), linewidth=0.8)
            if highest[number] > 0:
                x = [time for time, _ in curve]
                heights = [base - 0.75 * rate / highest[number] for _, rate in curve]
                outline = ([x[0], *x, x[-1]], [base, *heights, base])
                axes.fill(*outline, **_look("training", f"rate-{number}", "rate"))
            if freeze is not None:
                look = _look("filling", f"freeze-{number}", "frozen from here on")
                axes.plot(freeze, base, "o", clip_on=False, **look)
        shown = range(0, units, _every(units))
        places = [number + 0.6 for number in shown]
        axes.set_yticks(places, [names[number] for number in shown])
        right = axes.twinx()
        right.set_yticks(places, [f"{highest[number]:.3g}" for number in shown])
        for each in (axes, right):
            each.tick_params(axis="y", length=0)
            each.spines["left"].set_visible(False)
            each.set_ylim(units, 0)
        right.grid(visible=False)
        _epochs(axes, end)
        _legend(figure)
        return _svg(figure, "rates")


def seconds(parts: Mapping[str, Sequence[float]]) -> str:
    """Draws the seconds of every epoch as a stacked bar.

    Args:
        parts: Seconds in every epoch, for each of `PARTS`.
    """
    names = [name for name in PARTS if any(parts[name])]
    with _drawing(230) as figure:
        axes = figure.subplots()
        below = [0.0] * len(parts[PARTS[0]])
        for name in names:
            top = [low + high for low, high in zip(below, parts[name], strict=True)]
            _bars(axes, top, name, name, below)
            below = top
        axes.set_ylabel("seconds")
        axes.set_ylim(0, max(below) * 1.03 or 1)
        _legend(figure)
        return _svg(figure, "seconds")


def frontier(freezes: Sequence[float], units: int, served: Sequence[float]) -> str:
    """Draws how many units are frozen, and below it the share of rows that come from the cache.

    Args:
        freezes: Times in epochs at which one more unit freezes, in order.
        units: Number of units of the network.
        served: Share of rows that came from the cache in every epoch, from 0 to 1.
    """
    end = len(served)
    times = [0.0, *freezes, float(end)]
    frozen = [*range(len(freezes) + 1), len(freezes)]
    with _drawing(300) as figure:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        for low, high, name in ((0, frozen, "frozen"), (frozen, units, "training")):
            look = _look(name, name, name)
            upper.fill_between(times, low, high, step="post", linewidth=0, **look)
        upper.set_ylim(0, units)
        upper.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        upper.set_ylabel("units")
        look = _look("cache", "served", "from the cache")
        lower.stairs(served, range(end + 1), fill=True, **look)
        lower.set_ylim(0, 1)
        lower.yaxis.set_major_formatter(PercentFormatter(1.0))
        lower.set_ylabel("rows")
        upper.grid(visible=False)
        _epochs(lower, end)
        _legend(figure)
        return _svg(figure, "frontier")


def learning(
    train_loss: Sequence[float], val_loss: Sequence[float], accuracy: Sequence[float]
) -> str:
    """Draws the accuracy, and below it the losses, at the end of every epoch."""
    epochs = range(1, len(accuracy) + 1)
    few = len(accuracy) <= 30
    with _drawing(330) as figure:
        upper, lower = figure.subplots(2, sharex=True)
        best = max(range(len(accuracy)), key=accuracy.__getitem__)
        upper.plot(epochs, accuracy, "-o" if few else "-", **_look("training", "accuracy"))
        star = _look("filling", "best", "best epoch") | {"markersize": 11, "zorder": 3}
        upper.plot(epochs[best], accuracy[best], "*", clip_on=False, **star)
        upper.yaxis.set_major_formatter(PercentFormatter(1.0))
        upper.set_ylabel("accuracy")
        for name, values, colour, how in (
            ("training", train_loss, "ink", "--s"),
            ("validation", val_loss, "training", "-o"),
        ):
            look = _look(colour, f"loss-{name}", name)
            lower.plot(epochs, values, how if few else how[:-1], **look)
        smallest, largest = (each([*train_loss, *val_loss]) for each in (min, max))
        if smallest > 0 and largest > LOG_FROM * smallest:
            lower.set_yscale("log")
            lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            lower.yaxis.set_minor_formatter(NullFormatter())
        else:
            lower.set_ylim(bottom=0)
        lower.set_ylabel("loss")
        _epoch_numbers(lower, len(accuracy))
        _legend(figure)
        return _svg(figure, "learning")


def kept(sizes: Sequence[float]) -> str:
    """Draws the bytes that the cache keeps at the end of every epoch."""
    with _drawing(180) as figure:
        axes = figure.subplots()
        _bars(axes, sizes, "cache", "bytes")
        axes.set_ylim(0, 1.1 * max(sizes))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
        return _svg(figure, "kept")


def predicted(ways: Sequence[Way]) -> str:
    """Draws a pair of bars for each way to train. The bar of an estimated time is hollow."""
    with _drawing(75 + 30 * len(ways)) as figure:
        axes = figure.subplots()
        for number, way in enumerate(ways):
            if way.predicted is not None:
                look = _look("muted", f"{number}-predicted", "predicted")
                axes.barh(number, way.predicted, height=0.36, **look)
            if way.known != "predicted":
                look = _look("training", f"{number}-{way.known}", way.known)
                look |= {"fill": way.known == "measured", "edgecolor": _c("training")}
                axes.barh(number + 0.38, way.seconds, height=0.36, **look)
        axes.set_yticks([n + 0.19 for n in range(len(ways))], [way.name for way in ways])
        axes.set_ylim(len(ways) - 0.3, -0.3)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("time of the run, seconds")
        _legend(figure)
        return _svg(figure, "predicted")


def accuracy_against_time(runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Draws accuracy against time, with a line for each run.

    Args:
        runs: Name of each run, seconds from its start to the end of every epoch, and the accuracy
            at the end of every epoch.
    """
    with _drawing(240 + 14 * len(runs)) as figure:
        axes, lines = figure.subplots(), []
        for number, (_, times, values) in enumerate(runs):
            look = _look(SERIES[number % len(SERIES)], f"run-{number}")
            how = DASHES[number // 2 % len(DASHES)] + MARKERS[number % len(MARKERS)]
            lines += axes.plot(times, values, how, markevery=max(len(values) // 12, 1), **look)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("validation accuracy")
        axes.set_xlabel("seconds of training, filling and validation")
        axes.set_xlim(left=0)
        # Given one by one: labels that begin with an underscore are passed over otherwise.
        figure.legend(lines, [name for name, *_ in runs], loc="outside upper left")
        return _svg(figure, "accuracy")


def score_by_rate(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], score: str) -> str:
    """Draws a score over learning rates, with a line for each kind of head.

    Args:
        curves: Name of each kind, and its learning rates with the scores.
        score: Name of the score.
    """
    with _drawing(240 + 14 * len(curves)) as figure:
        axes, lines = figure.subplots(), []
        for number, (_, points) in enumerate(curves):
            look = _look(SERIES[number % len(SERIES)], f"heads-{number}")
            how = DASHES[number // 2 % len(DASHES)] + MARKERS[number % len(MARKERS)]
            lines += axes.plot(*zip(*sorted(points), strict=True), how, **look)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel(score)
        axes.set_xlabel("learning rate for a batch of 256")
        figure.legend(lines, [name for name, _ in curves], loc="outside upper left")
        return _svg(figure, "heads")


def _bars(
    axes: Axes, tops: Sequence[float], colour: str, name: str, below: Sequence[float] | None = None
) -> None:
    """Draws a bar for every epoch, from `below` (the axis if None) to its top."""
    edges = [number + 0.5 for number in range(len(tops) + 1)]
    baseline = [0.0] * len(tops) if below is None else below
    axes.stairs(tops, edges, baseline=baseline, fill=True, **_look(colour, name, name))
    axes.grid(visible=False, axis="x")
    _epoch_numbers(axes, len(tops))


def _look(colour: str, name: str, label: str | None = None) -> dict[str, Any]:
    """Returns matplotlib's arguments for the colour, the id, and the label in the legend."""
    return {"color": _c(colour), "gid": name, "label": label}


def _c(name: str) -> str:
    return COLOURS[name][0]


@contextmanager
def _drawing(height: float) -> Iterator[Figure]:
    """Yields a figure of this height in our own style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure((WIDTH / POINTS, height / POINTS), dpi=POINTS, layout="constrained")


def _epochs(axes: Axes, end: float) -> None:
    """Sets the axis for time, from left to right."""
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=end >= 2))
    axes.set_xlabel("epochs")


def _epoch_numbers(axes: Axes, epochs: int) -> None:
    """Sets the axis for whole epochs, from left to right."""
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _every(names: int) -> int:
    """Returns n if there is room for the name of every n-th row only."""
    return -(-names // MOST_NAMES)


def _legend(figure: Figure) -> None:
    """Puts one legend with every label above all axes, where no line can run into it."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=3)


def _svg(figure: Figure, name: str) -> str:
    """Returns the figure as an `svg` element.

    Ids begin with its name, so that a page can hold several figures. Colours are CSS variables, and
    text is in the font of the page.
    """
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    names = {light: colour for colour, (light, _) in COLOURS.items()}
    text = re.sub("#[0-9a-f]{6}", lambda hit: f"var(--{names[hit[0]]}, {hit[0]})", text)
    return re.sub(r"\s*\n\s*", "\n", text)
