"""The pictures of a run: numbers in, SVG text out. Knows no HTML and no files.

Needs matplotlib: without it this cannot be imported, which is a UserError.

Widths are made for a phone: 360 units with text of 10. Colours are CSS variables, so that a page
can be light or dark, each with its light value to fall back on. What means the same has the same
colour in every picture. They are Okabe and Ito's, which colour-blind people tell apart.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cachefreeze.errors import UserError
from cachefreeze.files import human_bytes

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
except ModuleNotFoundError as missing:
    raise UserError("reports need matplotlib: pip install matplotlib") from missing


# Name: on a light page, on a dark one.
COLOURS = {
    "ink": ("#1f2933", "#e6e9ec"),
    "muted": ("#5b6773", "#a3adb8"),
    "grid": ("#dde2e7", "#333c46"),
    "paper": ("#ffffff", "#161b21"),
    "suffix": ("#0072b2", "#3d9fdb"),
    "prefix": ("#e69f00", "#f0b030"),
    "reading": ("#009e73", "#1fbf92"),
    "materialising": ("#d55e00", "#ee7a22"),
    "validation": ("#9aa5b1", "#6b7784"),
    "other": ("#b0578d", "#dd8fbc"),
}
# By which runs are told apart: colour, and for whom colours are the same, dashes and markers.
SERIES = ("suffix", "materialising", "reading", "other", "prefix", "muted")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^Dv*"
# What seconds are spent on, from the bottom of a bar to its top, and their colours. Where the parts
# of training are not known, there is `training` instead of the first three.
PARTS = {
    "suffix": "suffix",
    "training": "suffix",
    "prefix": "prefix",
    "reading": "reading",
    "materialising": "materialising",
    "validation": "validation",
}

WIDTH, TEXT, POINTS = 360, 10, 72
# Losses that are so many times each other would all lie at the bottom of a plain axis.
LOG_FROM = 20
# Rows of names that stand below each other without touching.
MOST_NAMES = 24

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, and it can be read out and searched
    "svg.hashsalt": "cachefreeze",  # the same file from the same numbers
    "text.parse_math": False,  # names are no formulas
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["muted"][0],
    "axes.labelcolor": COLOURS["ink"][0],
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": COLOURS["grid"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "xtick.labelcolor": COLOURS["ink"][0],
    "ytick.labelcolor": COLOURS["ink"][0],
    "text.color": COLOURS["ink"][0],
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}

Steps = Sequence[tuple[float, float]]
# A name, the seconds predicted and actual (None: not known), and whether those are estimated.
Pair = tuple[str, float | None, float | None, bool]


def rates(
    curves: Sequence[Steps],
    names: Sequence[str],
    freezes: Sequence[float | None],
    end: float,
) -> str:
    """Rate of every unit over time, a row a unit, as high as its highest rate, which stands at its
    end; a dot where it freezes.

    Args:
        curves: of each unit: times in epochs, in order, and rates.
        names: of the units.
        freezes: when each is frozen, in epochs; None: never.
        end: of the run, in epochs.
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
                (area,) = axes.fill([x[0], *x, x[-1]], [base, *heights, base], color=_c("suffix"))
                area.set_gid(f"rate-{number}")
            if freeze is not None:
                (dot,) = axes.plot(freeze, base, "o", color=_c("materialising"), clip_on=False)
                dot.set_gid(f"freeze-{number}")
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
        _legend(figure, [("rate", "suffix", "area"), ("frozen from here on", "materialising", "o")])
        return _svg(figure, "rates")


def seconds(parts: Mapping[str, Sequence[float]]) -> str:
    """Seconds of every epoch, in a bar of parts that stand on each other.

    Args:
        parts: some of `PARTS`, each with its seconds in every epoch.
    """
    names = [name for name in PARTS if any(parts.get(name, ()))]
    epochs = len(next(iter(parts.values())))
    edges = [number + 0.5 for number in range(epochs + 1)]
    with _drawing(230) as figure:
        axes = figure.subplots()
        below = [0.0] * epochs
        for name in names:
            top = [low + high for low, high in zip(below, parts[name], strict=True)]
            bars = axes.stairs(top, edges, baseline=below, fill=True, color=_c(PARTS[name]))
            bars.set_gid(name)
            below = top
        axes.set_ylabel("seconds")
        axes.set_ylim(0, max(below) * 1.03 or 1)
        _epoch_numbers(axes, epochs)
        axes.grid(visible=False, axis="x")
        _legend(figure, [(name, PARTS[name], "area") for name in names])
        return _svg(figure, "seconds")


def frontier(frozen: Steps, boundary: Steps, units: int, end: float) -> str:
    """How many units are frozen, and how many of them a store stands for.

    Args:
        frozen, boundary: from when on (in epochs) how many units.
        units: of the network.
        end: of the run, in epochs.
    """
    with _drawing(220) as figure:
        axes = figure.subplots()
        lines = [_as_steps(each, end) for each in (boundary, frozen)]
        times = sorted({time for line in lines for time, _ in line})
        served, still = ([_value_at(line, time) for time in times] for line in lines)
        legend = []
        for low, high, colour, name in (
            (still, [float(units)] * len(times), "suffix", "trained"),
            (served, still, "prefix", "frozen, run"),
            ([0.0] * len(times), served, "reading", "from the cache"),
        ):
            if any(h > lo for lo, h in zip(low, high, strict=True)):
                area = axes.fill_between(times, low, high, step="post", color=_c(colour), lw=0)
                area.set_gid(colour)
                legend.append((name, colour, "area"))
        axes.set_ylim(0, units)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylabel("units, first ones below")
        axes.grid(visible=False)
        _epochs(axes, end)
        _legend(figure, legend)
        return _svg(figure, "frontier")


def learning(
    train_loss: Sequence[float], val_loss: Sequence[float], accuracy: Sequence[float]
) -> str:
    """Accuracy above, losses below, at the end of every epoch."""
    epochs = range(1, len(accuracy) + 1)
    few = len(accuracy) <= 30
    with _drawing(330) as figure:
        upper, lower = figure.subplots(2, sharex=True)
        best = max(range(len(accuracy)), key=accuracy.__getitem__)
        (line,) = upper.plot(epochs, accuracy, "-o" if few else "-", color=_c("suffix"))
        line.set_gid("accuracy")
        star = {"color": _c("materialising"), "markersize": 11, "clip_on": False}
        upper.plot(epochs[best], accuracy[best], "*", zorder=3, **star)
        upper.yaxis.set_major_formatter(PercentFormatter(1.0))
        upper.set_ylabel("accuracy")
        for name, values, colour, how in (
            ("training", train_loss, "ink", "--s"),
            ("validation", val_loss, "suffix", "-o"),
        ):
            (line,) = lower.plot(epochs, values, how if few else how[:-1], color=_c(colour))
            line.set_gid(f"loss-{name}")
        smallest, largest = (each([*train_loss, *val_loss]) for each in (min, max))
        if smallest > 0 and largest > LOG_FROM * smallest:
            lower.set_yscale("log")
            lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            lower.yaxis.set_minor_formatter(NullFormatter())
        else:
            lower.set_ylim(bottom=0)
        lower.set_ylabel("loss")
        _epoch_numbers(lower, len(accuracy))
        _legend(
            figure,
            [
                ("validation", "suffix", "-o"),
                ("training", "ink", "--s"),
                ("best epoch", "materialising", "*"),
            ],
        )
        return _svg(figure, "learning")


def store(sizes: Steps, budget: float, end: float) -> str:
    """Bytes of the store over time, and what the cache may take.

    Args:
        sizes: from when on (in epochs) how many bytes.
        budget: in bytes; it is drawn if the store comes near it.
        end: of the run, in epochs.
    """
    with _drawing(200) as figure:
        axes = figure.subplots()
        line = _as_steps(sizes, end)
        times, values = [time for time, _ in line], [value for _, value in line]
        area = axes.fill_between(times, values, step="post", color=_c("reading"), lw=0)
        area.set_gid("bytes")
        legend = [("store", "reading", "area")]
        largest = max(values)
        if budget <= 10 * largest:
            axes.axhline(budget, color=_c("materialising"), linestyle="--").set_gid("budget")
            legend.append(("budget", "materialising", "--"))
        axes.set_ylim(0, 1.1 * max(largest, budget if budget <= 10 * largest else 0) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
        _epochs(axes, end)
        _legend(figure, legend)
        return _svg(figure, "store")


def predicted(totals: Sequence[Pair], fillings: Sequence[Pair]) -> str:
    """Pairs of bars: times of the run, and of every filling; what is estimated is hollow."""
    drawn = [
        panel
        for panel in (
            ("whole", "time of the run, seconds", totals),
            ("filling", "filling a store, seconds", fillings),
        )
        if panel[-1]
    ]
    rows = [len(pairs) * 30 // _every(len(pairs)) for *_, pairs in drawn]
    with _drawing(75 + sum(rows) + 45 * (len(rows) - 1)) as figure:
        panels = figure.subplots(len(rows), height_ratios=rows, squeeze=False)[:, 0]
        for axes, (key, title, pairs) in zip(panels, drawn, strict=True):
            for number, (_, expected, actual, estimated) in enumerate(pairs):
                for which, value, place, look in (
                    ("predicted", expected, number, _patch("muted")),
                    ("actual", actual, number + 0.38, _patch("suffix", hollow=estimated)),
                ):
                    if value is not None:
                        (bar,) = axes.barh(place, value, height=0.36, **look)
                        bar.set_gid(f"{key}-{number}-{which}")
            shown = range(0, len(pairs), _every(len(pairs)))
            axes.set_yticks([n + 0.19 for n in shown], [pairs[n][0] for n in shown])
            axes.set_ylim(len(pairs) - 0.3, -0.3)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.grid(visible=False, axis="y")
            axes.set_xlabel(title)
        legend = [("predicted", "muted", "area"), ("actual", "suffix", "area")]
        if any(estimated for *_, estimated in totals):
            legend.append(("estimated", "suffix", "hollow"))
        _legend(figure, legend)
        return _svg(figure, "predicted")


def accuracy_against_time(runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """A line a run.

    Args:
        runs: a name, seconds since its start at the end of every epoch, and the accuracy there.
    """
    with _drawing(240 + 14 * len(runs)) as figure:
        axes = figure.subplots()
        legend = []
        for number, (name, times, values) in enumerate(runs):
            colour, how = SERIES[number % len(SERIES)], _look(number)
            (line,) = axes.plot(times, values, how, color=_c(colour), markevery=_marks(values))
            line.set_gid(f"run-{number}")
            legend.append((name, colour, how))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("validation accuracy")
        axes.set_xlabel("seconds of training, filling and validation")
        axes.set_xlim(left=0)
        _legend(figure, legend, columns=1)
        return _svg(figure, "accuracy")


def _look(number: int) -> str:
    return DASHES[number // 2 % len(DASHES)] + MARKERS[number % len(MARKERS)]


def _marks(values: Sequence[float]) -> int:
    """Every how many points there is a marker."""
    return max(len(values) // 12, 1)


def _as_steps(changes: Steps, end: float) -> Steps:
    """Values that hold from their times on: from 0 to `end`, in order, the last of a time only."""
    values = dict(sorted([(0.0, 0.0), *changes], key=lambda change: change[0]))
    return [*values.items(), (end, list(values.values())[-1])]


def _value_at(changes: Steps, time: float) -> float:
    return next(value for since, value in reversed(changes) if since <= time)


def _line(look: str) -> dict[str, Any]:
    """A line's look as matplotlib's names for its parts: dashes, then a marker."""
    marker = look.lstrip("-.:")
    return {"linestyle": look.removesuffix(marker) or "none", "marker": marker or None}


def _patch(colour: str, *, hollow: bool = False) -> dict[str, Any]:
    return {"edgecolor": _c(colour), "facecolor": "none" if hollow else _c(colour)}


def _c(name: str) -> str:
    return COLOURS[name][0]


@contextmanager
def _drawing(height: float) -> Iterator[Figure]:
    """A figure of this height, in our own style whatever the user's matplotlib is told to do."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure((WIDTH / POINTS, height / POINTS), dpi=POINTS, layout="constrained")


def _epochs(axes: Axes, end: float) -> None:
    """Time from left to right."""
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=end >= 2))
    axes.set_xlabel("epochs")


def _epoch_numbers(axes: Axes, epochs: int) -> None:
    """Whole epochs from left to right."""
    axes.set_xlim(0.5, epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _every(names: int) -> int:
    """Every how many of so many rows there is room for a name."""
    return -(-names // MOST_NAMES)


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]], columns: int = 3) -> None:
    """Above all axes, where no line can run into it: name, colour, and a line's look, or `area`,
    or `hollow`."""
    handles = [
        Patch(label=name, **_patch(colour, hollow=look == "hollow"))
        if look in ("area", "hollow")
        else Line2D([], [], color=_c(colour), label=name, **_line(look))
        for name, colour, look in entries
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `svg` element: ids begin with its name, so that it can stand beside others;
    colours are CSS variables; text is in the page's own type."""
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
