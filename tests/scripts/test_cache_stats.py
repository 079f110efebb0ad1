"""scripts/cache_stats.py tells what is in a cache folder, and whether it is whole."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cachefreeze import ActivationCache
from cachefreeze.keys import environment
from cachefreeze.report.cache_contents import SETTINGS
from cachefreeze.store import Directory, Row
from cachefreeze.store.format import USED
from cachefreeze.store.inspect import inspect

SCRIPT = Path(__file__).parents[2] / "scripts" / "cache_stats.py"


@dataclass
class Said:
    """What the script said."""

    returncode: int
    stdout: str
    stderr: str


Stats = Callable[..., Said]


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stats:
    """Runs the script in this process."""
    look = runpy.run_path(str(SCRIPT))["main"]

    def run(*options: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        code = look()
        captured = capsys.readouterr()
        if "--json" not in options:
            lines = captured.out.replace(str(options[0]), "").splitlines()
            # A path that somebody copies is in one piece.
            lines = [line for line in lines if not line.startswith("damaged: /")]
            assert max(map(len, lines), default=0) <= 100
        return Said(code, captured.out, captured.err)

    return run


@pytest.mark.parametrize("what", ["missing", "file", "untagged", "photos"])
def test_a_folder_that_is_no_cache_is_refused_with_2(
    tmp_path: Path, what: str, stats: Stats
) -> None:
    folder = tmp_path / what
    if what == "file":
        folder.write_text("")
    elif what != "missing":
        folder.mkdir()
    if what == "photos":
        (folder / ("a" * 32)).mkdir()
    result = stats(folder, "--prune")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert what != "photos" or (folder / ("a" * 32)).exists()


BATCH = 8


def train(directory: Path, weights: int = 0, batch: int = BATCH, rows: int = 40) -> None:
    """Two epochs of a head on a frozen body. Its rows are kept."""
    torch.manual_seed(weights)
    body = torch.nn.Sequential(torch.nn.Linear(64, 400), torch.nn.Tanh(), torch.nn.Linear(400, 16))
    model = torch.nn.Sequential(body.requires_grad_(False), torch.nn.Linear(16, 2))
    images = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    with ActivationCache(model, directory=directory) as cache:
        for _ in range(2):
            for batch_of_images in images.split(batch):
                model(batch_of_images)
        assert cache.stats.rows_kept >= 40, cache.messages


def keep(
    directory: Path, about: dict[str, Any], name: int = 0, rows: int = 5, row: Row | None = None
) -> Path:
    """Keeps numbered rows as one run does. Returns the folder of the set."""
    row = Row((1, 16), "float32") if row is None else row
    numbers = np.arange(2 * rows, dtype=np.uint64).reshape(rows, 2)
    kept = Directory(directory, None)
    kept.rows(bytes([name] * 16), row, about).append(numbers, np.ones((rows, row.nbytes), np.uint8))
    kept.close()
    assert kept.messages == []
    return directory / bytes([name] * 16).hex()


def about_of(**said: Any) -> dict[str, Any]:
    settings = ["2.9", "cpu", "AVX2", "highest", "True", "1", *["False"] * 7, "a processor", "0.24"]
    return {
        "value": "body.2: linear (8x16)",
        "model": "Net (training mode, 8x64)",
        "shape": [8, 16],
        "rows": [0, 1, 1],
        "parameters": 4,
        "environment": settings,
    } | said


def test_rows_of_a_model_are_shown_with_what_they_are(tmp_path: Path, stats: Stats) -> None:
    train(tmp_path)
    result = stats(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    model, value, rows, header, line, gap, total, bar, free = result.stdout.splitlines()
    assert model == "Sequential"
    assert value == "  output of linear in module 0.2"
    assert rows == "  rows of 16 float32, 64 B each"
    assert header.split("  ")[2] == "set"
    assert re.match(r"    [0-9a-f]{12}    40  [\d.]+ kB +1 run  \d+ s ago +\d+ s ago$", line)
    assert gap == ""
    assert total == f"1 set of 40 rows in {tmp_path}"
    assert bar.endswith("(half of the free disk, a run's default)")
    assert free.endswith(" free on this disk")
    train(tmp_path, rows=48)
    assert re.search(r"  48  [\d.]+ kB +2 runs  ", stats(tmp_path).stdout)


def test_what_tells_two_sets_of_one_value_apart_is_named(tmp_path: Path, stats: Stats) -> None:
    train(tmp_path)
    alike = "\n    A set serves only runs that are like those that made it.\n"
    assert alike not in stats(tmp_path).stdout
    train(tmp_path, batch=20)
    text = stats(tmp_path).stdout
    assert alike in text
    assert text.count("output of linear in module 0.2") == 1
    assert "\n      made with input 8x64\n" in text
    assert "\n      made with input 20x64\n" in text
    assert "version" not in text
    train(tmp_path, weights=1)
    text = stats(tmp_path).stdout
    assert "\n      made with input 8x64, version 1 of 2\n" in text
    assert "\n      made with input 8x64, version 2 of 2\n" in text
    assert "\n    Versions differ in the weights or the code that made the rows.\n" in text
    found = json.loads(stats(tmp_path, "--json").stdout)["sets"]
    assert [one["differences"] for one in found] == [
        {"input": "8x64", "version": "1 of 2"},
        {"input": "20x64"},
        {"input": "8x64", "version": "2 of 2"},
    ]


def test_settings_have_the_names_of_what_they_are(
    tmp_path: Path, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for kind, names in SETTINGS.items():
        values = environment(torch.device(kind))
        assert names.index("processor") - len(values) in (0, 1)
        said = dict(zip(names, values, strict=False))
        assert (said["torch"], said["device"]) == (torch.__version__, kind)
        assert said["matmul precision"] == "highest"
    train(tmp_path / "real")
    (real,) = json.loads(stats(tmp_path / "real", "--json").stdout)["sets"]
    names = SETTINGS["cpu"]
    assert len(names) - len(real["about"]["environment"]) in (0, 2)
    one, other = about_of(), about_of()
    other["environment"][5] = "2"
    keep(tmp_path / "named", one, 0)
    keep(tmp_path / "named", other, 1)
    text = stats(tmp_path / "named").stdout
    assert "\n      made with threads 1\n" in text
    assert "\n      made with threads 2\n" in text


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"parameters": 6}, "parameters 6"),
        ({"model": "Net (eval mode, 8x64, without gradients)"}, "mode eval, gradients no"),
        ({"environment": ["1", "2"]}, "setting 1 1, setting 2 2"),
    ],
)
def test_every_fact_that_differs_is_named(
    tmp_path: Path, stats: Stats, said: dict[str, Any], words: str
) -> None:
    keep(tmp_path, about_of(), 0)
    keep(tmp_path, about_of(**said), 1)
    found = json.loads(stats(tmp_path, "--json").stdout)["sets"]
    (other,) = (one for one in found if one["set"].startswith("01"))
    different = {k: v for k, v in other["differences"].items() if v != "unknown"}
    assert ", ".join(f"{name} {value}" for name, value in different.items()) == words


@pytest.mark.parametrize(
    ("said", "row", "words"),
    [
        ({}, Row((1, 16), "float32"), "rows of 16 float32, 64 B each"),
        (
            {"shape": [8, 3, 4, 5], "rows": [0, 1, 1]},
            Row((1, 4, 5, 3), "bfloat16"),
            "rows of 3x4x5 bfloat16, 120 B each",
        ),
        (
            {"shape": [16, 3, 5], "rows": [0, 2, 1]},
            Row((2, 5, 3), "float32"),
            "rows of 2x3x5 float32, 120 B each",
        ),
        ({"shape": [8]}, Row((1,), "int64"), "rows of one number, int64, 8 B each"),
        (
            {"shape": [8, 16], "rows": None},
            Row((8, 16), "float32"),
            "whole batches of 8x16 float32, 512 B each",
        ),
        ({"shape": [9, 99]}, Row((1, 16), "float32"), "rows of 1x16 float32, 64 B each"),
    ],
)
def test_a_row_has_the_shape_that_its_user_knows(
    tmp_path: Path, stats: Stats, said: dict[str, Any], row: Row, words: str
) -> None:
    keep(tmp_path, about_of(**said), row=row)
    assert f"\n  {words}\n" in stats(tmp_path).stdout


def test_json_of_a_directory_holds_the_same(tmp_path: Path, stats: Stats) -> None:
    begin = time.time() - 1
    folder = keep(tmp_path, about_of())
    found = json.loads(stats(tmp_path, "--json", "--verify").stdout)
    (one,) = found.pop("sets")
    assert (one["set"], one["model"], one["value"]) == (
        folder.name,
        "Net",
        "linear in module body.2",
    )
    assert (one["row_shape"], one["row_bytes"], one["dtype"]) == ([16], 64, "float32")
    assert (one["rows"], one["runs"], one["in_use"]) == (5, 1, False)
    assert begin < one["first_use"] <= one["last_use"] + 1 < time.time() + 2
    assert one["bytes"] == found["bytes"] == inspect(tmp_path)[0].nbytes
    assert one["about"] == about_of()
    assert (found["damaged"], found["verified"], found["problems"]) == (False, True, [])
    assert (found["pruned"], found["over_budget"], found["budget_given"]) == (None, False, False)


def test_a_damaged_chunk_of_a_directory_is_told(tmp_path: Path, stats: Stats) -> None:
    folder = keep(tmp_path, about_of())
    keep(tmp_path, about_of(), 1)
    assert "\nverified: every chunk is as it was written\n" in stats(tmp_path, "--verify").stdout
    (chunk,) = folder.glob("*/values/c.*")
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    assert stats(tmp_path).returncode == 0, "a bit is not looked at without --verify"
    result = stats(tmp_path, "--verify", "--json")
    assert result.returncode == 1
    (sentence,) = json.loads(result.stdout)["problems"]
    assert sentence.startswith(str(chunk))
    lines = stats(tmp_path, "--verify").stdout.splitlines()
    assert f"damaged: {sentence}" in lines
    assert "Runs do not use what is damaged. They compute it again." in lines
    assert "verified: every chunk is as it was written" not in lines


def test_a_set_of_which_nothing_can_be_read_is_damaged(tmp_path: Path, stats: Stats) -> None:
    folder = keep(tmp_path, about_of())
    (segment,) = folder.iterdir()
    (segment / "keys" / "journal").unlink()
    result = stats(tmp_path)
    assert result.returncode == 1
    assert f"damaged: {segment}/keys/journal cannot be read (No such file" in result.stdout
    assert result.stdout.startswith("unknown model\n  output of unknown value\n  nothing readable")
    assert "  unknown  " in result.stdout, "when it was used first"
    assert json.loads(stats(tmp_path, "--json").stdout)["sets"][0]["row_shape"] is None


def test_rows_that_were_not_used_for_days_are_pruned(tmp_path: Path, stats: Stats) -> None:
    old, _ = keep(tmp_path, about_of()), keep(tmp_path, about_of(), 1)
    (segment,) = old.iterdir()
    then = time.time() - 10.5 * 86400
    os.utime(segment / USED, (then, then))
    os.utime(segment / "zarr.json", (then - 86400, then - 86400))
    assert re.search(r"11 days ago  10 days ago\n", stats(tmp_path).stdout)
    for days in ("", 11):
        kept = stats(tmp_path, "--prune", *([days] if days else [])).stdout
        assert "\nremoved: 0 B in all\n" in kept
        assert old.exists()
    text = stats(tmp_path, "--prune", 10).stdout
    assert "\nremoved: 5 rows of 000000000000, linear in module body.2 of Net\n" in text
    assert re.search(r"\nremoved: [\d.]+ kB in all\n1 set of 5 rows in ", text)
    assert not old.exists()
    pruned = json.loads(stats(tmp_path, "--prune", 0, "--json").stdout)["pruned"]
    assert pruned["rows"] == {"01" * 16: 5}
    assert pruned["bytes"] > 5 * 64


def test_rows_that_a_run_uses_are_not_pruned(tmp_path: Path, stats: Stats) -> None:
    keep(tmp_path, about_of())
    run = Directory(tmp_path, None)
    rows = run.rows(bytes(16), Row((1, 16), "float32"), about_of())
    keys = np.arange(10, dtype=np.uint64).reshape(5, 2)
    assert rows.read(rows.find(keys), np.zeros((5, 64), np.uint8)).all()
    text = stats(tmp_path, "--prune", 0).stdout
    assert "  in use now\n" in text
    assert "removed: 0 B in all" in text
    run.close()
    assert "removed: 5 rows of " in stats(tmp_path, "--prune", 0).stdout


def test_a_directory_over_its_budget_is_told(tmp_path: Path, stats: Stats) -> None:
    keep(tmp_path, about_of())
    assert "over budget" not in stats(tmp_path).stdout
    text = stats(tmp_path, "--max-gb", 1e-6).stdout
    assert re.search(
        r"\[#{20}\] 100%  [\d.]+ kB of 1 kB \(--max-gb\)\nover budget by .+ kB\n", text
    )
    found = json.loads(stats(tmp_path, "--json", "--max-gb", 1e-6).stdout)
    assert (found["over_budget"], found["budget_bytes"]) == (True, pytest.approx(1000))


def test_a_directory_without_rows_is_no_error(tmp_path: Path, stats: Stats) -> None:
    Directory(tmp_path, None).close()
    result = stats(tmp_path, "--verify", "--prune")
    assert (result.returncode, result.stderr) == (0, "")
    removed, total, *_ = result.stdout.splitlines()
    assert (removed, total) == ("removed: 0 B in all", f"no rows in {tmp_path}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prune", "-1"], "--prune -1 is no number of days"),
        (["--prune", "nan"], "--prune nan is no number of days"),
        (["--prune", "soon"], "--prune soon is no number of days"),
        (["--max-gb", "-1"], "--max-gb -1.0 does not make sense"),
        (["--max-gb", "inf"], "--max-gb inf does not make sense"),
    ],
)
def test_an_option_that_does_not_fit_a_directory_is_refused(
    tmp_path: Path, stats: Stats, options: list[str], words: str
) -> None:
    folder = keep(tmp_path, about_of())
    result = stats(tmp_path, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert folder.exists()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"value": 3, "model": ["x"], "shape": "8", "rows": 5, "environment": {"a": 1}},
        {"value": "\x1b[2J: linear\n (8)", "model": "\x1b]0;x\x07\u202eNet\n (eval mode, 8)"},
        {"value": "\ud800: linear (8x16)", "model": "\ud800", "environment": ["\x1b[31m", "cpu"]},
        {"value": "x" * 300_000, "model": "(" * 300_000, "environment": ["y" * 300_000, "cpu"]},
        {"environment": ["z"] * 100_000},
        {"environment": [[["a"]], None, 1e300, True]},
        {"shape": [10**4000, 8], "rows": [0, 10**4000, 1], "parameters": 10**4000},
        {"shape": [-1, -16], "rows": [9, 1, 1]},
        {"shape": [0] * 9999, "rows": [0, 0, 0], "parameters": True},
        {"shape": [16.0], "rows": [0, 1]},
    ],
)
def test_what_a_stranger_wrote_about_rows_is_shown_safely(
    tmp_path: Path, stats: Stats, said: dict[str, Any]
) -> None:
    for name in (0, 1):
        settings = [*said.get("environment", []), *[str(name)] * 1000]
        keep(tmp_path, {**said, "environment": settings}, name)
    assert "\n  rows of 1x16 float32, 64 B each\n" in stats(tmp_path).stdout, "as they lie"
    for options in ((), ("--json",), ("--prune", 0)):
        result = stats(tmp_path, *options)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.replace("\n", "").isprintable()
        assert options == ("--json",) or len(result.stdout) < 4000
        result.stdout.encode()


def test_names_that_a_terminal_cannot_show_are_no_error(tmp_path: Path) -> None:
    keep(tmp_path, about_of(model="\u00fcber (eval mode, 8x64)"))
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "--verify"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\xfcber\n")
