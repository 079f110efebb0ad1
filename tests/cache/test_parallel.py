"""Threads, forked children, and models that wrappers of several processes hold."""

import atexit
import copy
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cachefreeze import ActivationCache
from cachefreeze.store.files import PARTIAL

from .harness import BATCH, assert_same, batches, images, net, plainly, served, warm


def test_calls_in_several_threads_are_right() -> None:
    model, x = net(), images(64)
    expected = {seed: [plainly(model, batch) for batch in batches(x, seed)] for seed in range(4)}
    failed: list[int] = []
    with ActivationCache(model) as cache:

        def run(seed: int) -> None:
            torch.set_num_threads(1)
            for _ in range(4):
                results = [model(batch) for batch in batches(x, seed)]
                if not all(map(torch.equal, results, expected[seed])):
                    failed.append(seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert cache.stats.rows_computed > 0


def test_backward_in_another_thread_is_right() -> None:
    model, x = net(), images()
    twin = copy.deepcopy(model)
    with ActivationCache(model) as cache:
        for epoch in range(4):
            for batch in batches(x, epoch):
                thread = threading.Thread(target=model(batch).sum().backward)
                thread.start()
                thread.join()
        assert cache.stats.rows_served > 0
    for epoch in range(4):
        for batch in batches(x, epoch):
            twin(batch).sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if one.grad is not None:
            assert_same(one.grad, other.grad)  # type: ignore[arg-type]


def test_distributed_data_parallel_around_the_model_is_served() -> None:
    model, x = net(), images()

    class Wrapped(nn.Module):
        """What DDP does: it calls the model that it was given."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.module(*args)

    wrapped = Wrapped(model)
    with ActivationCache(model) as cache:
        warm(cache, wrapped, x)


def _sizes(folder: Path) -> dict[Path, int]:
    return {one: one.stat().st_size for one in folder.rglob("*") if not one.name.endswith(PARTIAL)}


def test_a_forked_child_that_closes_the_cache_or_ends_takes_nothing_from_the_parent(
    tmp_path: Path,
) -> None:
    model, x = net(), images()
    cache = ActivationCache(model, directory=tmp_path / "rows")
    warm(cache, model, x)
    # What rows come again is written in the background.
    before, after = {}, _sizes(tmp_path / "rows")
    while before != after or not any((tmp_path / "rows").glob("*/*/values/c*")):
        time.sleep(0.1)
        before, after = after, _sizes(tmp_path / "rows")
    for end in (cache.close, atexit._run_exitfuncs):
        pid = os.fork()
        if not pid:
            signal.alarm(30)
            code = 1
            try:
                end()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert _sizes(tmp_path / "rows") == before
        assert served(cache, lambda: model(next(batches(x, 5)))) == BATCH
    cache.close()
    with ActivationCache(model, directory=tmp_path / "rows") as later:
        warm(later, model, x, epochs=1)
        assert not later.messages


def test_sharded_parameters_are_left_alone_and_the_user_is_told(tmp_path: Path) -> None:
    """A process that skipped frozen work would let the others wait for its collectives."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).requires_grad_(False)
        fully_shard(body, mesh=init_device_mesh("cpu", (1,)))
        model = nn.Sequential(body, nn.Linear(8, 2))
        x = torch.randn(4, 8)
        with ActivationCache(model) as cache:
            first = model(x)
            assert all(torch.equal(model(x), first) for _ in range(6))
            assert cache.stats.rows_served == 0
            assert any("sharded" in one for one in cache.messages)
    finally:
        dist.destroy_process_group()
