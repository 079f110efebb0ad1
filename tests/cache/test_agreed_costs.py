"""Processes with one directory choose what they keep by the seconds that one of them measured."""

from pathlib import Path

import pytest

from cachefreeze import ActivationCache, lineage
from cachefreeze.cache.agreed_costs import agreed_seconds
from cachefreeze.lineage import Trace
from cachefreeze.store import Directory

from .harness import images, net, served, warm

X = images()[:4]


def trace(factor: float = 1.0) -> Trace:
    found = lineage.trace(net(), X)[1]
    for one in found.operations:
        one.seconds *= factor
    return found


def test_the_first_measurement_decides_for_all(tmp_path: Path) -> None:
    first = trace()
    own = [one.seconds for one in first.operations]
    one, other = Directory(tmp_path, None), Directory(tmp_path, None)
    assert agreed_seconds(first, one) == own
    assert agreed_seconds(trace(100.0), other) == own
    assert agreed_seconds(lineage.trace(net(), images()[:5])[1], other) != own
    assert not list((tmp_path / "costs").glob("*partial*"))


@pytest.mark.parametrize(
    "content", ["", "[0.1", "[]", "{}", "7", '["a"]', "[NaN]", "[-1.0]", "[" * 100_000]
)
def test_a_damaged_file_decides_nothing(tmp_path: Path, content: str) -> None:
    directory = Directory(tmp_path, None)
    agreed_seconds(trace(), directory)
    (file,) = (tmp_path / "costs").iterdir()
    file.write_text(content)
    again = trace()
    assert agreed_seconds(again, directory) == [one.seconds for one in again.operations]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    with ActivationCache(model := net(), directory=tmp_path) as cache:
        (tmp_path / "costs").write_text("in the way")
        warm(cache, model, images())
        assert served(cache, lambda: model(images()[:8])) == 8
