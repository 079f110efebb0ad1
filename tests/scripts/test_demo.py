"""scripts/demo.py: three runs, the last of which computes no frozen layer."""

import json
import runpy
from pathlib import Path

import pytest

DEMO = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "demo.py"))


def test_the_last_run_of_the_demo_is_served_from_its_first_epoch_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DEMO["main"](["--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "Train from scratch." in said
    assert max(map(len, said.split("\nThe last layer took")[1].splitlines())) <= 80
    (folder,) = (tmp_path / "runs").glob("demo-*")
    lines = (folder / "again" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["rows_served"] > 2 * first["rows_computed"], "the first epoch of the last run"
