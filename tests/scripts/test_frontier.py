"""scripts/frontier.py and frontier_page.py: runs that resume, and the page that is made of them."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "figures" / "worth.jsonl"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that imports a script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def call(module: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    return int(module.main())


def test_a_study_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    random = np.random.default_rng(0)
    for number in range(24):
        split = "train" if number < 16 else "test"
        place = tmp_path / "images" / split / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
    frontier = script("frontier")
    monkeypatch.setattr(frontier, "BEST", (("cubic", True),))
    monkeypatch.setattr(frontier, "OTHERS", ())
    results = tmp_path / "results.jsonl"
    words = [
        "run", tmp_path / "images", "--results", results, "--parts", "scratch", "--seeds", 1,
        "--t0", 0.5, "--epochs", 1, "--plain-epochs", 1, "--arch", "wrn10_1", "--image-size", 8,
        "--images", 6, "--test-images", 2, "--batch-size", 4,
    ]  # fmt: skip
    assert call(frontier, monkeypatch, *words) == 0
    first = results.read_text()
    plain, freezing = map(json.loads, first.splitlines())
    assert (plain["way"], freezing["way"], freezing["t0"]) == ("plain", "freezing", 0.5)
    assert plain["steps"] == freezing["steps"] == 3, "of 2 times 6 images"
    assert plain["freeze_steps"] == [3] * 5 != freezing["freeze_steps"]
    assert 0 < plain["seconds"] < plain["wall_seconds_of_process"]

    assert call(frontier, monkeypatch, *words) == 0
    assert results.read_text() == first, "a finished study is not run again"

    results.write_text(first[:-30])
    assert call(frontier, monkeypatch, *words) == 0
    kept, again = map(json.loads, results.read_text().splitlines())
    assert kept == plain
    assert again["seconds"] != freezing["seconds"]
    assert again["train_loss"] == freezing["train_loss"]

    assert call(frontier, monkeypatch, "run", tmp_path, "--results", results) == 2


def test_the_page_and_its_picture_are_what_the_script_makes_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    (tmp_path / "figures").mkdir()
    page = tmp_path / "frontier.md"
    shutil.copy(ROOT / "docs" / "frontier.md", page)
    text = page.read_text()
    page.write_text(text.replace(" epochs |", " weeks |"))
    assert call(script("frontier_page"), monkeypatch, RESULTS, tmp_path) == 0
    assert page.read_text() == text
    drawn = (tmp_path / "figures" / "worth.svg").read_text()
    assert drawn == (ROOT / "docs" / "figures" / "worth.svg").read_text()


def test_plain_training_of_the_same_seconds_lies_between_two_lengths(script: Any) -> None:
    seconds = {(0, 2): 18.0, (0, 4): 41.0, (1, 2): 22.0, (1, 4): 39.0}
    plain = [
        {
            "way": "plain",
            "seed": seed,
            "epochs": epochs,
            "seconds": seconds[seed, epochs],
            "error": error,
        }
        for seed, epochs, error in [(0, 2, 0.6), (0, 4, 0.4), (1, 2, 0.7), (1, 4, 0.7)]
    ]
    at = script("frontier_page").at
    # 2 epochs take 18 seconds and 4 take 39: other processes only add to the time of a run.
    found = [at(s, 0, plain) for s in (17.0, 18.0, 28.5, 39.0, 99.0)]
    assert found == [None, 0.6, pytest.approx(0.5), 0.4, 0.4]
    assert at(30.0, 1, plain) == pytest.approx(0.7)
