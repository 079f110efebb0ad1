"""DistributedDataParallel with a cache in each process, on gloo."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Programs, warm

from .loops import BATCH, LOOPS, ROWS

PROCESSES = 2


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with warm("torch.distributed") as server:
        yield server


@pytest.mark.parametrize("name", LOOPS)
def test_processes_with_one_directory_end_in_the_plain_weights_and_share_rows(
    programs: Programs, name: str, tmp_path: Path
) -> None:
    done = programs.run("tests.distributed.ranks", name, str(PROCESSES), str(tmp_path))
    assert done.code == 0, done.stderr[-3000:]
    seen: list[dict[str, Any]] = [
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)
    ]
    for one in seen:
        for cached in ("memory", "directory", "damaged"):
            assert one[cached]["weights"] == one["plain"]["weights"], cached
        assert sum(one["directory"]["served"]) > 0, one
        if name != "freezeout":  # where each freeze begins anew with other rows
            # Rows go to other processes in each epoch. Hardly any batch consists of rows that the
            # process has met before, so this many are served only if all rows are shared.
            assert one["directory"]["served"][3] >= ROWS / PROCESSES - 2 * BATCH, one
            assert one["memory"]["served"][2] < ROWS / PROCESSES / 2, one
