"""A later run finds the items of one before, and loads what was changed in between."""

import os
from pathlib import Path

import pytest

from cachefreeze import ActivationCache
from tests.cache.loading import BATCH, ROWS, Files, Net, fours, same
from tests.support.programs import Programs

# How fast an item loads decides nothing here.
pytestmark = pytest.mark.usefixtures("no_item_is_cheap")


def test_a_later_run_finds_items_and_does_not_load_them(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(pictures), directory=place, arguments=fours)
    again = same(lambda: Files(pictures), directory=place, arguments=fours)
    # Three batches are computed and compared.
    assert again.loads[0] < ROWS
    assert min(again.loads[1:]) <= 2


def test_a_later_run_loads_what_was_changed_in_between(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(pictures), directory=place)
    path = pictures / "03.jpg"
    before = path.stat()
    path.write_bytes((pictures / "04.jpg").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    same(lambda: Files(pictures), directory=place)


PROGRAM = """
import sys
import torch
from pathlib import Path
from cachefreeze.cache import lazy_loading
from tests.cache import loading
lazy_loading._CHEAP = 0.0
dataset, directory = loading.Files(Path(sys.argv[1])), Path(sys.argv[2])
run = loading.Run(True, dataset, 3, directory=directory, arguments=loading.fours)
print(run.loads, run.losses)
"""


def test_another_process_finds_items_and_does_not_load_them(
    pictures: Path, tmp_path: Path, programs: Programs
) -> None:
    told, program = [], tmp_path / "program.py"
    program.write_text(PROGRAM)
    for _ in range(2):
        done = programs.run(program, str(pictures), str(tmp_path / "cache"))
        assert done.code == 0, done.stderr[-2000:]
        told.append(done.stdout.split("] ["))
    assert told[0][1] == told[1][1]
    assert told[0][0].startswith(f"[{ROWS}, ")
    first, second, third = map(int, told[1][0].strip("[").split(","))
    assert first < ROWS
    assert second + third <= 4


def test_a_damaged_file_of_items_is_not_used(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(pictures), directory=place)
    (kept,) = (place / "items").glob("*.npz")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert same(lambda: Files(pictures), directory=place).loads[0] == ROWS


def test_a_data_set_that_is_made_anew_is_known(pictures: Path) -> None:
    model = Net()
    with ActivationCache(model) as cache:
        loads = []
        for _ in range(5):
            dataset = Files(pictures)
            for x, _ in cache.loader(dataset, BATCH, shuffle=True):
                model(x)
            loads.append(dataset.loads)
    assert loads[0] == ROWS
    assert min(loads) <= 2
