"""The same loops on a CPU and on a GPU: cached ones end in the weights of plain ones.

Tests on a GPU are marked `gpu`, and are skipped where there is none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cachefreeze import ActivationCache
from tests.gpu.fine_tune import BATCH, EPOCHS, ROWS, Net, Pictures, Trainer, batches, net
from tests.support.programs import Programs

GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device: run it where torch finds a GPU"
)
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, GPU])
# torch warns of slow settings on some GPUs. A session on one is rare, and must not end for that.
pytestmark = pytest.mark.filterwarnings("default")
each_device = pytest.mark.parametrize("device", ["cpu", ON_GPU])
only_gpu = pytest.mark.parametrize("device", [ON_GPU])
# Rows of all epochs but the first, and of the batches that are compared before any is served.
SERVED = (EPOCHS - 1) * ROWS - 8 * BATCH


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def train(trainer: Trainer, cache: ActivationCache | None = None, **form: Any) -> Net:
    for epoch in range(EPOCHS):
        trainer.epoch(batches(trainer.device, epoch, **form))
    if cache is not None:
        assert cache.stats.rows_served >= SERVED, str(cache)
    return trainer.model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        found = other.state_dict()[name]
        assert torch.equal(tensor, found), f"{name}: {float((tensor - found).abs().max())}"


@each_device
@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(None, False), (torch.bfloat16, False), (torch.float16, True)],
    ids=["float32", "bfloat16", "float16"],
)
def test_a_cached_loop_ends_in_the_weights_of_the_plain_one(
    device: str, dtype: torch.dtype | None, scaled: bool
) -> None:
    plain = train(Trainer(net(device), dtype, scaled))
    model = net(device)
    with ActivationCache(model) as cache:
        assert_equal(train(Trainer(model, dtype, scaled), cache), plain)


@each_device
def test_rows_in_channels_last_keep_their_form(device: str) -> None:
    last = torch.channels_last
    plain = train(Trainer(net(device).to(memory_format=last)), memory_format=last)
    model = net(device).to(memory_format=last)
    with ActivationCache(model) as cache:
        assert_equal(train(Trainer(model), cache, memory_format=last), plain)


@each_device
def test_a_second_process_finds_the_rows_and_not_those_of_another_precision(
    device: str, tmp_path: Path, programs: Programs
) -> None:
    def run(precision: str, folder: str = str(tmp_path / "rows")) -> tuple[int, str]:
        done = programs.run("tests.gpu.fine_tune", device, folder, precision)
        assert done.code == 0, done.stderr
        served, found = done.stdout.split()
        return int(served), found

    plain = run("highest", "none")
    assert run("highest") == plain
    served, found = run("highest")
    assert served > 0, "the second process found no rows"
    assert found == plain[1]
    assert run("high") == run("high", "none"), "rows of another precision were served"


def assert_compiled_head_is_trained_as_without_the_cache(device: str, **options: str) -> None:
    def compiled() -> Net:
        torch.compiler.reset()
        model = net(device)
        model.head = torch.compile(model.head, **options)  # type: ignore[call-overload]
        return model

    plain = train(Trainer(compiled()))
    model = compiled()
    with ActivationCache(model) as cache:
        assert_equal(train(Trainer(model), cache), plain)


@each_device
def test_a_compiled_head_is_trained_as_without_the_cache(device: str) -> None:
    # On a CPU, generating code takes longer than all other tests here.
    backend = "inductor" if device == "cuda" else "eager"
    assert_compiled_head_is_trained_as_without_the_cache(device, backend=backend)


@only_gpu
def test_a_head_in_a_cuda_graph_is_trained_as_without_the_cache(device: str) -> None:
    assert_compiled_head_is_trained_as_without_the_cache(device, mode="reduce-overhead")


@only_gpu
def test_a_model_that_moves_to_the_gpu_in_a_run_is_served_there_too(device: str) -> None:
    def run(model: Net, cache: ActivationCache | None) -> Net:
        trainer = Trainer(model)
        for where in ("cpu", device):
            trainer.use(where)
            before = cache.stats.rows_served if cache is not None else 0
            for epoch in range(EPOCHS):
                trainer.epoch(batches(where, epoch))
            if cache is not None:
                assert cache.stats.rows_served - before >= SERVED, f"{where}: {cache}"
        return model

    plain, model = run(net("cpu"), None), net("cpu")
    with ActivationCache(model) as cache:
        assert_equal(run(model, cache), plain)


def loaded(loader: Any, device: str) -> Iterator[Any]:
    for x, y in loader:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def options(device: str) -> dict[str, Any]:
    return {
        "batch_size": BATCH, "shuffle": True, "pin_memory": device == "cuda",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip


@each_device
def test_the_loader_of_the_cache_loads_no_known_images_into_pinned_memory(device: str) -> None:
    plain, model = Trainer(net(device)), net(device)
    loader: Any = DataLoader(Pictures(), **options(device))
    for _ in range(EPOCHS):
        plain.epoch(loaded(loader, device))
    pictures, trainer = Pictures(), Trainer(model)
    with ActivationCache(model) as cache:
        loader = cache.loader(pictures, **options(device))
        for _ in range(EPOCHS):
            trainer.epoch(loaded(loader, device))
        assert cache.stats.rows_served >= SERVED, str(cache)
    assert pictures.loaded < EPOCHS * ROWS - SERVED // 2, "images were loaded in every epoch"
    assert_equal(model, plain.model)


@each_device
def test_rows_for_which_the_gpu_has_no_room_are_sent_to_it_ahead(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, trainer = Trainer(net(device)), Trainer(net(device))
    loader: Any = DataLoader(Pictures(), **options(device))
    for _ in range(EPOCHS):
        plain.epoch(loaded(loader, device))
    row = 64 * 4 + 56  # with its key
    monkeypatch.setattr(
        "cachefreeze.cache.entries.free_device_memory", lambda _: 4 * (ROWS // 3) * row
    )
    with ActivationCache(trainer.model) as cache:
        loader = cache.loader(Pictures(), **options(device))
        for _ in range(EPOCHS):
            trainer.epoch(loaded(loader, device))
        assert cache.stats.rows_served >= SERVED, str(cache)
    assert_equal(trainer.model, plain.model)


@each_device
def test_a_small_limit_is_kept_and_changes_no_weights(device: str) -> None:
    # The first rows fit. Then come more than fit, and the first ones again.
    epochs = [ROWS // 4] * 6 + [ROWS] * 2 + [ROWS // 4] * 4
    plain, trainer = Trainer(net(device)), Trainer(net(device))
    row = 64 * 4 + 56  # with its key
    with ActivationCache(trainer.model, max_bytes=ROWS // 2 * row) as cache:
        for number, rows in enumerate(epochs):
            plain.epoch(batches(device, number, rows))
            trainer.epoch(batches(device, number, rows))
            assert cache.stats.rows_kept <= ROWS // 2
            assert cache.stats.bytes <= ROWS // 2 * row
        assert cache.stats.rows_served > 0, str(cache)
    assert_equal(trainer.model, plain.model)


@only_gpu
def test_frozen_weights_leave_the_gpu_and_come_back(device: str) -> None:
    epochs = range(12)
    plain, trainer = Trainer(net(device)), Trainer(net(device))
    for number in epochs:
        plain.epoch(batches(device, number))
    frozen = [one for one in trainer.model.parameters() if not one.requires_grad]
    assert frozen
    with ActivationCache(trainer.model, offload_frozen=True):
        left = []
        for number in epochs:
            trainer.epoch(batches(device, number))
            left.append(any(type(one) is not nn.Parameter for one in frozen))
            assert all(one.device.type == device for one in frozen)
        assert any(left)
        assert_equal(trainer.model, plain.model)
        assert all(type(one) is nn.Parameter for one in frozen)


@only_gpu
def test_a_served_epoch_of_the_loader_never_waits_for_the_gpu(device: str) -> None:
    model = net(device)
    trainer = Trainer(model)
    with ActivationCache(model, verify="off") as cache:
        loader = cache.loader(Pictures(), **options(device))
        for _ in range(EPOCHS):
            trainer.epoch(loaded(loader, device))
        before = cache.stats.rows_served
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.epoch(loaded(loader, device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert cache.stats.rows_served - before == ROWS, str(cache)
