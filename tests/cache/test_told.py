"""What limits the cache, or makes it useless, is told."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cachefreeze import ActivationCache, UserError

from .harness import BATCH, Net, assert_same, batches, images, net, plainly


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
