"""report.html, read as text and as HTML."""

import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from cachefreeze.report.html_report import WORDS
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import (
    duration,
    opening_words,
)
from tests.report.harness import TITLES, drawn, sixty_units
from tests.support.run_files import make_run


def test_every_figure_is_drawn_and_says_what_it_shows(cached: RunResults) -> None:
    page = drawn(cached)
    assert page.drawn == list(TITLES.values())
    assert [name for name in TITLES if f'id="{name}-figure_1"' in page.text] == list(TITLES)
    for each in page.figures:
        assert each["label"]
        assert each["caption"]


def test_the_page_says_the_numbers_of_its_run(cached: RunResults) -> None:
    words, summary = drawn(cached).words, cached.summary
    assert words.count("92.50% of the validation images are right") == 1
    assert "99.44% in the best epoch" in words
    assert f"{duration(summary['wall_seconds'])} is the time of the run" in words
    assert "7/8 units are frozen in the end" in words
    assert "10,200 of 10,782 rows came from it" in words
    for line in cached.metrics:
        assert (
            f"{line['epoch']} {line['step']} {line['train_loss']:.4f} {line['val_loss']:.4f} "
            f"{line['val_accuracy']:.2%} {line['frozen_units']}/8 {line['rows_served']:,} "
            f"{line['rows_computed']:,} {line['seconds']:.1f} {line['images_per_second']:,.0f} "
        ) in words
    for name, rate, step in zip(
        summary["units"], summary["initial_rates"], summary["freeze_steps"], strict=True
    ):
        assert f"{name} {rate:.3g} {'never' if name == 'head' else step} " in words
    for fill in summary["cache"]["fills"]:
        assert f"{fill['step']} {fill['unit']} {fill['rows']:,} 0.3 s " in words
    assert 'data_set"' not in words
    assert '"cubic"' in words


def test_what_was_run_is_told_as_the_run_told_it(cached: RunResults) -> None:
    page = drawn(cached).text
    for line in opening_words(cached.args, cached.summary["units"], **cached.summary["about"]):
        assert f"<code>{line[10:]}</code>" in page
    assert "python -m cachefreeze.train --arch wrn" in page


def test_what_the_cache_said_is_in_the_page(cached: RunResults) -> None:
    said = "dropout in `a` & batch norms limit the cache to 12 %"
    cached.summary["cache"]["messages"] = [said]
    assert f"<code>{escape(said)}</code>" in drawn(cached).text


def test_a_page_asks_for_nothing_and_runs_nothing(cached: RunResults) -> None:
    page = drawn(cached)
    assert page.links == []
    assert page.scripts == 0
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.text
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)


def test_ids_of_figures_do_not_run_into_each_other(cached: RunResults) -> None:
    page = drawn(cached)
    assert len(set(page.ids)) == len(page.ids)
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', page.text):
        assert target in page.ids


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"cache": False}, ["kept"]),
        ({"cache": False, "forecast": False}, ["kept", "predicted"]),
        ({"cache": False, "freeze": False}, ["frontier", "kept"]),
        ({"freeze": False, "epochs": 1}, ["frontier", "kept"]),
        ({"epochs": 1}, []),
    ],
)
def test_a_figure_that_would_say_nothing_is_left_out_with_a_sentence(
    tmp_path: Path, options: dict[str, Any], left_out: list[str]
) -> None:
    page = drawn(make_run(tmp_path / "run", **options))
    assert [each["title"] for each in page.figures] == list(TITLES.values())
    absent = [each for each in page.figures if not each["label"]]
    assert [each["title"] for each in absent] == [TITLES[which] for which in left_out]
    assert all((each["caption"] or "").startswith("Left out: ") for each in absent)


def test_a_resumed_run_says_after_which_step(cached: RunResults) -> None:
    assert "until it went on" not in drawn(cached).words
    cached.summary["resumed_at"] = [57, 1103]
    words = drawn(cached).words
    assert "after step 57, 1,103" in words
    assert "between an interruption and its resumption" in words


def test_the_first_use_of_a_word_leads_to_what_it_means(cached: RunResults) -> None:
    body, words = drawn(cached).text.split("<body>")[1].split("<h2>Words</h2>")
    # What was typed, headings, and pictures are not the page's sentences.
    body = re.sub(r"<(pre|code|svg|h\d|details)\b.*?</\1>", "", body, flags=re.DOTALL)
    for word in WORDS:
        anchor = f"word-{word.replace(' ', '-')}"
        assert f'<dt id="{anchor}">' in words
        if word == "with the cache":  # another way to train, where this run had none
            continue
        before, link, _ = body.partition(f'<a href="#{anchor}">')
        assert link, f"nothing leads to {word}"
        said = re.sub(r"<[^>]*>", "", before)
        assert not re.search(rf"\b{word}", said, re.IGNORECASE), word


def test_sixty_units_with_names_that_mean_harm(tmp_path: Path) -> None:
    page = drawn(sixty_units(tmp_path / "run"))
    assert page.scripts == 0
    assert page.drawn == list(TITLES.values())
    assert "<b>bold</b>" not in page.text
    assert ">cost_$1$</text>" in page.text
