"""docs/walkthrough.md, typed from its top to its end."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from cachefreeze.train import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "walkthrough.md").read_text()
# A program and the name that it is to be saved by, and commands, in their order; what is shown of
# their output has no language.
PROGRAM = re.search(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```$", TEXT, re.M | re.S)
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.M | re.S)


def type_in(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process: `python -m cachefreeze.train ...`, `python scripts/...`, or a
    program in the present folder."""
    python, *words = shlex.split(command)
    assert python == "python"
    if words[:2] == ["-m", "cachefreeze.train"]:
        assert main(words[2:]) == 0
        return
    monkeypatch.setattr(sys, "argv", words)
    if Path(words[0]).exists():
        runpy.run_path(words[0], run_name="__main__")
        return
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert end.value.code == 0


def test_an_own_folder_becomes_a_run_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {}
    assert PROGRAM
    name, program = PROGRAM.groups()
    Path(name).write_text(program)
    for block in BLOCKS:
        for command in block.splitlines():
            type_in(command, monkeypatch)
            told[command] = capsys.readouterr().out
    assert len(told) == 7
    _, plan, cached, plain, compared, _, stats = told.values()
    assert "with the cache" in plan
    assert "% cached" in cached
    assert "report    runs/photos/report.html" in cached
    assert "off: frozen units are computed in every step" in plain
    letters = re.findall(r"  ([AB]) [0-9a-f]{12}$", compared, re.M)
    assert letters == ["A", "A"], "the same weights"
    assert re.search(r"^cache +false +true$", compared, re.M)
    assert (tmp_path / "runs" / "both.html").exists()
    assert ">freezing only</a> (" in Path("runs/photos/report.html").read_text()
    assert ">measured</a>)</span>" in Path("runs/photos/report.html").read_text()
    assert re.search(r"^\d+ sets of [\d,]+ rows in data/cache", stats, re.MULTILINE)
    summary = json.loads(Path("runs/photos/summary.json").read_text())
    assert summary["val_accuracy"] > 0.9
    assert sum(1 for _ in Path("photos").rglob("*.png")) == 1797


def test_what_how_it_works_shows_is_there() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", page)
    assert len(pictures) == 4
    for alternative, path in pictures:
        assert len(alternative) > 40
        assert (ROOT / "docs" / path).read_text().startswith("<svg ")
    for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists()
