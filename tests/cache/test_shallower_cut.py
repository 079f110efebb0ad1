"""Rows on disk of a run that froze less: a later run that freezes more computes its rows from them.

Each run opens a cache of its own on the same directory, with a model built anew, as a later process
does.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import ActivationCache
from cachefreeze.store.appending import Appender

from .harness import assert_same
from .test_freezing import convolutions

BATCH, BATCHES = 4, 12
# Convolutions of a batch, and of each of the three blocks.
ALL, EACH = 6, 2
# One batch is traced, and two are compared: all of their convolutions run.
IN_FULL = 3


def block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip


class Blocks(nn.Sequential):
    """Three blocks, of which the first takes most of the time, and a head."""

    def __init__(self) -> None:
        super().__init__(block(3), block(16), block(16), nn.Flatten(), nn.Linear(16 * 64, 4))


def images() -> torch.Tensor:
    return torch.randn(BATCHES * BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trial(
    depth: int,
    directory: Path | None,
    x: torch.Tensor,
    epochs: int = 2,
    seed: int = 0,
    change_at: int = -1,
) -> tuple[nn.Module, int]:
    """Trains what lies behind the first blocks. Returns the model and the number of served rows."""
    torch.manual_seed(seed)
    model = Blocks()
    cachefreeze.freeze(*list(model)[:depth])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    cache = ActivationCache(model, directory=directory) if directory is not None else None
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for number, batch in enumerate(x[order].split(BATCH)):
            if (epoch, number) == (0, change_at):
                with torch.no_grad():
                    model[0][0].weight.mul_(0.5)
            loss = F.cross_entropy(model.train()(batch), (batch[:, 0, 0, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if cache is None:
        return model, 0
    cache.close()
    return model, cache.stats.rows_served


def in_first_epoch(depth: int, directory: Path, x: torch.Tensor) -> int:
    """Returns how many convolutions run in the first epoch."""
    return convolutions(lambda: trial(depth, directory, x, epochs=1))


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same(a, b)


def damage(folder: Path) -> None:
    for path in folder.rglob("c.*"):
        if path.parent.name == "values":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)


def test_a_deeper_run_computes_its_rows_from_those_of_a_shallower_one(tmp_path: Path) -> None:
    x = images()
    trial(1, tmp_path / "cache", x)
    assert in_first_epoch(2, tmp_path / "alone", x) == BATCHES * ALL
    # The rows of all batches but the first are computed by the second block. It runs in full passes
    # and when rows are computed, and not when they are served.
    assert in_first_epoch(2, tmp_path / "cache", x) <= IN_FULL * ALL + BATCHES * 2 * EACH
    # Now the deepest of the two that are there is the one to start from.
    assert in_first_epoch(3, tmp_path / "cache", x) <= IN_FULL * ALL + BATCHES * EACH


@pytest.mark.parametrize("depths", [(1, 2, 3), (2, 1, 3), (3, 1, 2)])
def test_weights_are_those_of_a_run_without_a_cache(
    tmp_path: Path, depths: tuple[int, ...]
) -> None:
    x = images()
    for depth in depths:
        cached, served = trial(depth, tmp_path / "cache", x)
        assert served > 0
        assert_alike(cached, trial(depth, None, x)[0])


def test_damaged_rows_of_the_shallower_run_are_computed(tmp_path: Path) -> None:
    x = images()
    trial(1, tmp_path / "cache", x)
    damage(tmp_path / "cache")
    assert in_first_epoch(2, tmp_path / "cache", x) == BATCHES * ALL
    assert_alike(trial(2, tmp_path / "cache", x)[0], trial(2, None, x)[0])


@pytest.mark.parametrize("rows", [[9, 1, 1], [1, 1, 4], [0, -1, -1], ["x"], 3, None])
def test_a_description_that_makes_no_sense_is_not_believed(tmp_path: Path, rows: object) -> None:
    x = images()
    trial(1, tmp_path / "cache", x)
    (path,) = tmp_path.glob("cache/*/*/zarr.json")
    content = json.loads(path.read_text())
    content["attributes"]["cachefreeze"]["about"]["rows"] = rows
    path.write_text(json.dumps(content))
    assert_alike(trial(2, tmp_path / "cache", x)[0], trial(2, None, x)[0])


def test_rows_of_other_weights_are_not_started_from(tmp_path: Path) -> None:
    x = images()
    trial(1, tmp_path / "cache", x, seed=1)
    assert in_first_epoch(2, tmp_path / "cache", x) == BATCHES * ALL


def test_rows_are_not_started_from_any_more_once_weights_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = images()
    trial(1, tmp_path / "cache", x)
    cached, served = trial(2, tmp_path / "cache", x, change_at=6)
    assert served > 0
    assert "differ from computed ones" not in caplog.text
    assert_alike(cached, trial(2, None, x, change_at=6)[0])


def test_wrong_rows_under_a_right_name_are_told_and_reach_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = images()
    with monkeypatch.context() as patched:
        append = Appender.append
        # Somebody's broken tool: sound chunks of numbers that are not the model's.
        patched.setattr(Appender, "append", lambda self, keys, rows: append(self, keys, rows ^ 1))
        trial(1, tmp_path / "cache", x)
    cached, served = trial(2, tmp_path / "cache", x)
    assert served == 0
    assert "differ from computed ones" in caplog.text
    assert_alike(cached, trial(2, None, x)[0])
