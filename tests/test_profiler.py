"""Measuring leaves the run as it was, and gives numbers of the right things."""

import copy
import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cachefreeze.data import ArrayImages, InputRows
from cachefreeze.files import size_of_tree
from cachefreeze.hashing import weights_sha256
from cachefreeze.models import build
from cachefreeze.models.partition import partition
from cachefreeze.models.units import Units
from cachefreeze.planner import Keep
from cachefreeze.profiler import Profile, Residence, StepClock, measure, passes_for, profile
from cachefreeze.scratch import measure_disk
from cachefreeze.store import prepare_cache_dir

from .conftest import file_size_limit

SPLITS = {"train": 150, "val": 33}


@pytest.fixture
def model() -> nn.Sequential:
    return build("wrn", 3, depth=10, width=1, dropout=0.3).to(memory_format=torch.channels_last)


def inputs_and_pixels(rows: int) -> tuple[InputRows, torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    images = ArrayImages(pixels, np.zeros(40, np.int64))
    inputs = InputRows(images, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    return inputs, images.sample(rows).permute(0, 3, 1, 2)


def measured(
    model: nn.Sequential,
    folder: Path,
    *,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
    **options: object,
) -> Profile:
    prepare_cache_dir(folder)
    inputs, pixels = inputs_and_pixels(batch_size)
    arithmetic = measure(
        partition(model),
        inputs.from_pixels(pixels),
        passes=3,
        device=torch.device("cpu"),
        autocast_dtype=autocast_dtype,
    )
    arguments: dict[str, object] = {
        "row_passes": 1e5,
        "device": torch.device("cpu"),
        "decode_seconds": 1e-4,
        "directory": folder,
    }
    return profile(arithmetic, inputs, pixels, **{**arguments, **options})  # type: ignore[arg-type]


def test_it_touches_no_state_of_the_run(model: nn.Sequential, tmp_path: Path) -> None:
    units = partition(model)
    units.freeze(2)
    model.train()
    before = weights_sha256(copy.deepcopy(model.state_dict()))
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    measured(model, tmp_path / "cache")
    assert weights_sha256(model.state_dict()) == before
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]  # type: ignore[union-attr]


def test_it_leaves_nothing_on_the_disk(model: nn.Sequential, tmp_path: Path) -> None:
    measured(model, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["CACHEDIR.TAG"]


def test_it_measures_every_unit_and_every_boundary(model: nn.Sequential, tmp_path: Path) -> None:
    found = measured(model, tmp_path / "cache")
    assert len(found.train) == len(found.forward) == 5
    assert all(seconds > 0 for seconds in (*found.train, *found.forward))
    assert sum(found.train) > sum(found.forward), "training is forward and backward"
    shapes = [boundary.row_shape for boundary in found.boundaries]
    assert shapes == [(16, 16, 16), (16, 16, 16), (8, 8, 32), (4, 4, 64)]
    assert {boundary.dtype for boundary in found.boundaries} == {"float32"}
    assert found.pixel_bytes == 16 * 16 * 3
    assert min(found.write, found.read, found.verify, found.store, found.normalize) > 0


def test_half_the_bytes_under_autocast(model: nn.Sequential, tmp_path: Path) -> None:
    own = measured(model, tmp_path / "cache").costs(SPLITS, "raw")
    half = measured(model, tmp_path / "cache", autocast_dtype=torch.bfloat16).costs(SPLITS, "raw")
    for one, other in zip(own.keeps[1:], half.keeps[1:], strict=True):
        assert other.row_bytes < 0.6 * one.row_bytes


@pytest.mark.parametrize(("stored", "share"), [("bfloat16", 2), ("int8", 4)])
def test_what_is_stored_smaller_is_planned_smaller(
    model: nn.Sequential, tmp_path: Path, stored: str, share: int
) -> None:
    own = measured(model, tmp_path / "cache").costs(SPLITS, "raw")
    less = measured(model, tmp_path / "cache", stored=stored).costs(SPLITS, "raw")
    for one, other in zip(own.keeps[1:], less.keeps[1:], strict=True):
        assert other.row_bytes < 1.2 / share * one.row_bytes


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_what_loses_precision_is_on_disk_before_it_is_in_memory(
    model: nn.Sequential, tmp_path: Path, codec: str
) -> None:
    def kept(stored: str | None, tier: str) -> Keep:
        found = measured(model, tmp_path / "cache", stored=stored, codec=codec)
        residence = Residence(lambda needed: tier, beside=4)
        found = dataclasses.replace(found, write=1e-3, read=1e-4, verify=1e-5)
        return next(k for k in found.costs(SPLITS, codec, residence).keeps if k.boundary == 1)

    values = 16 * 16 * 16
    own, rounded = kept(None, "device"), kept("bfloat16", "device")
    assert (own.write, own.load) == (0.0, 0.0), "in the background, from memory"
    # A quarter of the writing, with four threads, and all of the reading.
    share = 1 if codec == "raw" else 0.5  # of their bytes at the least
    assert rounded.write > 2 * values * share * 1e-3 / 4
    assert rounded.load > 0.99 * 2 * values * 1e-4
    assert kept("bfloat16", "disk").write == pytest.approx(rounded.write, rel=0.01)


def test_what_is_found_compressed_is_decoded_once(model: nn.Sequential, tmp_path: Path) -> None:
    found = measured(model, tmp_path / "cache", codec="zstd")
    boundary = found.boundaries[0]
    zstd = boundary.codecs["zstd"]
    once = boundary.row_bytes * (zstd.ratio * found.read + zstd.decode)
    for tier in ("disk", "device"):
        residence = Residence(lambda needed, tier=tier: tier, beside=4)
        keep = next(k for k in found.costs(SPLITS, "zstd", residence).keeps if k.boundary == 1)
        assert keep.verify + keep.load == pytest.approx(once)


def test_the_sizes_planned_with_are_those_on_disk(model: nn.Sequential, tmp_path: Path) -> None:
    from cachefreeze import PrefixCache

    from .test_cache import Pixels

    costs = measured(model, tmp_path / "cache").costs({"train": 37, "val": 10}, "raw")
    units = partition(model)
    units.freeze(4)
    inputs = {"train": Pixels(37, 1), "val": Pixels(10, 2)}
    cache = PrefixCache(units, inputs, batch_size=8, directory=tmp_path / "cache")
    for boundary in (1, 2, 3, 4):
        done = cache.materialize(boundary)
        assert done is not None
        (keep,) = (keep for keep in costs.keeps if keep.boundary == boundary)
        assert cache.store is not None
        assert size_of_tree(cache.store.folder) <= keep.row_bytes * 47 <= done.bytes + 20_000


def test_codecs_are_tried_only_when_asked_for(model: nn.Sequential, tmp_path: Path) -> None:
    def kept(codec: str) -> set[tuple[str, bool]]:
        costs = measured(model, tmp_path / "cache", codec=codec).costs(SPLITS, codec)
        return {(keep.codec, keep.reserve) for keep in costs.keeps if keep.boundary}

    assert kept("raw") == {("raw", False)}
    assert kept("zstd") == {("zstd", False)}
    assert kept("auto") == {("raw", False), ("lz4", True), ("zstd", True)}


def test_pixels_are_worth_keeping_only_where_they_are_decoded(
    model: nn.Sequential, tmp_path: Path
) -> None:
    found = measured(model, tmp_path / "cache", decode_seconds=0.0)
    assert min(keep.boundary for keep in found.costs(SPLITS, "raw").keeps) == 1


def test_a_disk_that_takes_nothing_leaves_nothing_to_keep(
    model: nn.Sequential, tmp_path: Path
) -> None:
    for options in ({"max_bytes": 0.0}, {"directory": tmp_path / "cache" / "not there"}):
        found = measured(model, tmp_path / "cache", **options)  # type: ignore[arg-type]
        assert found.problem
        assert found.costs(SPLITS, "raw").keeps == ()
    with file_size_limit(1000):
        found = measured(model, tmp_path / "cache")
    assert found.problem == "the cache folder cannot be written: File too large"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["CACHEDIR.TAG"]


@pytest.mark.parametrize("row_passes", [40, 5_000, 20_000, 1e6])
def test_it_goes_through_no_more_than_a_hundredth_of_the_run(row_passes: float) -> None:
    # A pass in eval mode and one in training mode: 1.4 training steps.
    assert passes_for(row_passes, 64) * 64 * 1.4 <= 0.01 * row_passes


def test_long_runs_are_measured_well_and_short_ones_not_beforehand() -> None:
    assert passes_for(float("inf"), 64) == 6
    assert passes_for(50_000 * 100, 128) == 6
    assert passes_for(300 * 64, 64) < 2


@pytest.mark.parametrize("held", [0, 8_000_000, 8_990_000])
def test_the_scratch_store_keeps_to_the_budget_of_the_folder(tmp_path: Path, held: int) -> None:
    from .test_replanning import Watcher

    prepare_cache_dir(tmp_path / "cache")
    (tmp_path / "cache" / "left").write_bytes(bytes(held))
    with Watcher(tmp_path / "cache") as watched:
        disk = measure_disk(tmp_path / "cache", 5000, 9e6, seconds=60)
    assert watched.peak <= 9e6
    assert disk.problem is None
    assert min(disk.write, disk.read, disk.verify, disk.store) > 0


def test_a_batch_of_one_row_is_measured(model: nn.Sequential, tmp_path: Path) -> None:
    assert measured(model, tmp_path / "cache", batch_size=1).rows == 1


def train_steps(model: nn.Sequential, rows: Sequence[int], *, clocked: bool) -> StepClock | None:
    """A few steps as the trainer takes them, each on so many rows."""
    units = Units(dict(model.named_children()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clock = StepClock(units, optimizer, torch.device("cpu")) if clocked else None
    model.train()
    for count in rows:
        inputs, pixels = inputs_and_pixels(count)
        labels = torch.arange(count) % 3
        start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(units.run(inputs.from_pixels(pixels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clock is not None:
            clock.step_taken(start, time.perf_counter())
    return clock


def test_the_first_steps_are_measured_without_changing_them(model: nn.Sequential) -> None:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    clock = train_steps(model, (8, 8, 8), clocked=True)
    assert clock is not None
    clock.result()
    clock.stop()
    torch.manual_seed(1)
    train_steps(other, (8, 8, 8), clocked=False)
    assert weights_sha256(model.state_dict()) == weights_sha256(other.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_a_short_batch_among_them_is_counted_as_short(model: nn.Sequential) -> None:
    clock = train_steps(model, (32, 32, 2), clocked=True)
    assert clock is not None
    # What the clock saw, replaced by round figures: a row takes a second in every unit.
    clock._rows = [32, 32, 2]
    clock._origin = 0.0
    clock._forward = [[(0.0, 32.0), (0.0, 32.0), (0.0, 2.0)] for _ in range(5)]
    clock._marks = [[32.0 * (5 - n), 32.0 * (5 - n), 2.0 * (5 - n)] for n in range(6)]
    clock._steps = [(0.0, 400.0), (400.0, 720.0), (720.0, 740.0)]
    found = clock.result()
    assert found.forward == pytest.approx((1.0,) * 5)
    assert found.train == pytest.approx((2.0,) * 5)
    assert found.step == pytest.approx(0.0)


def test_a_unit_without_parameters_in_front_is_no_obstacle() -> None:
    plain = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    plain(torch.zeros(2, 3, 16, 16))
    clock = train_steps(plain, (8, 8, 8), clocked=True)
    assert clock is not None
    found = clock.result()
    assert found.train[0] == pytest.approx(found.forward[0])
    assert found.train[1] > found.forward[1]


def test_the_first_steps_tell_what_measuring_beforehand_tells(model: nn.Sequential) -> None:
    model = build("wrn", 3, depth=10, width=8)  # large enough that a step is arithmetic
    inputs, pixels = inputs_and_pixels(8)
    clock = train_steps(model, (8, 8, 8, 8), clocked=True)
    assert clock is not None
    found = clock.result()
    device = torch.device("cpu")
    x = inputs.from_pixels(pixels)
    other = measure(partition(model), x, passes=4, device=device, autocast_dtype=None)
    assert [y.shape for y in found.outputs] == [y.shape for y in other.outputs]
    assert found.rows == other.rows
    assert all(seconds > 0 for seconds in (*found.train, *found.forward))
    # Which units are dear and which are cheap, not by how much: clocks do not decide tests.
    assert found.train[4] < found.train[3]
    assert found.train[0] < found.train[1]
    assert all(f < t for f, t in zip(found.forward, found.train, strict=True))
