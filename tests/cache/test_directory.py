"""Rows on the disk: what later runs find, and what they must not."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache
from cachefreeze.cache import activation_cache, row_table
from cachefreeze.errors import UserError
from cachefreeze.store.format import CHECKSUM_BYTES, JOURNAL
from cachefreeze.store.inspect import inspect
from cachefreeze.store.journal import read_lines
from tests.support.programs import Programs

from .harness import BATCH, Net, assert_same, batches, images, net, plainly, served

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]


class Program:
    """A program, and a function that it uses, in a folder of their own."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        for name in ("again.py", "doubled.py"):
            shutil.copy(PROGRAMS / name, folder / name)
        self.folder = folder
        self._programs = programs

    def __call__(self, *arguments: str) -> dict[str, list[str]]:
        """Runs it in a process of its own; returns what it has printed, by first words."""
        done = self._programs.run(self.folder / "again.py", *arguments)
        assert done.code == 0, done.stderr[-2000:]
        return self._by_words(done.stdout)

    def with_other_hashes(self, *arguments: str) -> dict[str, list[str]]:
        """Runs it where Python's hashes of strings, and so the order of sets, are others."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
        command = [sys.executable, str(self.folder / "again.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return self._by_words(done.stdout)

    @staticmethod
    def _by_words(printed: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for line in printed.splitlines():
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest)
        return found


def rows_in(folder: Path) -> int:
    return sum(one.rows for one in inspect(folder))


def epoch(model: nn.Module, x: torch.Tensor, number: int) -> None:
    for batch in batches(x, number):
        assert_same(model(batch), plainly(model, batch))


@pytest.fixture
def program(tmp_path: Path, programs: Programs) -> Program:
    return Program(tmp_path, programs)


def test_a_later_run_is_served_from_its_first_epoch_on(program: Program) -> None:
    folder = str(program.folder / "cache")
    plain = program("none")
    first = program(folder)
    again = program.with_other_hashes(folder)
    assert first["weights"] == again["weights"] == plain["weights"]
    assert int(first["served"][0]) == 0
    # Two batches are compared: the traced one, and another.
    assert int(again["served"][0]) == 80 - 2 * 8
    assert rows_in(Path(folder)) == 80


def test_a_changed_image_is_one_more_row(program: Program) -> None:
    folder = str(program.folder / "cache")
    program(folder)
    changed = program(folder, "5")
    assert changed["weights"] == program("none", "5")["weights"]
    assert int(changed["served"][0]) >= 80 - 5 * 8
    assert rows_in(Path(folder)) == 81


@pytest.mark.parametrize("edit", [("x * FACTOR", "x * FACTOR + 1"), ("FACTOR = 2", "FACTOR = 3")])
def test_rows_of_before_a_function_was_edited_are_not_served(
    program: Program, edit: tuple[str, str]
) -> None:
    folder = str(program.folder / "cache")
    program(folder)
    path = program.folder / "doubled.py"
    path.write_text(path.read_text().replace(*edit))
    plain, cached = program("none"), program(folder)
    assert cached["weights"] == plain["weights"]
    assert int(cached["served"][0]) == 0
    assert rows_in(Path(folder)) == 160


def test_other_weights_find_nothing_and_both_stay(tmp_path: Path) -> None:
    x = images(48)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Net()
        with ActivationCache(model, directory=tmp_path / "cache") as cache:
            epoch(model, x, 0)
            assert cache.stats.rows_served == 0
    sets = inspect(tmp_path / "cache")
    assert sorted(one.rows for one in sets) == [48, 48]


def test_rows_are_served_from_the_disk_where_memory_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(), images(80)
    with ActivationCache(model, directory=tmp_path) as cache:
        epoch(model, x, 0)
    # Room for some five rows of 128 bytes.
    monkeypatch.setattr(activation_cache, "free_memory", lambda: 4 * 5 * 168)
    with ActivationCache(model, directory=tmp_path) as cache:
        epoch(model, x, 1)
        assert served(cache, lambda: epoch(model, x, 2)) >= 80 - BATCH
        assert cache._shared.entries.nbytes < 20_000


def test_two_caches_at_once_share_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_table, "_SOON", 0.0)
    monkeypatch.setattr(row_table, "_LATE", 0.0)
    x, other = images(48), images(48, seed=7)
    one, two = net(), net()
    with ActivationCache(two, directory=tmp_path) as cache:
        epoch(two, other, 0)
        epoch(two, other, 1)
        with ActivationCache(one, directory=tmp_path):
            epoch(one, x, 0)
        assert served(cache, lambda: epoch(two, x, 5)) >= 48 - BATCH


@pytest.mark.parametrize("place", [0, 100, -5])
def test_a_damaged_chunk_is_computed_again(
    tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = net(), images(48)
    with ActivationCache(model, directory=tmp_path):
        epoch(model, x, 0)
    (chunk,) = [path for path in tmp_path.glob("*/*/values/c*") if path.is_file()]
    content = bytearray(chunk.read_bytes())
    content[place] ^= 4
    chunk.write_bytes(content)
    with ActivationCache(model, directory=tmp_path) as cache:
        for number in range(3):
            epoch(model, x, number)
        assert any("computed again" in sentence for sentence in cache.messages)
        assert cache.stats.rows_served > 0
    assert "computed again" in caplog.text


def test_wrong_rows_under_a_right_name_are_never_served(tmp_path: Path) -> None:
    model, x = net(), images(48)
    with ActivationCache(model, directory=tmp_path / "cache") as cache:
        epoch(model, x, 0)
        epoch(model, x, 1)
        (table,) = cache._shared.entries._tables.values()
        # Somebody's broken tool: sound chunks of numbers that are not the model's.
        table.below._appender.append = _spoiled(table.below._appender.append)  # type: ignore
        table.write(np.zeros((0, 2), np.uint64), torch.zeros(0, 32), 0)
        epoch(model, images(48, seed=3), 2)
    with ActivationCache(model, directory=tmp_path / "cache") as cache:
        for number in range(3):
            epoch(model, images(48, seed=3), number)
        assert cache.stats.rows_served == 0
        assert any("differ from computed ones" in sentence for sentence in cache.messages)
    with ActivationCache(model, directory=tmp_path / "cache") as cache:
        epoch(model, x, 0)
        assert cache.stats.rows_served == 0


def wrong_row(folder: Path, row: int) -> None:
    """Changes a number in a row on disk, and makes the checksums fit, as a broken tool may."""
    (chunk,) = [path for path in folder.glob("*/*/values/c*") if path.is_file()]
    content = bytearray(chunk.read_bytes()[:-CHECKSUM_BYTES])
    content[row * 32 * 4] ^= 1
    checksum = google_crc32c.value(bytes(content))
    chunk.write_bytes(bytes(content) + checksum.to_bytes(CHECKSUM_BYTES, "little"))
    segment = chunk.parents[1]
    (line,) = read_lines(segment / JOURNAL, segment.name, 0, 10**6)
    journal = segment / JOURNAL
    journal.write_bytes(replace(line, values=checksum).line(segment.name))


def in_order(model: nn.Module, x: torch.Tensor) -> None:
    for batch in x.split(BATCH):
        assert_same(model(batch), plainly(model, batch))


@pytest.mark.parametrize("row", [0, BATCH - 1])
def test_a_wrong_row_in_the_traced_batch_is_noticed(tmp_path: Path, row: int) -> None:
    model, x = net(), images(48)
    with ActivationCache(model, directory=tmp_path) as cache:
        in_order(model, x)
    wrong_row(tmp_path, row)
    with ActivationCache(model, directory=tmp_path) as cache:
        model(x[:BATCH])
        assert any("differ from computed ones" in sentence for sentence in cache.messages)
        in_order(model, x)
        assert cache.stats.rows_served == 0
        assert cache.report().found


def test_a_damaged_chunk_under_the_traced_batch_is_noticed(tmp_path: Path) -> None:
    model, x = net(), images(48)
    with ActivationCache(model, directory=tmp_path) as cache:
        in_order(model, x)
    (chunk,) = [path for path in tmp_path.glob("*/*/values/c*") if path.is_file()]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 4
    chunk.write_bytes(content)
    with ActivationCache(model, directory=tmp_path) as cache:
        model(x[:BATCH])
        assert any("computed again" in sentence for sentence in cache.messages)
        assert cache.report().batches_compared == 0
        in_order(model, x)
        in_order(model, x)
        assert cache.stats.rows_served > 0


def test_the_traced_batch_counts_as_compared_but_is_not_enough(tmp_path: Path) -> None:
    model, x = net(), images(48)
    with ActivationCache(model, directory=tmp_path):
        in_order(model, x)
    for probation, served_from in ((None, 2), (1, 2), (3, 3)):
        with ActivationCache(model, directory=tmp_path, probation=probation) as cache:
            rows = [served(cache, lambda one=one: model(one)) for one in x.split(BATCH)]
            assert rows == [0] * served_from + [BATCH] * (len(rows) - served_from)
            assert cache.report().batches_compared == served_from


def _spoiled(append: Any) -> Any:
    return lambda keys, rows: append(keys, rows ^ 1)


class _Taken(nn.Module):
    """Is taken as one operation, whose code may be another one in other processes."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if torch.overrides.has_torch_function((x,)) else self.function(x)


def test_code_that_may_be_edited_is_kept_in_memory_only(tmp_path: Path) -> None:
    x = torch.randn(48, 8)
    body = nn.Sequential(nn.Linear(8, 8), _Taken(torch.sin), nn.Linear(8, 4))
    model = nn.Sequential(body.requires_grad_(False), nn.Linear(4, 2))
    with ActivationCache(model, directory=tmp_path / "cache") as cache:
        epoch(model, x, 0)
        epoch(model, x, 1)
        assert served(cache, lambda: epoch(model, x, 2)) >= 48 - BATCH
    assert any("kept in memory only" in sentence for sentence in cache.messages)
    assert rows_in(tmp_path / "cache") == 0


@pytest.mark.parametrize("what", ["an attribute", "the mode", "a switch"])
def test_rows_that_waited_are_not_written_once_something_has_changed(
    tmp_path: Path, what: str
) -> None:
    x = images(48)
    # One operation, which reads its attribute when it is run again.
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.TransformerEncoderLayer(16, 2, 32))
    model = nn.Sequential(body.requires_grad_(False).eval(), nn.Linear(16, 2))
    with ActivationCache(model, directory=tmp_path):
        epoch(model, x, 0)
        if what == "an attribute":
            body[2].norm1.eps = 0.5
        elif what == "the mode":
            model.train()
        else:
            torch.set_num_threads(2)
    body[2].norm1.eps = 1e-5
    model.eval()
    torch.set_num_threads(1)
    with ActivationCache(model, directory=tmp_path) as cache:
        for number in range(3):
            epoch(model, x, number)
        assert not any("differ" in sentence for sentence in cache.messages)


def test_rows_of_an_epoch_are_there_although_the_mode_changed_after_it(tmp_path: Path) -> None:
    model, x = net(), images(96)
    model.eval()
    with ActivationCache(model, directory=tmp_path):
        epoch(model, x, 0)
        model.train()
    model.eval()
    with ActivationCache(model, directory=tmp_path) as cache:
        epoch(model, x, 1)
        assert cache.stats.rows_served >= 96 - 4 * BATCH


@pytest.mark.parametrize("kind", ["bfloat16", "channels_last", "second axis"])
def test_rows_come_back_from_the_disk_as_they_were(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "second axis":
        body: nn.Module = _States()
        x = torch.randn(48, 6, 8)
    else:
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        x = images(48)
        if kind == "bfloat16":
            body, x = body.bfloat16(), x.bfloat16()
        else:
            x = x.contiguous(memory_format=torch.channels_last)
    head = nn.Conv2d(8, 2, 3) if kind != "second axis" else nn.Linear(8, 2)
    model = nn.Sequential(body.requires_grad_(False), head.to(x.dtype))
    with ActivationCache(model, directory=tmp_path):
        epoch(model, x, 0)
    with ActivationCache(model, directory=tmp_path) as cache:
        epoch(model, x, 1)
        assert cache.stats.rows_served >= 48 - 3 * BATCH


class _States(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).tanh()


def test_a_directory_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match=re.escape(str(path))):
        ActivationCache(net(), directory=path)
