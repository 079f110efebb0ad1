"""Fixtures of the tests of reports."""

import runpy
import sys
from pathlib import Path

import pytest

from cachefreeze.report.run_results import RunResults
from tests.report.harness import ROOT, Script
from tests.support.run_files import make_run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs a script as the command line does; returns its exit code."""

    def run(path: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


@pytest.fixture
def cached(tmp_path: Path) -> RunResults:
    return make_run(tmp_path / "cached")
