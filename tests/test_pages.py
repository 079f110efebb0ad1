"""README and docs: what they show runs, and what they name is there."""

import dataclasses
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze
from cachefreeze.probing import options as probing_options
from cachefreeze.train import main
from cachefreeze.training import command_line
from cachefreeze.training.options import option_of
from tests.cache.test_examples import EXAMPLES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorials" / "images.md"
# Scripts wrote these, or the past did; tests/store/test_page.py is about the last one.
OTHERS = {"log.md", "options.md", "models.md", "store-format.md"}
PAGES = [README, *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / n for n in OTHERS})]
TORCHRUN = {"--standalone", "--nproc-per-node", "--max-restarts"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


class Model(nn.Module):
    """Such as the pages speak of: a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        self.backbone = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def names_of(page: Path) -> dict[str, Any]:
    """What a reader of a page has already."""
    model = Model()
    if page.name != "freezeout.md":
        cachefreeze.freeze(model.backbone)
    dataset = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    loader = DataLoader(dataset, 16, shuffle=True)
    x, y = next(iter(loader))
    return {
        "__name__": "page", "torch": torch, "F": F, "cachefreeze": cachefreeze, "model": model,
        "backbone": model.backbone, "features": 8, "dataset": dataset, "loader": loader,
        "optimizer": torch.optim.SGD(model.head.parameters(), lr=0.1), "x": x, "y": y,
        "loss_function": F.cross_entropy, "epochs": 3, "device": "cpu", "url": "memory://page",
    }  # fmt: skip


@each_page
def test_every_block_of_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of(page)
    # As torchrun sets it for a single process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    for block in blocks(page, "python"):
        if included := re.fullmatch(r'--8<-- "examples/(\w+)\.py"\n', block):
            assert included[1] in EXAMPLES, "tests/cache/test_examples.py runs it"
            continue
        if page == TUTORIAL:  # a program, which the test below saves and runs
            continue
        if "ActivationCache(" in block and "cache" in names:
            names["cache"].close()
        exec(compile(block, str(page), "exec"), names)
    if "cache" in names:
        names["cache"].close()
        if "for epoch in range" in "".join(blocks(page, "python")):
            served, told = re.search(r"^(\d+) of \d+ rows served", capsys.readouterr().out, re.M), 0
            told = int(served[1]) if served else names["cache"].stats.rows_served
            assert told > 0


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


@each_page
def test_every_command_is_one_that_there_is(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for program, *words in commands(page):
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.M)
        elif Path(program).name == "python" and words[:2] == ["-m", "cachefreeze.train"]:
            command_line.parse(words[2:])
        elif program == "torchrun":
            place = words.index("cachefreeze.train")
            assert {word for word in words[:place] if word[:2] == "--"} <= TORCHRUN
            command_line.parse(words[place + 1 :])
        elif Path(program).name == "python" and words[:2] == ["-m", "cachefreeze.probe"]:
            probing_options.parse(words[2:])
        elif Path(program).name == "python" and words[0] != "-m":
            assert (ROOT / words[0]).exists() or words[0] == "make_photos.py"
        else:
            assert program in {"pip", "python3", "source", ".venv/bin/python"}


@each_page
def test_every_file_and_option_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\b(?:scripts|examples|tests|docs)/[\w/.-]+\w", text):
        assert (ROOT / path).exists(), path
    if page.name == "stale.md":  # it names options of others
        return
    known = set(command_line.command_line()._option_string_actions)
    known |= {option_of(one.name) for one in dataclasses.fields(probing_options.ProbeSettings)}
    known |= TORCHRUN
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text)) <= known


@each_page
def test_every_picture_is_there_and_says_what_made_it(page: Path) -> None:
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text())
    for alternative, path in pictures:
        assert len(alternative) >= 30
        assert (page.parent / path).read_text().startswith("<svg ")
    if pictures:
        assert re.search(r"(doc_figures|frontier_page)\.py|Drawn by hand", page.read_text())


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.split()) <= 1500
    for target in re.findall(r"(?<!!)\[[^]]*\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_the_picture_of_the_readme_is_what_the_script_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = ROOT / "docs" / "figures"
    words = ["doc_figures.py", "idea", str(figures / "idea.json"), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert runpy.run_path(str(ROOT / "scripts" / "doc_figures.py"))["main"]() == 0
    assert (tmp_path / "idea.svg").read_text() == (figures / "idea.svg").read_text()


def test_every_public_name_is_on_the_page_about_the_api() -> None:
    shown = set(
        re.findall(r"^::: cachefreeze\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    )
    assert set(cachefreeze.__all__) <= shown


def test_the_tests_that_the_page_about_stale_rows_names_are_there() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "stale.md").read_text())
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) == 9
    for name in named:
        assert f"def {name}(" in written, name


# A program of the tutorial and the name that it is to be saved by, and commands, in their order;
# what is shown of their output has no language.
PROGRAM = re.search(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```$", TUTORIAL.read_text(), re.M | re.S)


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


def test_a_folder_of_images_becomes_a_run_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {}
    assert PROGRAM
    name, program = PROGRAM.groups()
    Path(name).write_text(program)
    for block in blocks(TUTORIAL, "sh"):
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
