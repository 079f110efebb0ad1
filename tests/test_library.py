"""Training loops of one's own: with the cache they end with the weights of before.

`plain` is how people write them, without a line of cachefreeze but for which modules are frozen.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets, transforms

from cachefreeze import (
    FreezeOutLR,
    IndexedDataset,
    PrefixCache,
    UserError,
    batches_of,
    epoch_order,
    param_groups,
    partition,
    stores,
)
from cachefreeze.device import has_bf16
from cachefreeze.hashing import weights_sha256
from cachefreeze.store import store_folders

ROWS, BATCH, EPOCHS = 40, 8, 3


def images(rows: int = ROWS, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(rows, 3, size, size, generator=generator), torch.arange(rows) % 5
    )


# With the last unit that is frozen.
FROZEN = {
    "resnet18": "layer4.0",
    "mobilenet_v3_small": "features.9",
    "densenet121": "features.denseblock4.denselayer7",
    "vit": "encoder.layers.encoder_layer_1",
}


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "vit":
        sizes = {"image_size": 32, "patch_size": 8, "hidden_dim": 64, "mlp_dim": 128}
        return torchvision.models.VisionTransformer(
            num_layers=3, num_heads=4, num_classes=5, dropout=0.1, **sizes
        )
    model: nn.Module = torchvision.models.get_model(name, num_classes=5)
    return model


def optimizer_for(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)


def trained_plainly(model: nn.Module, name: str, dtype: torch.dtype | None, every: int) -> str:
    """The loop that somebody has already: the frozen modules in eval mode, everything run."""
    units = partition(model)
    frozen = units[: units.count(FROZEN[name])]
    parameters = [p for unit in units[len(frozen) :] for p in unit.parameters()]
    optimizer = optimizer_for(parameters)
    x_all, y_all = images().tensors
    torch.manual_seed(5)
    for epoch in range(EPOCHS):
        model.train()
        for unit in frozen:
            unit.eval()
            unit.requires_grad_(False)
        for step, rows in enumerate(batches_of(epoch_order(ROWS, 0, epoch), BATCH), 1):
            x, y = x_all[torch.from_numpy(rows)], y_all[torch.from_numpy(rows)]
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = F.cross_entropy(model(x), y) / every
            loss.backward()
            if step % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return weights_sha256(model.state_dict())


@pytest.mark.parametrize("every", [1, 2], ids=["each step", "gradients of two steps"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FROZEN)
def test_a_loop_of_ones_own_ends_with_the_weights_that_it_ended_with_before(
    name: str, dtype: torch.dtype | None, every: int, tmp_path: Path
) -> None:
    if dtype is not None and not has_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 instructions")
    before = trained_plainly(network(name), name, dtype, every)

    model = network(name)
    units = partition(model)
    units.freeze(FROZEN[name])
    optimizer = optimizer_for([p for unit in units[units.frontier :] for p in unit.parameters()])
    torch.manual_seed(5)
    with PrefixCache(
        units, images(), batch_size=BATCH, autocast_dtype=dtype, directory=tmp_path
    ) as cache:
        assert cache.materialize() is not None
        for epoch in range(EPOCHS):
            model.train()
            for step, (x, y) in enumerate(cache.epoch(epoch), 1):
                with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                    loss = F.cross_entropy(units.suffix(x), y) / every
                loss.backward()
                if step % every == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        assert cache.rows_served == EPOCHS * ROWS
        assert cache.prefix_unit_rows_computed == ROWS * units.frontier
    assert weights_sha256(model.state_dict()) == before


class Counting(Dataset[Any]):
    """Items that somebody loads: says how many."""

    def __init__(self, inner: Dataset[Any]) -> None:
        self.inner = inner
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> Any:
        self.loaded += 1
        return self.inner[row]


def small_units() -> Any:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), body, head)
    model(torch.zeros(2, 3, 32, 32))
    return partition(model)


def cached(units: Any, dataset: Any, folder: Path | None, **options: Any) -> PrefixCache:
    return PrefixCache(units, dataset, batch_size=BATCH, directory=folder, **options)


def everything(batches: Iterator[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_once_the_cache_has_them_no_input_is_loaded(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(2)
    counting = Counting(images())
    dataset = IndexedDataset(counting, targets=images().tensors[1], identity="random images")
    cache = cached(units, dataset, tmp_path)
    computed = everything(cache.epoch(0))
    cache.materialize()
    counting.loaded = 0
    served = everything(cache.epoch(0))
    assert counting.loaded == 0
    for one, other in zip(computed, served, strict=True):
        assert torch.equal(one, other)
    cache.leave()
    again = everything(cache.epoch(0))
    assert counting.loaded == ROWS
    assert torch.equal(again[0], computed[0])


def test_targets_that_nobody_knows_are_loaded_with_their_items(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(2)
    counting = Counting(images())
    told: list[str] = []
    with cached(units, counting, tmp_path, warn=told.append) as cache:
        before = everything(cache.epoch(3))
        cache.materialize()
        counting.loaded = 0
        after = everything(cache.epoch(3))
        assert counting.loaded == ROWS
        assert cache.rows_served == ROWS
        computed = cache.prefix_unit_rows_computed
        assert computed == 2 * 2 * ROWS, "once by the first epoch, once to fill the store"
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    (sentence,) = told
    assert "no later run will find the rows after 1" in sentence
    assert repr(units) == "Units(0, 1, 2; 2 frozen)"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_there_stays(tmp_path: Path, workers: int) -> None:
    """The same rows whatever of them came with their input, also after the store is lost."""
    units = small_units()
    units.freeze(2)
    dataset = IndexedDataset(images())
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(4),
    )
    cache = cached(units, dataset, tmp_path)
    reference = cached(units, images(), None)
    for epoch in range(4):
        if epoch == 1:
            cache.materialize()
        if epoch == 3:
            cache.leave()
        empty = 0
        for rows, x, y in loader:
            empty += x.numel() == 0
            assert torch.equal(cache.batch(rows, x), reference.batch(rows))
            assert torch.equal(y, rows % 5)
        # What a worker had loaded ahead before it was told may still come.
        assert empty == (5 if 1 <= epoch <= 2 else 0)
    cache.close()


def test_rows_are_asked_for_by_number(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(1)
    cache = cached(units, {"train": images(), "val": images(10)}, tmp_path)
    whole = cache.batch(range(20))
    assert whole.shape == (20, 4, 8, 8), "more than a batch at once"
    cache.materialize()
    assert torch.equal(cache.batch([3, 3, 19]), whole[[3, 3, 19]])
    assert torch.equal(cache.batch(np.array([9]), split="val"), whole[9:10])
    for wrong in ([ROWS], [-1], [0.5], [[1, 2]], "abc"):
        with pytest.raises(ValueError, match="row"):
            cache.batch(wrong)
    cache.leave()
    with pytest.raises(ValueError, match="2 rows, and 3 are named"):
        cache.batch([1, 2, 3], torch.zeros(2, 3, 32, 32))
    cache.close()


def test_what_makes_no_sense_is_told_in_a_sentence(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(1)
    with pytest.raises(UserError, match="'Train': they need names of lower-case letters"):
        cached(units, {"Train": images()}, tmp_path)
    with pytest.raises(UserError, match="named nothing"):
        cached(units, {}, tmp_path)
    with pytest.raises(UserError, match="batch_size is 0"):
        PrefixCache(units, images(), batch_size=0)
    cache = cached(units, images(), tmp_path)
    for beyond in (2, 99, -1):
        with pytest.raises(ValueError, match=f"boundary {beyond}: 1 units are frozen"):
            cache.materialize(beyond)
    with pytest.raises(ValueError, match="no split 'val', but train"):
        cache.batch([1], split="val")
    with pytest.raises(ValueError, match="no split 'val', but train"):
        next(cache.epoch(split="val"))
    units.model.to("meta")
    with pytest.raises(ValueError, match='give it device="meta"'):
        cache.batch([1])
    cache.close()


def test_a_store_of_more_units_than_are_frozen_is_not_taken(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(2)
    with cached(units, images(), tmp_path) as cache:
        cache.materialize()
        state = cache.state_dict()
    fresh = small_units()
    fresh.freeze(1)
    with cached(fresh, images(), tmp_path) as cache:
        with pytest.raises(ValueError, match="boundary 2"):
            cache.load_state_dict(state)
        assert cache.batch([0]).shape[1:] == (4, 8, 8)


def test_rows_are_the_same_whatever_autocast_surrounds_the_cache(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(1)
    cache = cached(units, images(), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        cache.materialize()
        with pytest.raises(ValueError, match="autocast_dtype=torch"):
            cache.batch([0])
        inside = next(cache.epoch(0, shuffle=False))[0]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, cached(units, images(), None).batch(range(BATCH)))
    cache.close()


def test_the_layout_of_an_input_does_not_matter(tmp_path: Path) -> None:
    """What a loop converts to channels-last gives the rows that the store holds."""
    model = network("resnet18")
    units = partition(model)
    units.freeze("layer1.0")
    cache = cached(units, images(), tmp_path)
    x = images().tensors[0][:BATCH]
    given = cache.batch(range(BATCH), x.contiguous(memory_format=torch.channels_last))
    cache.materialize()
    assert torch.equal(cache.batch(range(BATCH)), given)
    assert cache.batch(range(BATCH)).stride() == given.stride()
    cache.close()


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (transforms.RandomHorizontalFlip(), "RandomHorizontalFlip"),
        (transforms.Compose([transforms.ToTensor(), transforms.RandomErasing(0.001)]), "Erasing"),
        (transforms.RandomApply([transforms.ColorJitter()], 0.01), "RandomApply"),
        (lambda image: torch.rand(3, 8, 8), "another one each time"),
    ],
)
def test_what_is_augmented_is_not_kept(transform: Any, named: str) -> None:
    dataset = datasets.FakeData(4, (3, 8, 8), 2, transform=transform)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=named):
        IndexedDataset(Subset(dataset, [0, 1]))
    assert torch.equal(torch.get_rng_state(), state)


def test_items_that_are_no_pair_of_tensor_and_target_are_refused() -> None:
    for dataset, words in (
        (datasets.FakeData(4), "a Image: it has to be a tensor"),
        (TensorDataset(torch.zeros(3, 2)), r"\(input, target\)"),
        (TensorDataset(torch.zeros(0, 2), torch.zeros(0)), "empty"),
    ):
        with pytest.raises(UserError, match=words):
            IndexedDataset(dataset)
    with pytest.raises(UserError, match="3 targets for 40 items"):
        IndexedDataset(images(), targets=[1, 2, 3])


class Tags(nn.Module):
    """A head that gives a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.LazyLinear(5)
        self.box = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = x.flatten(1)
        return {"label": self.label(x), "boxes": (self.box(x), x.mean(1))}


def test_heads_and_targets_may_have_any_form(tmp_path: Path) -> None:
    x, y = images().tensors
    boxes = torch.arange(ROWS * 4.0).reshape(ROWS, 2, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), Tags())
    model(x[:2])
    units = partition(model)
    units.freeze(1)
    with cached(units, TensorDataset(x, y, boxes), tmp_path) as cache:
        cache.materialize()
        for at, targets in cache.epoch(0, shuffle=False, drop_last=True):
            found = units.suffix(at)
            assert found["label"].shape == (BATCH, 5)
            assert found["boxes"][0].shape == (BATCH, 4)
            label, box = targets
            assert box.shape == (BATCH, 2, 2)
            assert torch.equal(label, (box[:, 0, 0] / 4).long() % 5)


def test_freezeout_with_the_cache_ends_with_the_weights_of_freezeout_without(
    tmp_path: Path,
) -> None:
    def run(folder: Path | None) -> tuple[str, PrefixCache]:
        model = network("resnet18")
        units = partition(model)
        optimizer = torch.optim.SGD(param_groups(units, decay_all=False), lr=0.05, momentum=0.9)
        steps = 6 * -(-ROWS // 16)
        scheduler = FreezeOutLR(optimizer, units, steps, t0=0.2, shape="linear")
        torch.manual_seed(1)
        cache = PrefixCache(units, images(), batch_size=16, directory=folder)
        for epoch in range(6):
            model.train()
            cache.materialize()
            for x, y in cache.epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(units.suffix(x), y).backward()
                optimizer.step()
                scheduler.step()
        cache.close()
        assert units.frontier == 9
        return weights_sha256(model.state_dict()), cache

    (plain, _), (fast, cache) = run(None), run(tmp_path)
    assert fast == plain
    assert cache.rows_served >= 3 * ROWS


def test_units_that_are_not_the_model_are_told_before_anything_is_kept(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3, stride=4), nn.LazyLinear(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if x.sum() > 0:  # which cannot be traced
                x = x * 2
            return self.last(x.flatten(1))

    model = Scaled()
    model(torch.zeros(2, 3, 32, 32))
    units = partition(model, ["first", "last"])
    units.freeze(1)
    with (
        cached(units, images(), tmp_path) as cache,
        pytest.raises(UserError, match=r"Scaled cannot be cut anywhere|before (first|last)"),
    ):
        cache.materialize()
    assert store_folders(tmp_path) == []


# ---- What stays for later runs, and who shares it.


def identities(make: Callable[[], Dataset[Any]]) -> set[str]:
    return {IndexedDataset(make()).identity for _ in range(2)}


def test_a_data_set_is_known_again_by_what_its_items_depend_on(tmp_path: Path) -> None:
    from .conftest import write_images

    write_images(tmp_path / "a", 3, seed=1)

    def folder(size: int = 16, mean: float = 0.5) -> Dataset[Any]:
        steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, 0.5)]
        return datasets.ImageFolder(tmp_path / "a", transforms.Compose(steps))

    (known,) = identities(folder)
    for changed in (
        lambda: folder(17),
        lambda: folder(16, 0.4),
        lambda: Subset(folder(), [0, 1]),
        lambda: Subset(folder(), [1, 0]),
    ):
        (other,) = identities(changed)
        assert other != known
    (tmp_path / "a" / "blobs" / "000.jpg").touch()
    assert identities(folder) != {known}
    x, y = images().tensors
    (plain,) = identities(lambda: TensorDataset(x, y))
    x = x.clone()
    x[3, 0, 0, 0] += 1e-6
    assert identities(lambda: TensorDataset(x, y)) != {plain}


def test_what_nobody_can_know_again_is_never_taken_for_the_same(tmp_path: Path) -> None:
    assert len(identities(lambda: Counting(images()))) == 2

    class Other(datasets.FakeData):
        """A subclass may do anything."""

        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3, 8, 8), 0

    assert len(identities(lambda: Other(4))) == 2
    assert len({IndexedDataset(Counting(images()), identity="v1").identity for _ in "ab"}) == 1


def test_another_head_finds_the_rows_and_computes_none(tmp_path: Path) -> None:
    first = small_units()
    first.freeze(2)
    with cached(first, images(), tmp_path) as cache:
        assert not cache.materialize().reused  # type: ignore[union-attr]
    second = small_units()
    nn.init.normal_(second[2][1].weight)
    second.freeze(2)
    with cached(second, images(), tmp_path) as cache:
        assert cache.materialize().reused  # type: ignore[union-attr]
        everything(cache.epoch(0))
        assert cache.prefix_unit_rows_computed == 0
        assert cache.rows_served == ROWS
    third = small_units()
    nn.init.normal_(third[1][0].weight)
    third.freeze(2)
    with cached(third, images(), tmp_path) as cache:
        assert not cache.materialize().reused  # type: ignore[union-attr]


def test_other_labels_of_the_same_images_find_the_rows_too(tmp_path: Path) -> None:
    from .conftest import write_images

    write_images(tmp_path / "a", 3, seed=1)
    x, y = images().tensors

    def folder(labels: bool) -> Dataset[Any]:
        change = {"target_transform": lambda label: -label} if labels else {}
        return datasets.ImageFolder(tmp_path / "a", transforms.ToTensor(), **change)

    for make in (lambda labels: TensorDataset(x, y + labels), folder):
        assert len({IndexedDataset(make(labels)).identity for labels in (True, False)}) == 1


def prefix(seed: int) -> Any:
    """A network of its own, frozen from the start."""
    units = small_units()
    torch.manual_seed(seed)
    nn.init.normal_(units[0].weight)
    return units


def test_what_was_frozen_from_the_start_stays_and_what_froze_later_goes(tmp_path: Path) -> None:
    units = prefix(1)
    units.freeze(1)
    with cached(units, images(), tmp_path) as cache:
        cache.materialize()
        units.freeze(2)
        cache.materialize()
        assert len(store_folders(tmp_path)) == 2
    other = prefix(2)
    other.freeze(1)
    with cached(other, images(), tmp_path) as cache:
        cache.materialize()
    left = store_folders(tmp_path)
    assert len(left) == 2, "those of units that were frozen from the start"
    keeping = prefix(3)
    with cached(keeping, images(), tmp_path, keep=True) as cache:
        keeping.freeze(1)
        cache.materialize()
        keeping.freeze(2)
        cache.materialize()
    assert len(store_folders(tmp_path)) == 4


def test_the_least_recently_used_goes_first_when_room_is_short(tmp_path: Path) -> None:
    def fill(seed: int, room: float = float("inf")) -> tuple[bool, PrefixCache]:
        units = prefix(seed)
        units.freeze(1)
        cache = cached(units, images(), tmp_path, max_bytes=room, warn=told.append)
        done = cache.materialize()
        assert done is not None, told
        return done.reused, cache

    told: list[str] = []
    names = {}
    for seed in (1, 2, 3):
        _, cache = fill(seed)
        names[seed] = cache.store.folder  # type: ignore[union-attr]
        if seed != 3:
            cache.close()
        else:
            in_use = cache
    reused, cache = fill(1)
    assert reused, "and now it is the youngest"
    cache.close()
    size = sum(path.stat().st_size for path in names[1].rglob("*"))
    _, cache = fill(4, room=3.5 * size)
    assert {seed for seed, folder in names.items() if folder.exists()} == {1, 3}
    cache.close()
    _, cache = fill(5, room=2.5 * size)
    assert {seed for seed, folder in names.items() if folder.exists()} == {3}, "one is in use"
    in_use.close()
    cache.close()


def test_weights_that_are_loaded_over_make_the_rows_anew(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(2)
    told: list[str] = []
    with cached(units, images(), tmp_path, warn=told.append) as cache:
        cache.materialize()
        served = cache.batch(range(BATCH))
        units.model.load_state_dict(units.model.state_dict())
        assert torch.equal(cache.batch(range(BATCH)), served)
        assert told == [], "the same weights"
        other = {name: tensor + 1 for name, tensor in units.model.state_dict().items()}
        units.model.load_state_dict(other)
        computed = cache.batch(range(BATCH))
        assert not torch.equal(computed, served)
        assert torch.equal(computed, cached(units, images(), None).batch(range(BATCH)))
    (sentence,) = told
    assert "other weights than when it was filled" in sentence


def test_weights_that_are_put_in_the_place_of_others_make_the_rows_anew(tmp_path: Path) -> None:
    """Tensors of their own, as many times written to as those before."""
    units = small_units()
    state = {name: tensor.clone() for name, tensor in units.model.state_dict().items()}
    units.model.load_state_dict(state, assign=True)
    units.freeze(2)
    told: list[str] = []
    with cached(units, images(), tmp_path, warn=told.append) as cache:
        cache.materialize()
        served = cache.batch(range(BATCH))
        other = {name: tensor + 1 for name, tensor in state.items()}
        units.model.load_state_dict(other, assign=True)
        computed = cache.batch(range(BATCH))
    assert not torch.equal(computed, served)
    assert torch.equal(computed, cached(units, images(), None).batch(range(BATCH)))
    assert len(told) == 1


@pytest.mark.parametrize("change", ["double", "bfloat16"])
def test_buffers_of_the_model_itself_are_read_where_they_are(change: str) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
            self.register_buffer("mean", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x) - self.mean))

    model = Normalized()
    units = partition(model)
    getattr(model, change)()
    assert isinstance(model.mean, Tensor)
    model.mean.fill_(7)
    x = torch.randn(2, 3, 9, 9).to(model.mean.dtype)
    assert torch.equal(units.run(x), model(x))


def test_numbers_that_no_store_holds_are_computed(tmp_path: Path) -> None:
    class Codes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).argmax(1, keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Codes(), nn.Embedding(4000, 3))
    units = partition(model, ["0", "2"])
    units.freeze(1)
    told: list[str] = []
    with cached(units, images(), tmp_path, warn=told.append) as cache:
        assert cache.materialize() is None
        assert cache.batch([0]).dtype == torch.int64
    assert "torch.int64, which no store holds" in told[0]


def test_what_goes_by_the_name_of_targets_has_to_be_them() -> None:
    class Masks(datasets.FakeData):
        """As data sets whose items come with something else than their class."""

        def __init__(self, rows: int) -> None:
            super().__init__(rows)
            self.targets = list(range(rows))

        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3, 8, 8), torch.full((4, 4), row)

    Masks.__module__ = "torchvision.datasets.masks"
    dataset = IndexedDataset(Masks(4))
    assert dataset.targets is None
    dataset.serve(True)
    assert dataset[2][2].shape == (4, 4)


def test_a_list_of_pairs_is_a_data_set_and_a_stream_is_none(tmp_path: Path) -> None:
    units = small_units()
    units.freeze(1)
    x, y = images().tensors
    with cached(units, list(zip(x, y, strict=True)), tmp_path) as cache:
        assert torch.equal(everything(cache.epoch(0, shuffle=False))[1], y)

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield x[0], y[0]

    with pytest.raises(UserError, match="Stream has no rows that can be asked for by number"):
        cached(units, Stream(), tmp_path)


def test_another_layout_of_the_input_is_another_store(tmp_path: Path) -> None:
    """Which the head alone can ask for."""
    plain, last = small_units(), small_units()
    last[1][0].to(memory_format=torch.channels_last)
    names = set()
    for units in (plain, last):
        units.freeze(1)
        names.add(cached(units, images(), tmp_path).fingerprint(1))
    assert len(names) == 2


def test_a_run_that_does_not_get_on_is_not_waited_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "STALLED_SECONDS", 0.5)
    units = small_units()
    units.freeze(1)
    told: list[str] = []
    cache = cached(units, images(), tmp_path, warn=told.append)
    folder = tmp_path / cache.fingerprint(1)
    folder.mkdir()
    (folder / "lock").touch()
    lock = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert cache.materialize() is None
    assert "waiting for it" in told[0]
    assert "does not come to an end with it: not cached" in told[1]
    assert cache.materialize() is None
    assert len(told) == 2
    os.close(lock)
    assert cache.materialize() is not None, "that run is gone"
    cache.close()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_a_boundary_of_one_pixel_keeps_its_layout(tmp_path: Path, last: bool) -> None:
    """There both layouts are the same bytes, and only the strides tell them apart."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(body, nn.Sequential(nn.Conv2d(4, 5, 1), nn.Flatten()))
    if last:
        model.to(memory_format=torch.channels_last)
    units = partition(model)
    units.freeze(1)
    with cached(units, images(), tmp_path) as cache:
        computed = cache.batch(range(BATCH))
        assert cache.materialize() is not None
        served = cache.batch(range(BATCH))
    assert torch.equal(served, computed)
    assert served.stride() == computed.stride()
