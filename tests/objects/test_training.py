"""Training with rows in an object store ends with the weights of the plain loop."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cachefreeze import ActivationCache, UserError, freeze
from cachefreeze.store import objects
from tests.support.object_server import Proxy

ROWS, BATCH, EPOCHS = 256, 32, 3


@dataclass
class Ran:
    """What a run ended with, and what it took."""

    weights: torch.Tensor
    served: int = 0
    compared: int = 0
    messages: tuple[str, ...] = ()
    slowest_step: float = 0.0
    # Requests from the start on, at the end of each epoch.
    requests: list[int] = field(default_factory=list)


def run(
    directory: str | None = None,
    local: Path | None = None,
    proxy: Proxy | None = None,
    workers: int = 0,
) -> Ran:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    )  # fmt: skip
    model = nn.Sequential(body, nn.Linear(256, 10))
    freeze(body)
    data = TensorDataset(torch.randn(ROWS, 3, 16, 16), torch.arange(ROWS) % 10)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    ran, before = Ran(model[1].weight), len(proxy.requests) if proxy else 0
    cache = ActivationCache(model, directory=directory, local=local) if directory else None
    for _ in range(EPOCHS):
        for x, y in loader:
            began = time.monotonic()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ran.slowest_step = max(ran.slowest_step, time.monotonic() - began)
        ran.requests.append(len(proxy.requests) - before if proxy else 0)
    if cache is not None:
        ran.served, ran.compared = cache.stats.rows_served, cache.report().rows_compared
        cache.close()
        ran.messages = cache.messages
    return ran


def test_a_second_machine_computes_no_row(url: str, proxy: Proxy, tmp_path: Path) -> None:
    plain = run()
    first = run(url, tmp_path / "a", proxy)
    second = run(url, tmp_path / "b", proxy)
    again = run(url, tmp_path / "b", proxy)
    for one in (first, second, again):
        assert torch.equal(one.weights, plain.weights)
        assert one.messages == ()
    for one in (second, again):
        assert one.served + one.compared == EPOCHS * ROWS, "the others are compared only"
        assert one.requests[0] == one.requests[-1], "a warm epoch makes no request"
    assert len(set(again.requests)) == 1
    # Whose rows these are, and whether there are new ones.
    assert again.requests[0] == 2


@pytest.mark.parametrize("fault", ["stalled", "503", "wrong bytes"])
def test_training_goes_on_without_the_store(
    url: str, proxy: Proxy, tmp_path: Path, fault: str, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "REQUEST_SECONDS", 30.0)
    plain = run()
    run(url, tmp_path / "a", proxy)
    proxy.fail(fault, "/values/", "/keys/", "/commits/")
    ran = run(url, tmp_path / "b", proxy)
    assert torch.equal(ran.weights, plain.weights)
    assert ran.served > 0, "rows that were computed here are served"
    assert url in ran.messages[0]
    assert len(ran.messages) <= 2
    assert ran.slowest_step < 5.0, "no step waits for a request"


def test_a_loader_with_workers_goes_on(url: str, proxy: Proxy, tmp_path: Path) -> None:
    plain = run(workers=2)
    run(url, tmp_path / "a", proxy, workers=2)
    second = run(url, tmp_path / "b", proxy, workers=2)
    assert torch.equal(second.weights, plain.weights)
    assert second.served + second.compared == EPOCHS * ROWS


def test_a_folder_of_the_user_takes_the_copies(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    run(url)
    (folder,) = (tmp_path / "caches" / "cachefreeze").iterdir()
    assert (folder / "CACHEDIR.TAG").exists()
    assert os.listdir(folder / "remote")


def test_a_local_folder_without_a_store_is_an_error(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="directory="):
        ActivationCache(model, local=tmp_path)
    with pytest.raises(UserError, match="begins with one of"):
        ActivationCache(model, directory=Path("s3://bucket/rows"))
