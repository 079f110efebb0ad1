"""What only a CUDA device can show. Skipped without one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cachefreeze import PrefixCache, batches_of, partition
from cachefreeze.checkpoint import load_checkpoint
from cachefreeze.models import build
from cachefreeze.randomness import random_state, set_random_state
from cachefreeze.train import main

from .conftest import Pixels, Train
from .interrupter import Interrupter, command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_read_back_on_the_device_are_the_rows_computed(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    model = build("wrn", 3, depth=10, width=1).to("cuda").to(memory_format=torch.channels_last)
    units = partition(model)
    units.freeze(3)

    class OnDevice(Pixels):
        def batches(self, order):
            return (x.to("cuda") for x in super().batches(order))

    inputs = {"train": OnDevice(37, 1)}
    cache = PrefixCache(
        units, inputs, batch_size=8, device="cuda", autocast_dtype=dtype, directory=tmp_path / "c"
    )
    order = batches_of(np.random.default_rng(0).permutation(37), 8)
    computed = torch.cat(list(cache.batches("train", order)))
    assert cache.materialize() is not None
    served = torch.cat(list(cache.batches("train", order)))
    assert served.device.type == "cuda"
    assert torch.equal(served, computed)


@pytest.mark.parametrize("arch", ["wrn10_1", "densenet16_4", "vgg11"])
def test_a_whole_run_works_with_and_without_the_cache(train: Train, arch: str) -> None:
    options = ("--device", "cuda", "--precision", "auto", "--arch", arch, "--epochs", 6)
    options += ("--t0", 0.25, "--schedule", "linear", "--lr", 0.05)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert len(cached.summary["cache"]["boundaries"]) >= 2
    # Kernels may sum in another order from run to run: close, and not promised to be equal.
    assert cached.summary["train_loss"] == pytest.approx(plain.summary["train_loss"], rel=0.2)


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
