"""What only a CUDA device can show. Skipped without one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cachefreeze import PrefixCache, Units, batches_of, partition
from cachefreeze.checkpoint import load_checkpoint
from cachefreeze.models import build
from cachefreeze.moments import Moments
from cachefreeze.randomness import random_state, set_random_state
from cachefreeze.train import main

from .conftest import Pixels, Train
from .interrupter import Interrupter, command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


class OnDevice(Pixels):
    """Rows that travel to the device when they are asked for."""

    def batches(self, order):
        return (x.to("cuda") for x in super().batches(order))


def make_units(frozen: int) -> Units:
    model = build("wrn", 3, depth=10, width=1).to("cuda").to(memory_format=torch.channels_last)
    units = partition(model)
    units.freeze(frozen)
    return units


WAYS = [
    {"tier": "device"},
    {"tier": "host"},
    {"tier": "disk"},
    {"tier": "disk", "threads": 0},
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_rows_read_back_on_the_device_are_the_rows_computed(
    tmp_path: Path, dtype: torch.dtype | None, way: dict[str, Any]
) -> None:
    units = make_units(3)
    inputs = {"train": OnDevice(517, 1)}
    options = {"batch_size": 8, "device": "cuda", "autocast_dtype": dtype}
    cache = PrefixCache(units, inputs, directory=tmp_path / "c", **way, **options)
    order = batches_of(np.random.default_rng(0).permutation(517), 8)
    computed = torch.cat(list(cache.batches("train", order)))
    assert cache.materialize() is not None
    assert cache.tier == way["tier"]
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        served = []
        for x in cache.batches("train", order):
            # Work that is still under way when the next rows arrive.
            busy = (busy @ busy).clamp_(-1, 1)
            served.append(x + 0)
            del x
        assert torch.equal(torch.cat(served), computed)
    cache.close()
    with PrefixCache(units, inputs, directory=tmp_path / "c", **way, **options) as again:
        found = again.materialize()
        assert found is not None
        assert found.reused, "what was written in the background is whole"
        assert torch.equal(torch.cat(list(again.batches("train", order))), computed)


def test_moments_are_of_the_devices_work_and_not_of_asking_for_it() -> None:
    moments = Moments(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        start = moments.now()
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
        end = moments.now()
        asked = moments.has_come(end)
        seconds = moments.seconds(start, end)
    assert not asked
    assert 1e-4 < seconds < 10


@pytest.mark.parametrize("arch", ["wrn10_1", "densenet16_4", "vgg11"])
def test_a_whole_run_works_with_and_without_the_cache(train: Train, arch: str) -> None:
    options = ("--device", "cuda", "--precision", "auto", "--arch", arch, "--epochs", 6)
    options += ("--t0", 0.25, "--schedule", "linear", "--lr", 0.05)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert len(cached.summary["cache"]["boundaries"]) >= 2
    # Kernels may sum in another order from run to run: close, and not promised to be equal.
    assert cached.summary["train_loss"] == pytest.approx(plain.summary["train_loss"], rel=0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_with_deterministic_the_weights_are_those_of_a_run_without_the_cache(
    train: Train, tier: str, precision: str
) -> None:
    options = ("--device", "cuda", "--deterministic", "--precision", precision)
    options += ("--arch", "wrn10_1", "--epochs", 6, "--t0", 0.25, "--schedule", "linear")
    cached = train(*options, "--lr", 0.05, "--cache-tier", tier, "--verify-cache")
    plain = train(*options, "--lr", 0.05, "--no-cache")
    assert {event["tier"] for event in cached.summary["cache"]["boundaries"]} == {tier}
    assert cached.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_random_state_of_the_device_goes_on_where_it_was() -> None:
    device = torch.device("cuda")
    torch.rand(3, device=device)
    saved = random_state(device)
    drawn = torch.rand(5, device=device)
    set_random_state(saved, device)
    assert torch.equal(torch.rand(5, device=device), drawn)


def test_an_interrupted_run_goes_on_and_verifies_its_rows(
    images: Path, tmp_path: Path, interrupt: Interrupter
) -> None:
    argv = [*command(images, tmp_path, "wrn"), "--device", "cuda", "--verify-cache"]
    interrupt(12)
    assert main(argv) == 130
    interrupt.no_more()
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 12
    assert "cuda" in state["random"]
    assert main(["--resume", str(tmp_path / "run")]) == 0
