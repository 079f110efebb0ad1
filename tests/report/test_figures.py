"""Pictures of report.html: their colours, and shapes that are to scale."""

import itertools
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cachefreeze.report import figures
from cachefreeze.report.html_report import report
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.time_breakdown import Way
from tests.report.harness import SVG, TITLES, Script, corners, drawn, group, is_hollow, levels


def test_colours_are_those_of_the_page_light_or_dark(cached: RunResults) -> None:
    text = drawn(cached).text
    for name, (light, dark) in figures.COLOURS.items():
        assert f"--{name}:{light}" in text.split("@media")[0]
        assert f"--{name}:{dark}" in text.split("@media")[1]
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.sub(r"var\(--[a-z]+, #[0-9a-f]{6}\)", "", drawings).count("color:") == 0
    assert not re.search(r"[ :]#[0-9a-f]{3,6}\b", re.sub(r"var\(.*?\)", "", drawings))


def test_colours_can_be_told_from_each_other_and_from_the_page() -> None:
    """Also by who sees no red or no green: the projections of Vienot, Brettel and Mollon (1999)."""
    for which in (0, 1):
        paper = luminance(linear(figures.COLOURS["paper"][which]))
        for name in ("ink", "muted"):
            assert contrast(luminance(linear(figures.COLOURS[name][which])), paper) >= 4.5
        for seen in (np.eye(3), PROTAN, DEUTAN):
            stacked = [seen @ linear(figures.COLOURS[part][which]) for part in figures.PARTS]
            for one, other in itertools.pairwise(stacked):
                assert np.abs(perceived(one) - perceived(other)).max() > 0.12


PROTAN = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])


DEUTAN = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def perceived(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 1) ** (1 / 2.4)


def luminance(values: np.ndarray) -> float:
    return float(values @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_bars_are_as_high_as_their_seconds_and_stand_on_each_other() -> None:
    parts = {"training": [4.0, 1.0], "filling": [0.0, 0.0], "validation": [1.0, 1.0]}
    svg = figures.seconds(parts)
    floor, one, four = levels(svg, "seconds-training")
    assert floor - four == pytest.approx(4 * (floor - one), rel=1e-3)
    second = floor - one
    assert levels(svg, "seconds-validation") == pytest.approx(
        [floor - second * top for top in (1, 2, 4, 5)], rel=1e-3
    )
    assert "seconds-filling" not in svg, "what took no time is not named"


def test_a_freeze_is_marked_where_it_happens() -> None:
    curves = [[(0.0, 0.2), (1.0, 0.0)], [(0.0, 0.1), (3.0, 0.0)], [(0.0, 0.1), (4.0, 0.0)]]
    svg = figures.rates(curves, ["stem", "body", "head"], [1.0, 3.0, None], 4.0)
    places = []
    for number in (0, 1):
        mark = group(svg, f"rates-freeze-{number}").find(f".//{SVG}use")
        assert mark is not None
        places.append(float(mark.attrib["x"]))
        assert places[-1] == pytest.approx(corners(svg, f"rates-rate-{number}")[:, 0].max(), 1e-4)
    left, right = (
        corners(svg, "rates-rate-2")[:, 0].min(),
        corners(svg, "rates-rate-2")[:, 0].max(),
    )
    assert (places[0] - left) / (right - left) == pytest.approx(1 / 4, rel=1e-3)
    assert (places[1] - left) / (right - left) == pytest.approx(3 / 4, rel=1e-3)
    assert "rates-freeze-2" not in svg


def test_curves_are_the_rates_that_the_run_had(
    cached: RunResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = figures.rates

    def watched(curves: Any, names: Any, freezes: Any, end: float) -> str:
        seen.update(curves=curves, freezes=freezes)
        return real(curves, names, freezes, end)

    monkeypatch.setattr(figures, "rates", watched)
    report(cached, {})
    for unit, curve in enumerate(seen["curves"]):
        times, values = zip(*curve, strict=True)
        assert values[0] == cached.summary["initial_rates"][unit]
        freeze = cached.summary["freeze_steps"][unit] / 23
        assert (times[-1], values[-1]) == (pytest.approx(freeze), 0.0)
        assert list(times) == sorted(times)
        for line in cached.metrics[:-1]:
            there = np.interp(line["epoch"], times, values, right=0.0)
            assert there == pytest.approx(line["lr"][unit], abs=1e-9)
    steps = cached.summary["freeze_steps"][:-1]
    assert seen["freezes"] == pytest.approx([*(step / 23 for step in steps), None])


def test_units_freeze_within_an_epoch_and_rows_are_shared_out_below() -> None:
    svg = figures.frontier([1.5, 3.0], 4, [0.0, 0.0, 0.5, 1.0])
    frozen, served = corners(svg, "frontier-frozen"), corners(svg, "frontier-served")
    trained = corners(svg, "frontier-training")
    left, width = trained[:, 0].min(), np.ptp(trained[:, 0])
    assert np.ptp(trained[:, 1]) == pytest.approx(2 * np.ptp(frozen[:, 1])), "two of four"
    rises = frozen[frozen[:, 1] < frozen[:, 1].max() - 1e-3]
    assert (rises[:, 0].min() - left) / width == pytest.approx(1.5 / 4, rel=1e-3)
    above = served[served[:, 1] < served[:, 1].max() - 1e-3]
    assert (above[:, 0].min() - left) / width == pytest.approx(2 / 4, rel=1e-3)
    floor, half, whole = levels(svg, "frontier-served")
    assert floor - whole == pytest.approx(2 * (floor - half), rel=1e-3)


def test_kept_bytes_are_to_scale() -> None:
    svg = figures.kept([0.0, 60e6, 30e6])
    floor, less, more = levels(svg, "kept-bytes")
    assert floor - more == pytest.approx(2 * (floor - less), rel=1e-3)
    assert ">60 MB</text>" in svg


def test_predicted_and_measured_bars_are_to_one_scale() -> None:
    own, none = Way("this run", 5.0, "measured", 10.0), Way("no freezing", 20.0, "predicted", 20.0)
    svg = figures.predicted([own, none])
    long, short = (
        np.ptp(corners(svg, f"predicted-0-{which}")[:, 0]) for which in ("predicted", "measured")
    )
    assert long == pytest.approx(2 * short, rel=1e-3)
    assert svg.count('id="predicted-1-') == 1
    assert ">estimated</text>" not in svg
    svg = figures.predicted([own, Way("freezing only", 6.0, "estimated", None)])
    assert is_hollow(svg, "predicted-1-estimated")
    assert not is_hollow(svg, "predicted-0-measured")
    assert ">estimated</text>" in svg


def test_a_loss_of_zero_can_be_drawn() -> None:
    assert 'id="learning-accuracy"' in figures.learning([1.0, 0.0], [2.0, 0.0], [0.5, 1.0])


def test_the_same_run_gives_the_same_page_whatever_matplotlib_is_told(cached: RunResults) -> None:
    import matplotlib

    page = report(cached, {})
    with matplotlib.rc_context({"text.color": "red", "axes.labelpad": 40, "xtick.major.size": 20}):
        assert report(cached, {}) == page
        assert matplotlib.rcParams["text.color"] == "red"


def test_pictures_can_be_taken_out_of_a_report(
    cached: RunResults, tmp_path: Path, script: Script
) -> None:
    folder = tmp_path / "figures"
    assert script("scripts/doc_figures.py", "run", cached.folder, folder, *TITLES) == 0
    for name in TITLES:
        root = ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot()
        assert root.tag == f"{SVG}svg"
        assert "--paper:" in (root[0].text or "")
    assert script("scripts/doc_figures.py", "run", cached.folder, tmp_path, "store") == 2
