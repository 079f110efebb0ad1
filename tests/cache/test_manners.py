"""The cache leaves no trace in what it watches, keeps its limits, and says what limits it."""

import atexit
import copy
import gc
import io
import logging
import os
import pickle
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from cachefreeze import ActivationCache, UserError
from cachefreeze.cache import selection
from cachefreeze.store.files import PARTIAL

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


def test_rows_that_never_come_again_fill_no_more_than_the_limit_and_it_is_said() -> None:
    model = net()
    with ActivationCache(model, max_bytes=20_000) as cache:
        for seed in range(40):
            model(images(BATCH, seed))
        assert cache.stats.bytes == 0
        assert any("no row came again" in message for message in cache.messages)


def test_augmented_rows_are_told_before_the_limit_is_reached() -> None:
    model = net()
    with ActivationCache(model) as cache:
        for seed in range(20):
            model(images(BATCH, seed))
        assert any("has come again" in message for message in cache.messages)
        # It is taken back once rows do come again.
        model(images(BATCH, 3))
        assert not any("has come again" in message for message in cache.messages)


def test_dropout_and_batch_norms_in_training_mode_run_as_ever_and_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 4),
    )  # fmt: skip
    model[0].requires_grad_(False)
    model.train()
    twin = copy.deepcopy(model)
    x = images()
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                torch.manual_seed(epoch)
                one = model(batch)
                torch.manual_seed(epoch)
                with torch.no_grad():
                    assert_same(one, twin(batch))
        assert all(part.training for part in model.modules())
        assert_same(model[0][1].running_mean, twin[0][1].running_mean)
        assert any("batch norms in training mode" in message for message in cache.messages)


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


def test_a_difference_that_probation_finds_ends_serving_and_names_the_value() -> None:
    class Odd(Net):
        """One certain row moves all rows of its batch."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.body(x)
            return self.head(h + (h[:, :1].amax() > 1e6).float())

    torch.manual_seed(0)
    model, x = Odd(), images()
    x[20] = x[20] * 1e9  # in the last batch of the first epoch
    with ActivationCache(model) as cache:
        for epoch in range(4):
            for batch in [x[:8], x[8:16], x[16:]] if not epoch else batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
        assert cache.messages or cache.stats.rows_kept


def test_exact_false_serves_what_differs_by_rounding_and_says_by_how_much() -> None:
    model, x = net(), images()
    twin = copy.deepcopy(model)
    with ActivationCache(model, exact=False) as exact_not, ActivationCache(twin) as exact:
        for cache, one in ((exact_not, model), (exact, twin)):
            for batch in batches(x, 0):
                one(batch)
            cached = next(iter(cache._cached.values())).traces()[0]
            for kept in cached._collector._batches:
                for tensor in kept.kept.values():
                    tensor.mul_(1 + 1e-6)
            for number in range(1, 5):
                for batch in batches(x, number):
                    one(batch)
        assert exact.stats.rows_served == 0
        assert any("differ from computed ones" in message for message in exact.messages)
        assert exact_not.stats.rows_served > 0
        assert any("differ from computed ones" in message for message in exact_not.messages)


def test_more_signatures_than_are_followed_run_as_ever_and_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 2))
    with ActivationCache(model) as cache:
        for length in range(1, 25):
            x = torch.randn(4, length, 8)
            assert_same(model(x), plainly(model, x))
        assert any("combinations of shapes" in message for message in cache.messages)


def test_batches_padded_to_other_lengths_are_told_within_two_epochs() -> None:
    model = nn.Sequential(nn.Embedding(50, 8).requires_grad_(False), nn.Linear(8, 2))
    ids = torch.randint(1, 50, (64, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(3, 13, (64,), generator=torch.Generator().manual_seed(1))
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    with ActivationCache(model) as cache:
        for epoch in range(6):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
            for places in order.split(4):
                batch = nn.utils.rnn.pad_sequence([rows[n] for n in places], batch_first=True)
                assert_same(model(batch), plainly(model, batch))
        assert any("pad_to_multiple_of" in message for message in cache.messages)


class Texts(nn.Module):
    """A frozen encoder with masked attention, and a trained head on its pooled output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.pool = nn.Tanh()
        self.requires_grad_(False)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.mix(self.embed(ids)) * mask[..., None]
        return self.head(self.pool(h.sum(1) / mask.sum(1, keepdim=True)))


def test_texts_padded_to_the_longest_are_served_by_exact_false() -> None:
    tokens = torch.randint(1, 50, (64, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(3, 13, (64,), generator=torch.Generator().manual_seed(1))
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]

    def run(exact: bool) -> tuple[ActivationCache, list[int]]:
        model, served_in = Texts(), []
        cache = ActivationCache(model, exact=exact)
        for epoch in range(5):
            before = cache.stats.rows_served
            order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
            for places in order.split(8):
                batch = [rows[n] for n in places]
                ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
                mask = (torch.arange(ids.shape[1]) < lengths[places][:, None]).long()
                assert torch.allclose(model(ids, mask), plainly(model, ids, mask), atol=1e-6)
            served_in.append(cache.stats.rows_served - before)
        return cache, served_in

    cache, rows_served = run(exact=False)
    assert rows_served[0] == 0
    assert rows_served[-1] >= 32, (rows_served, str(cache))
    cache.close()
    cache, rows_served = run(exact=True)
    assert cache.messages or sum(rows_served)
    cache.close()


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


twice = torch.compile(lambda x: 2 * x, backend="eager")


def test_a_compiled_function_in_a_model_is_told_and_the_model_left_alone() -> None:
    class Doubled(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(twice(x))

    torch.manual_seed(0)
    model, x = Doubled(), images()
    with ActivationCache(model) as cache:
        for epoch in range(3):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))
        assert cache.stats.rows_served == 0
        assert any("under torch.compile (twice)" in message for message in cache.messages)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "needs a model"),
        ((Net,), "was given its class"),
        ((lambda x: x,), "needs a torch.nn.Module"),
        ((nn.ReLU(),), "has no parameters"),
    ],
)
def test_bad_input_is_one_sentence(given: tuple[nn.Module, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        ActivationCache(*given)
    assert str(error.value).count(". ") == 0


def test_a_second_cache_on_one_model_is_refused_until_the_first_is_closed() -> None:
    model = net()
    first = ActivationCache(model)
    with pytest.raises(UserError, match="has a cache already"):
        ActivationCache(model.body)
    first.close()
    ActivationCache(model).close()


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"probation": 0}])
def test_bad_options_are_one_sentence(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        ActivationCache(net(), **options)  # type: ignore[arg-type]


def test_a_loop_that_never_calls_the_model_is_told_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        ActivationCache(net()).close()
    assert "has seen no call" in caplog.text


def test_a_model_with_nothing_frozen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = net().requires_grad_(True)
    with caplog.at_level(logging.WARNING, "cachefreeze"), ActivationCache(model):
        F.mse_loss(model(images(4)), torch.zeros(4, 4)).backward()
    assert "No parameter of Net was frozen" in caplog.text


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


class LowRank(nn.Module):
    """What PEFT puts in the place of a layer: the layer, and a trained path beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("epochs", [4, 30])  # served, and at rest
@pytest.mark.parametrize("part", ["head", "body", "adapter"])
def test_a_part_that_is_exchanged_after_attaching_is_taken_as_it_is(part: str, epochs: int) -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        for epoch in range(epochs):
            for batch in batches(x, epoch):
                model(batch)
        if part == "head":
            model.head = nn.Linear(32, 7)
        elif part == "body":
            model.body[0] = copy.deepcopy(model.body[0])
            model.body[0].weight.data.mul_(2)  # type: ignore[operator]
        else:
            model.body[6] = LowRank(model.body[6])  # type: ignore[arg-type]
        before = cache.stats.rows_served
        for epoch in range(8):
            for batch in batches(x, epoch):
                twin = copy.deepcopy(model)
                result, expected = model(batch), twin(batch)
                assert_same(result, expected)
                trained = [
                    [p for p in one.parameters() if p.requires_grad] for one in (model, twin)
                ]
                got = torch.autograd.grad(result.sum(), trained[0])
                wanted = torch.autograd.grad(expected.sum(), trained[1])
                for one, other in zip(got, wanted, strict=True):
                    assert_same(one, other)
        assert cache.stats.rows_served - before >= 4 * BATCH


class Listed(nn.Module):
    """Layers in a list, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(192, 64), nn.Linear(64, 64)]).requires_grad_(False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("what", ["list", "sequence", "hook"])
def test_what_is_put_between_frozen_layers_while_more_freezes_is_not_passed_over(what: str) -> None:
    model, x = Listed() if what == "list" else net(), images()
    model.extra = nn.Linear(2, 2)  # frozen later on
    with ActivationCache(model) as cache:
        warm(cache, model, x, epochs=4)
        model.extra.requires_grad_(False)
        if what == "hook":
            model.body.register_forward_hook(lambda module, args, output: 2 * output)
        else:
            layers = model.layers if what == "list" else model.body
            layers[-1] = LowRank(layers[-1])  # type: ignore[index,arg-type]
        for epoch in range(6):
            for batch in batches(x, epoch):
                assert_same(model(batch), plainly(model, batch))


def test_a_model_of_which_nothing_trains_is_told_while_it_steps() -> None:
    model = net().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ActivationCache(model) as cache:
        for _ in range(8):
            assert not cache.messages
            model(images(4))
            optimizer.step()
        assert any("Nothing trains" in message for message in cache.messages)


@pytest.mark.parametrize("trains", ["head", "student", "what is not cached", "nothing at all"])
def test_frozen_models_beside_something_that_trains_are_no_mistake(trains: str) -> None:
    model, x = net().requires_grad_(False), images()
    other = nn.Linear(4, 2)
    student = net()
    with ActivationCache(model, student) as cache:
        for batch in [*batches(x, 0), *batches(x, 1), *batches(x, 2)]:
            with torch.no_grad():
                features = model(batch)
            if trains == "head":
                optimizer = torch.optim.SGD(other.parameters(), 0.1)
                other(features).sum().backward()
                optimizer.step()
            elif trains == "what is not cached":
                torch.optim.SGD(nn.Linear(2, 2).requires_grad_(False).parameters(), 0.1).step()
            elif trains == "student":
                optimizer = torch.optim.SGD([*model.parameters(), *student.parameters()], 0.1)
                F.mse_loss(student(batch), features).backward()
                optimizer.step()
    assert not any("Nothing trains" in message for message in cache.messages)


def test_a_generator_that_is_empty_is_told_and_one_as_data_set_refused() -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        once = batches(x, 0)
        cache.fill(once)
        assert not cache.messages
        cache.fill(once)
        assert any("fill was given no batch" in message for message in cache.messages)
        with pytest.raises(UserError, match=r"was given 'generator'.*give a list"):
            cache.loader(row for row in x)


class Naming(Net):
    """Is given the names of its images, which it has no use for."""

    def forward(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def test_other_strings_in_every_call_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Naming(), images(96)
    with ActivationCache(model) as cache:
        for epoch in range(2):
            for number, batch in enumerate(batches(x, epoch)):
                model(batch, [f"{epoch}-{number}-{row}.jpg" for row in range(len(batch))])
        assert cache.stats.rows_served == 0
    (told,) = (one.message for one in caplog.records if "strings" in one.message)
    assert "names of files" in told


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
