"""What is served, and when: counted in rows, with the results of the plain loop to the bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cachefreeze
from cachefreeze import ActivationCache

from .harness import BATCH, Net, assert_same, batches, images, net, plainly, served, warm


def epoch(model: Callable[..., torch.Tensor], x: torch.Tensor, number: int) -> None:
    for batch in batches(x, number):
        model(batch)


def test_the_second_epoch_is_served_but_for_the_batches_that_are_compared() -> None:
    model, x = net(), images(80)
    with ActivationCache(model) as cache:
        epoch(model, x, 0)
        assert cache.stats.rows_served == 0
        # A quarter of the ten batches of the first epoch: two.
        assert served(cache, lambda: epoch(model, x, 1)) == 80 - 2 * BATCH
        assert cache.stats.rows_kept == 80


@pytest.mark.parametrize(("last", "compared"), [(F.relu, 2), (lambda x: x.cumsum(1), 5)])
def test_more_batches_are_compared_where_a_kernel_is_not_known_to_be_steady(
    last: Callable[[torch.Tensor], torch.Tensor], compared: int
) -> None:
    if torch.get_num_threads() > 1:
        pytest.skip("kernels are known to be steady on one thread only")

    class Body(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(last(self.body(x)))

    torch.manual_seed(0)
    model, x = Body(), images(160)
    with ActivationCache(model) as cache:
        epoch(model, x, 0)
        rows = [served(cache, lambda: model(batch)) for batch in batches(x, 1)]  # noqa: B023
        assert rows[: compared + 1] == [0] * compared + [BATCH]


def test_rows_of_a_short_last_batch_are_known_in_the_second_epoch() -> None:
    model, x = net(), images(45)
    with ActivationCache(model) as cache:
        epoch(model, x, 0)
        # Five whole batches, of which two are compared; the short one runs.
        assert served(cache, lambda: epoch(model, x, 1)) == 3 * BATCH
        assert served(cache, lambda: epoch(model, x, 2)) == 5 * BATCH


def test_a_batch_with_new_rows_runs_and_all_others_are_served() -> None:
    model, x = net(), images(160)
    new = images(160, seed=9)
    with ActivationCache(model) as cache:
        epoch(model, x, 0)
        epoch(model, x, 1)
        x[[3, 77]] = new[[3, 77]]
        with_new = sum(
            any(torch.equal(row, new[place]) for row in batch for place in (3, 77))
            for batch in batches(x, 2)
        )
        assert 0 < with_new <= 2
        rows = served(cache, lambda: epoch(model, x, 2))
        assert rows >= 160 - (with_new + 1) * BATCH  # and one sample
        for batch in batches(x, 3):
            assert_same(model(batch), plainly(model, batch))
        assert served(cache, lambda: epoch(model, x, 4)) >= 160 - 2 * BATCH


def test_training_ends_with_the_same_weights_losses_and_random_state() -> None:
    x, y = images(40), torch.arange(40) % 4

    def train(cached: bool) -> tuple[list[float], nn.Module, torch.Tensor]:
        model = net()
        model.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, 4))  # type: ignore[assignment]
        model.train()
        model.body.eval()
        cache = ActivationCache(model) if cached else None
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        losses = []
        for number in range(4):
            order = torch.randperm(40, generator=torch.Generator().manual_seed(number))
            for places in order.split(BATCH):
                loss = F.cross_entropy(model(x[places]), y[places])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        if cache is not None:
            assert cache.stats.rows_served > 60
            cache.close()
        return losses, model, torch.get_rng_state()

    losses, model, state = train(cached=False)
    with_cache = train(cached=True)
    assert losses == with_cache[0]
    for one, other in zip(model.parameters(), with_cache[1].parameters(), strict=True):
        assert_same(one, other)
    assert torch.equal(state, with_cache[2])


class Pairs(nn.Module):
    """A frozen encoder that runs on the left and on the right of a pair, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = net().body
        self.head = nn.Linear(32, 8)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        one, other = self.head(self.encoder(left)), self.head(self.encoder(right))
        return (one - other).norm(dim=1)


def test_pairs_that_are_mined_anew_are_served_image_by_image() -> None:
    torch.manual_seed(0)
    model, x = Pairs(), images(48)
    with ActivationCache(model) as cache:
        for number in range(3):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(number))
            for places in order.split(2 * BATCH):
                left, right = x[places[:BATCH]], x[places[BATCH:]]
                assert_same(model(left, right), plainly(model, left, right))
        # Left and right share their rows: 48 images, not 96.
        assert cache.stats.rows_kept == 48
        places = torch.randperm(48, generator=torch.Generator().manual_seed(7))
        assert served(cache, lambda: model(x[places[:8]], x[places[8:16]])) == BATCH


class WithLoss(nn.Module):
    """A model that takes labels and gives a loss, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.net(x), labels)


def test_labels_are_in_no_key() -> None:
    model, x = WithLoss(), images()
    labels = torch.arange(24) % 4
    with ActivationCache(model) as cache:
        for number in range(4):
            for place in range(0, 24, BATCH):
                rows = slice(place, place + BATCH)
                model(x[rows], (labels[rows] + number) % 4)
        assert cache.stats.rows_served >= 24
        result = model(x[:BATCH], labels[8:16])
        assert_same(result, plainly(model, x[:BATCH], labels[8:16]))


def test_two_models_with_the_same_frozen_part_share_their_rows() -> None:
    one, other, x = net(), net(), images()
    other.head = nn.Linear(32, 9)
    with ActivationCache(one, other) as cache:
        warm(cache, one, x)
        kept = cache.stats.bytes
        epoch(other, x, 0)
        epoch(other, x, 1)
        # Its own rows come again in its second epoch; they are those of the other model.
        assert served(cache, lambda: epoch(other, x, 2)) >= 2 * BATCH
        assert cache.stats.bytes == kept
        for batch in batches(x, 3):
            assert_same(other(batch), plainly(other, batch))


def test_calls_of_parts_by_the_loop_are_served() -> None:
    model, x = net(), images()

    def step(batch: torch.Tensor) -> torch.Tensor:
        return model.head(model.body(batch) * 2)

    with ActivationCache(model) as cache:
        warm(cache, step, x)
        for batch in batches(x, 5):
            assert_same(step(batch), copy.deepcopy(model.head)(plainly(model.body, batch) * 2))


def test_a_walk_over_the_blocks_by_hand_is_served() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)]).requires_grad_(False)
    head = nn.Linear(16, 2)
    x = torch.randn(24, 16)

    def step(batch: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            batch = torch.relu(block(batch))
        return head(batch)

    expected = [step(batch) for batch in batches(x, 5)]
    with ActivationCache(blocks) as cache:
        for number in range(3):
            epoch(step, x, number)
        for batch, result in zip(batches(x, 5), expected, strict=True):
            assert_same(step(batch), result)
        assert cache.stats.rows_served >= 4 * 24


class Crops(nn.Module):
    """Joins the crops of an image before the frozen backbone, as multi-crop training does."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net().body
        self.head = nn.Linear(32, 4)

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return self.head(self.backbone(torch.cat(crops)))


def test_a_backbone_inside_a_call_that_joins_inputs_is_cached_by_itself() -> None:
    torch.manual_seed(0)
    model, x = Crops(), images(32)
    with ActivationCache(model) as cache:
        for number in range(4):
            order = torch.randperm(32, generator=torch.Generator().manual_seed(number))
            for places in order.split(BATCH):
                crops = [x[places[:4]], x[places[4:]]]
                assert_same(model(crops), plainly(model, crops))
        assert cache.stats.rows_served >= 32, str(cache)


def test_when_more_freezes_the_rows_before_serve_to_compute_those_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)])
    model[:3].requires_grad_(False)
    x = torch.randn(64, 16)
    ran: list[int] = []
    original, first = torch.nn.functional.linear, model[0][0].weight

    def counting(one: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        ran.append(weight is first)
        return original(one, weight, *rest)

    # From the start: another function would be other frozen work.
    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    with ActivationCache(model) as cache:
        for number in range(3):
            epoch(model, x, number)
        model[:5].requires_grad_(False)
        # The first batch is traced; from then on the first frozen layer need not run.
        model(x[:BATCH])
        ran.clear()
        result = [model(batch) for batch in batches(x, 5)]
        counted = sum(ran)
        for batch, one in zip(batches(x, 5), result, strict=True):
            assert_same(one, plainly(model, batch))
        # Batches of the probation run as a whole, and no other.
        assert 0 < counted <= 4
        assert cache.stats.rows_served > 64


def test_thawing_serves_no_frozen_value_and_freezing_again_serves_at_once() -> None:
    model, x = net(), images()
    with ActivationCache(model) as cache:
        warm(cache, model, x)
        model.body.requires_grad_(True)
        loss = model(x[:BATCH]).sum()
        loss.backward()
        assert model.body[0].weight.grad is not None
        model.body.requires_grad_(False)
        assert served(cache, lambda: epoch(model, x, 5)) >= 2 * BATCH


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_validation_of_another_size_and_without_gradients_is_served_too(cut: int) -> None:
    model, x = net(), images(48)
    with ActivationCache(model) as cache:
        for number in range(4):
            model.train()
            model.body.eval()
            epoch(model, x, number)
            model.eval()
            with torch.no_grad():
                for place in range(0, 48, 8 * cut):
                    batch = x[place : place + 8 * cut]
                    assert_same(model(batch), plainly(model, batch))
        before = cache.stats.rows_served
        with torch.no_grad():
            model(x[: 8 * cut])
        assert cache.stats.rows_served >= before


def test_fill_keeps_rows_before_training_and_changes_nothing_else() -> None:
    model, x = net(), images(40)
    model.head = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 4))  # type: ignore[assignment]
    model.train()
    model.body.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with ActivationCache(model) as cache:
        cache.fill((batch, None) for batch in batches(x, 0))
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(model.state_dict().values(), before.values(), strict=True):
            assert_same(one, other)
        # The first epoch is served but for the two batches of the probation.
        assert served(cache, lambda: epoch(model, x, 1)) == 40 - 2 * BATCH


def test_freeze_holds_eval_mode_and_unfreeze_gives_it_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2))
    cachefreeze.freeze(model[:2])
    model.train()
    assert not model[0].weight.requires_grad
    assert not model[1].training
    assert model[2].training
    cachefreeze.unfreeze(model[:2])
    assert model[0].weight.requires_grad
    assert model[1].training
    assert not model.eval()[1].training


def test_a_copy_of_the_model_is_a_plain_model() -> None:
    model, x = Net(), images()
    with ActivationCache(model) as cache:
        twin = copy.deepcopy(model)
        warm(cache, model, x)
        before = cache.stats
        rows = before.rows_served, before.rows_computed
        assert_same(twin(x[:BATCH]), plainly(model, x[:BATCH]))
        assert (cache.stats.rows_served, cache.stats.rows_computed) == rows


def test_a_model_that_gets_a_new_forward_for_each_call_is_served_by_its_parts() -> None:
    model, x = net(), images()
    own = model.forward

    def step(batch: torch.Tensor) -> torch.Tensor:
        """Runs a method as Lightning does if the model is wrapped."""

        def forward(batch: torch.Tensor) -> torch.Tensor:
            model.forward = own  # type: ignore[method-assign]
            return 2 * model.head(model.body(batch))

        model.forward = forward  # type: ignore[method-assign]
        return model(batch)

    with ActivationCache(model) as cache:
        warm(cache, step, x)
        assert_same(step(x[:BATCH]), 2 * model.head(plainly(model.body, x[:BATCH])))
