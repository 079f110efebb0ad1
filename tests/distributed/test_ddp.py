"""DistributedDataParallel with a cache in each process, on gloo."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.programs import Programs, warm

from .loops import BATCH, EPOCHS, LOOPS, ROWS

PROCESSES = 2


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise the processes that torchrun has started again may connect to the ended ones.
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        with warm("torch.distributed.run") as server:
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
            # A process that skips a collective, or runs it twice, holds up the others.
            assert one[cached]["collectives"] == one["plain"]["collectives"], cached
        if name == "collective":
            assert one["plain"]["collectives"] == EPOCHS * ROWS / PROCESSES / BATCH
            continue
        assert sum(one["directory"]["served"]) > 0, one
        if name != "freezeout":  # where more and more is frozen
            # Rows go to other processes in each epoch. Hardly any batch consists of rows that the
            # process has met before, so this many are served only if all rows are shared.
            assert one["directory"]["served"][3] >= ROWS / PROCESSES - 2 * BATCH, one
            assert one["memory"]["served"][2] < ROWS / PROCESSES / 2, one


def test_a_loop_goes_on_after_a_process_was_killed(programs: Programs, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    plain = programs.run("tests.distributed.restarted", str(tmp_path), "plain", port)
    assert plain.code == 0, plain.stderr[-3000:]
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=1", "--module")
    program = ("tests.distributed.restarted", str(tmp_path), "killed")
    killed = programs.run("torch.distributed.run", *options, *program)
    assert killed.code == 0, killed.stderr[-3000:]
    ended = re.findall(r"rank \d began at 2: (\d+) rows served", killed.stdout)
    assert len(ended) == 2, killed.stdout
    assert all(int(served) > ROWS / PROCESSES for served in ended), killed.stdout
    one, other = (torch.load(tmp_path / f"{how}.pt") for how in ("plain", "killed"))
    assert one["epoch"] == other["epoch"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def test_a_whole_frozen_body_is_served_before_a_head_in_pieces(
    programs: Programs, tmp_path: Path
) -> None:
    done = programs.run("tests.distributed.pieces", str(tmp_path), timeout=120)
    assert done.code == 0, done.stderr[-3000:]
    for rank in range(PROCESSES):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["cached"]["weights"] == seen["plain"]["weights"]
        assert seen["cached"]["served"] > ROWS / PROCESSES, seen["cached"]
        assert seen["cached"]["messages"] == []
        # A body in pieces runs in every step, in all processes.
        assert seen["pieces"]["weights"] == seen["plain"]["weights"]
        assert seen["pieces"]["served"] == 0
        (told,) = seen["pieces"]["messages"]
        assert told.startswith("Classifier is not cached: its frozen parameters are sharded over")
