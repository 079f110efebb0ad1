"""The cache leaves no trace in what it watches, and keeps its limits."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from cachefreeze import ActivationCache, UserError
from cachefreeze.cache import selection

from .harness import BATCH, Net, assert_same, batches, images, net, plainly, served, warm


def test_models_pickles_and_copies_are_as_without_a_cache() -> None:
    model, x = net(), images()
    before = pickle.dumps(model)
    keys, attributes = list(model.state_dict()), [set(vars(part)) for part in model.modules()]
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        assert pickle.dumps(model) == before
        assert list(model.state_dict()) == keys
        assert [set(vars(part)) for part in model.modules()] == attributes
        assert isinstance(model, Net)
        file = io.BytesIO()
        torch.save(model, file)
        assert type(copy.deepcopy(model)) is Net


def test_closing_and_the_garbage_collector_restore_everything() -> None:
    original = nn.Module.__call__
    model, x = net(), images()
    cache = ActivationCache(model)
    assert nn.Module.__call__ is not original
    warm(cache, model, x)
    cache.close()
    cache.close()  # again is no error
    assert nn.Module.__call__ is original
    assert cache.stats.bytes == 0
    cache = ActivationCache(model)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert nn.Module.__call__ is original
    assert_same(model(x), plainly(model, x))


def test_a_cache_that_is_an_attribute_of_its_model_changes_nothing() -> None:
    model, x = net(), images()
    model.cache = ActivationCache(model)  # type: ignore[assignment]
    warm(model.cache, model, x)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    assert twin.cache.stats.bytes == 0  # type: ignore[union-attr]
    assert_same(twin(x[:BATCH]), model(x[:BATCH]))
    del twin
    model.cache.close()  # type: ignore[operator,union-attr]


def test_hooks_of_others_see_every_call() -> None:
    model, x = net(), images()
    outer: list[torch.Size] = []
    inner: list[float] = []
    model.register_forward_hook(lambda module, args, output: outer.append(output.shape))
    model.body[3].register_forward_hook(
        lambda module, args, output: inner.append(output.sum().item())
    )
    with ActivationCache(model) as cache:
        for epoch in range(4):
            for batch in batches(x, epoch):
                model(batch)
        assert len(outer) == len(inner) == 12
        plain = copy.deepcopy(model)
        for batch in batches(x, 0):
            plain(batch)
        assert inner[:3] == inner[12:15]
        assert cache.stats.rows_computed > 0


def test_the_limit_holds_and_rows_that_were_not_used_for_longest_go() -> None:
    model, x = net(), images(240)
    row = 32 * 4 + 40
    with ActivationCache(model, max_bytes=100 * row) as cache:
        for _ in range(3):
            for start in range(0, 80, BATCH):
                model(x[start : start + BATCH])
                assert cache.stats.bytes <= 100 * row + 8192
        for _ in range(2):
            for start in range(0, 240, BATCH):
                batch = x[start : start + BATCH]
                assert_same(model(batch), plainly(model, batch))
                assert cache.stats.bytes <= 100 * row + 8192
        assert cache.stats.rows_kept < 100
        assert "dropped to make room" in str(cache)


def test_rows_that_depend_on_their_batch_are_never_served() -> None:
    class Centred(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.body(x)
            return self.head(h - h.mean(0))

    torch.manual_seed(0)
    model, x = Centred(), images()
    with ActivationCache(model) as cache:
        for epoch in range(5):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
        # The body's own output may be served, what is centred may not.
        assert cache.stats.rows_computed > 0


def test_a_model_with_little_frozen_work_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "LEAST_SHARE", 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), *[nn.Linear(512, 512)] * 0)
    model = nn.Sequential(
        nn.Linear(512, 2).requires_grad_(False), nn.Linear(2, 2048), nn.Linear(2048, 2048)
    )
    x = torch.randn(64, 512)
    with ActivationCache(model) as cache:
        for _ in range(3):
            assert_same(model(x), plainly(model, x))
        assert cache.stats.bytes == 0
        assert any("could be left out" in message for message in cache.messages)


def test_an_error_in_the_model_goes_to_the_caller_and_the_cache_goes_on() -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 5, 8, 8))
        assert served(cache, lambda: [model(batch) for batch in batches(x, 8)]) >= 2 * BATCH


def test_served_values_are_the_loops_own() -> None:
    model, x = net(), images()
    taken: list[torch.Tensor] = []

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.net.body(x)
            result = self.net.head(h)
            h.mul_(0.0)  # writes to a kept value
            return result

    model = Writing()  # type: ignore[assignment]
    with ActivationCache(model) as cache:
        for epoch in range(6):
            for batch in batches(x, epoch):
                result = model(batch)
                assert_same(result, plainly(model, batch))
                taken.append(result)
        assert cache.stats.rows_served > 0


def test_compiled_models_are_right() -> None:
    model, x = net(), images()
    compiled = torch.compile(model, backend="eager")
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                assert_same(compiled(batch), plainly(model, batch))
        assert cache.stats.rows_served or cache.messages


def test_a_compiled_frozen_backbone_is_served() -> None:
    model, x = net(), images()
    model.body = torch.compile(model.body, backend="eager")  # type: ignore[assignment]
    with ActivationCache(model) as cache:
        for epoch in range(4):
            for batch in batches(x, epoch):
                model(batch)
        assert cache.stats.rows_served > 0, str(cache)


def test_a_second_cache_on_one_model_is_refused_until_the_first_is_closed() -> None:
    model = net()
    first = ActivationCache(model)
    with pytest.raises(UserError, match="has a cache already"):
        ActivationCache(model.body)
    first.close()
    ActivationCache(model).close()
