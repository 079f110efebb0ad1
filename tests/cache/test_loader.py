"""A loader that knows its rows gives what a plain DataLoader gives, and loads less."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from cachefreeze import ActivationCache
from cachefreeze.cache import lazy_loading
from tests.support.programs import Programs

ROWS, BATCH, SIDE = 24, 8, 24
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def no_item_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of tests are small, and how fast they load must decide nothing."""
    monkeypatch.setattr(lazy_loading, "_CHEAP", 0.0)


class Net(nn.Module):
    """A frozen body and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)
        self.body.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Pictures(Dataset[Any]):
    """Items that are made by their numbers, and counted as they are loaded."""

    def __init__(self, rows: int = ROWS) -> None:
        self.targets = [number % 4 for number in range(rows)]
        self.loads = 0
        self.transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def picture(self, index: int) -> Tensor:
        self.loads += 1
        x = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        return x if self.transform is None else self.transform(x)

    def __getitem__(self, index: int) -> Any:
        return self.picture(index), self.targets[index]


class Named(Pictures):
    """The same as a dictionary with a name, a mask and a pair."""

    def __getitem__(self, index: int) -> Any:
        x = self.picture(index)
        mask = x[0, :4, :4] > 0
        return {"x": x, "name": f"picture {index}", "more": (self.targets[index], mask)}


class Files(Dataset[Any]):
    """Items that lie in JPEG files, as in torchvision's `ImageFolder`."""

    def __init__(self, folder: Path) -> None:
        self.samples = [
            (str(path), number % 4) for number, path in enumerate(sorted(folder.glob("*.jpg")))
        ]
        self.loads = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        path, target = self.samples[index]
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1).contiguous(), target


def save_picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures that have not just been written."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(ROWS):
        save_picture(place / f"{number:02d}.jpg", number)
    time.sleep(0.15)
    return place


Edit = Callable[[int, Any], None]
Change = Callable[[Tensor], Tensor]


class Run:
    """A training loop, with the cache's loader or with torch's.

    Attributes:
        losses: Loss of every step.
        batches: Labels and names of every batch.
        loads: Number of items that were loaded in each epoch, if the data set counts them.
        state: Weights and random state afterwards.
        messages: Sentences of the cache.
    """

    def __init__(
        self,
        cached: bool,
        dataset: Any,
        epochs: int = 5,
        *,
        directory: Path | None = None,
        edit: Edit | None = None,
        change: Change = lambda x: x,
        close_after: int | None = None,
        arguments: Callable[[Any], dict[str, Any]] = lambda dataset: {"shuffle": True},
        seed: int = 0,
        verify: str = "sample",
    ) -> None:
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        cache = ActivationCache(model, directory=directory, verify=verify) if cached else None
        options = {"batch_size": BATCH, **arguments(dataset)}
        if "batch_sampler" in options:
            del options["batch_size"]
        loader = DataLoader(dataset, **options)
        if cache is not None:
            for seeded in (torch.manual_seed, random.seed, np.random.seed):
                seeded(seed)
            model.load_state_dict(Net().state_dict())
            loader = cache.loader(dataset, **{**options, **arguments(dataset)})
            if "batch_sampler" in options:
                loader = cache.loader(dataset, **options)
        self.losses: list[float] = []
        self.batches: list[Any] = []
        self.loads: list[int] = []
        for epoch in range(epochs):
            if edit is not None:
                edit(epoch, dataset)
            before = getattr(dataset, "loads", 0)
            for batch in loader:
                x, y, rest = parts(batch)
                self.batches.append((y.tolist(), rest))
                loss = F.cross_entropy(model(change(x.to("cpu"))), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.losses.append(loss.item())
            self.loads.append(getattr(dataset, "loads", 0) - before)
            if cache is not None and epoch == close_after:
                cache.close()
        self.state = (
            [one.detach().clone() for one in model.parameters()],
            torch.get_rng_state(), random.getstate(), repr(np.random.get_state()),
        )  # fmt: skip
        self.messages = "" if cache is None else " ".join(cache.messages)
        self.served = 0 if cache is None else cache.stats.rows_served
        if cache is not None:
            cache.close()


def parts(batch: Any) -> tuple[Tensor, Tensor, Any]:
    if isinstance(batch, dict):
        y, mask = batch["more"]
        return batch["x"], y, (batch["name"], mask.tolist())
    x, y = batch
    return x, y, None


def same(make: Callable[[], Any], **options: Any) -> Run:
    """Runs a loop both ways, and compares them to the last bit. Returns the cached one."""
    plain = Run(False, make(), **{**options, "directory": None})
    cached = Run(True, make(), **options)
    assert cached.batches == plain.batches
    assert cached.losses == plain.losses
    for one, other in zip(cached.state[0], plain.state[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cached.state[1], plain.state[1])
    assert cached.state[2:] == plain.state[2:]
    return cached


def weighted(dataset: Any) -> dict[str, Any]:
    weights = [1.0 + number for number in range(len(dataset))]
    return {"sampler": WeightedRandomSampler(weights, len(dataset))}


def with_generator(dataset: Any) -> dict[str, Any]:
    return {"shuffle": True, "generator": torch.Generator().manual_seed(3)}


def fours(dataset: Any) -> dict[str, Any]:
    return {"shuffle": True, "batch_size": 4}


def batches_of_numbers(dataset: Any) -> dict[str, Any]:
    order = list(range(len(dataset)))
    return {"batch_sampler": [order[start::3] for start in range(3)]}


ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffled": lambda dataset: {"shuffle": True},
    "in order": lambda dataset: {},
    "short last batch": lambda dataset: {"shuffle": True, "batch_size": 7},
    "without the last": lambda dataset: {"shuffle": True, "batch_size": 7, "drop_last": True},
    "generator": with_generator,
    "weighted": weighted,
    "batch sampler": batches_of_numbers,
    "pinned": lambda dataset: {"shuffle": True, "pin_memory": True},
    "workers": lambda dataset: {"shuffle": True, "num_workers": 2},
    "workers that stay": lambda dataset: {
        "shuffle": True, "num_workers": 2, "persistent_workers": True,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("kind", [Pictures, Named])
def test_a_loop_ends_as_with_a_plain_loader(kind: Any, arguments: Any) -> None:
    assert same(kind, arguments=arguments).served


@pytest.mark.parametrize("kind", [Pictures, Named])
def test_items_that_only_frozen_work_reads_are_not_loaded(kind: Any) -> None:
    run = same(kind)
    assert run.loads[0] == ROWS
    # Those that are loaded to be compared, and a batch that the cache compares.
    assert max(run.loads[3:]) <= 2 + BATCH
    assert min(run.loads[3:]) <= 2


def test_where_every_batch_is_compared_no_item_is_loaded_twice() -> None:
    run = same(Pictures, verify="all")
    assert run.loads == [ROWS] * len(run.loads)


def test_a_subset_and_its_indices_are_followed() -> None:
    def edit(epoch: int, dataset: Any) -> None:
        if epoch == 4:
            dataset.indices = list(range(12, 24))

    run = same(
        lambda: Subset(Pictures(), list(range(4, 20))),
        epochs=7,
        edit=edit,
        arguments=lambda dataset: {"batch_size": 4},
    )
    assert run.served


def test_a_tensor_data_set_is_loaded_as_ever() -> None:
    def make() -> Any:
        x = torch.randn(ROWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, torch.arange(ROWS) % 4)

    assert same(make).served


def edit_targets(epoch: int, dataset: Any) -> None:
    if epoch == 4:
        dataset.targets[3] = (dataset.targets[3] + 1) % 4


def set_transform(epoch: int, dataset: Any) -> None:
    if epoch == 4:
        dataset.transform = lambda x: x.flip(2)


def set_transform_back(epoch: int, dataset: Any) -> None:
    dataset.transform = (lambda x: x.flip(2)) if epoch in (3, 5) else None


def replace_code(epoch: int, dataset: Any) -> None:
    if epoch == 4:
        inner = dataset.transform
        dataset.transform = lambda x: -x if inner is None else inner(x)


@pytest.mark.parametrize("edit", [edit_targets, set_transform, set_transform_back, replace_code])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_edited_data_set_is_loaded_anew(edit: Edit, workers: int) -> None:
    run = same(
        Pictures,
        epochs=8,
        edit=edit,
        arguments=lambda dataset: {"shuffle": True, "num_workers": workers},
    )
    assert run.served


@pytest.mark.parametrize("edit", [edit_targets, set_transform])
def test_workers_that_stay_go_on_with_the_data_set_that_they_have(edit: Edit) -> None:
    same(Pictures, epochs=7, edit=edit, arguments=ARGUMENTS["workers that stay"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_edited_in_the_middle_of_an_epoch_is_that_of_a_plain_loader(workers: int) -> None:
    def train(cached: bool) -> list[Any]:
        torch.manual_seed(0)
        model, dataset = Net(), Pictures()
        cache = ActivationCache(model) if cached else None
        loader: Any = (cache.loader if cache else DataLoader)(dataset, 4, num_workers=workers)
        seen = []
        for epoch in range(6):
            for step, (x, y) in enumerate(loader):
                model(x)
                seen.append(y.tolist())
                if epoch == 4 and step == 0:
                    dataset.targets[-1] = 99
        return seen

    assert train(True) == train(False)


def edit_samples(epoch: int, dataset: Any) -> None:
    if epoch == 4:
        dataset.samples[2], dataset.samples[5] = dataset.samples[5], dataset.samples[2]


def replace_file(epoch: int, dataset: Any) -> None:
    if epoch in (4, 6):
        save_picture(Path(dataset.samples[7][0]), 100 + epoch)


def replace_file_with_the_same_time(epoch: int, dataset: Any) -> None:
    path = dataset.samples[7][0]
    before = os.stat(path)
    if epoch == 4:
        other = Path(dataset.samples[8][0]).read_bytes()
        Path(path).write_bytes(other)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("edit", [edit_samples, replace_file, replace_file_with_the_same_time])
def test_files_and_their_names_are_followed(folder: Path, tmp_path: Path, edit: Edit) -> None:
    copies = iter(("plain", "cached"))

    def make() -> Any:
        place = tmp_path / next(copies)
        place.mkdir()
        for path in folder.glob("*.jpg"):
            (place / path.name).write_bytes(path.read_bytes())
        time.sleep(0.15)
        return Files(place)

    run = same(make, epochs=8, edit=edit)
    assert min(run.loads[1:4]) < ROWS


class Flipped(Pictures):
    """Items that a generator flips, rarely."""

    def draw(self) -> float:
        return random.random()

    def __getitem__(self, index: int) -> Any:
        x = self.picture(index)
        return x.flip(2) if self.draw() < 0.1 else x, self.targets[index]


class FlippedByTorch(Flipped):
    def draw(self) -> float:
        return torch.rand(()).item()


class FlippedByNumpy(Flipped):
    def draw(self) -> float:
        return np.random.rand()


class FlippedByItsOwn(Flipped):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(5)

    def draw(self) -> float:
        return self.generator.random()


_global = np.random.default_rng(7)


class FlippedByAGlobal(Flipped):
    def __init__(self) -> None:
        super().__init__()
        global _global
        _global = np.random.default_rng(7)

    def draw(self) -> float:
        return _global.random()


class DrawsForOneLabel(Flipped):
    def draw(self) -> float:
        return 1.0

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return (x + torch.rand(()) if index == ROWS - 1 else x), y


@pytest.mark.parametrize(
    "kind",
    [Flipped, FlippedByTorch, FlippedByNumpy, FlippedByItsOwn, FlippedByAGlobal, DrawsForOneLabel],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_draw_random_numbers_are_always_loaded(kind: Any, workers: int) -> None:
    run = same(kind, arguments=lambda dataset: {"shuffle": True, "num_workers": workers})
    assert "random numbers" in run.messages or "generator of their own" in run.messages
    if not workers:
        assert run.loads == [ROWS] * 5


def test_items_of_fresh_entropy_are_always_loaded() -> None:
    class Fresh(Pictures):
        def __getitem__(self, index: int) -> Any:
            np.random.default_rng()
            return super().__getitem__(index)

    run = same(Fresh)
    assert "`default_rng`" in run.messages
    assert run.loads == [ROWS] * 5


def test_items_that_change_unseen_are_found_by_the_sample() -> None:
    class Shifted(Pictures):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + float(os.environ["CACHEFREEZE_SHIFT"]), y

    def edit(epoch: int, dataset: Any) -> None:
        os.environ["CACHEFREEZE_SHIFT"] = "1.0" if epoch == 4 else "0.0"

    run = Run(True, Shifted(), 7, edit=edit)
    assert "are not always the same" in run.messages
    assert run.loads[5:] == [ROWS] * 2


def normalise(x: Tensor) -> Tensor:
    return (x - 0.1) / 2


def mix(x: Tensor) -> Tensor:
    return 0.7 * x + 0.3 * x[torch.randperm(len(x))]


@pytest.mark.parametrize("change", [normalise, mix])
def test_a_batch_that_the_loop_uses_loads_itself_and_that_is_told_once(change: Change) -> None:
    run = same(Pictures, epochs=8, change=change)
    assert run.messages.count("uses a batch of cache.loader") == (change is normalise)
    if change is normalise:
        line = change.__code__.co_firstlineno + 1
        assert f"test_loader.py:{line} uses a batch" in run.messages


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.to(torch.float32),
        lambda x: x.to(torch.device("cpu"), torch.float32),
        lambda x: x.contiguous(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.cpu().contiguous(memory_format=torch.channels_last),
    ],
)
def test_moving_a_batch_loads_nothing(change: Change) -> None:
    run = same(Pictures, change=change)
    assert "uses a batch" not in run.messages
    assert min(run.loads[1:]) <= 2


def late_batch() -> tuple[ActivationCache, Pictures, Any, list[Any]]:
    """Returns a cache, its data set, a batch that is not loaded, and the same batch loaded."""
    torch.manual_seed(0)
    model, dataset = Net(), Pictures()
    cache = ActivationCache(model)
    loader = cache.loader(dataset, BATCH)
    for _ in range(3):
        for x, _ in loader:
            model(x)
    before = dataset.loads
    batches = list(loader)
    assert dataset.loads - before < ROWS
    plain = [x for x, _ in DataLoader(Pictures(), BATCH)]
    return cache, dataset, batches[-1][0], [plain[-1]]


USES: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "indexing": lambda x: x[2:5],
    "sum": lambda x: x.sum((1, 2)),
    "in place": lambda x: x.mul_(3),
    "copy": lambda x: __import__("copy").deepcopy(x),
    "pickle": lambda x: __import__("pickle").loads(__import__("pickle").dumps(x)),
    "stack": lambda x: torch.stack([x, x]),
    "out": lambda x: torch.add(x, 1, out=torch.empty(0)),
    "view": lambda x: x.view(len(x), -1),
    "iteration": lambda x: torch.stack(list(x)),
    "other type": lambda x: x.to(torch.float64),
    "data": lambda x: x.data,
    "asarray": lambda x: torch.from_numpy(np.asarray(x).copy()),
    "gradient": lambda x: torch.autograd.grad((x.requires_grad_() * x).sum(), x)[0],
    "list": lambda x: torch.tensor(x.tolist()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_batch_that_is_not_loaded_gives_what_a_loaded_one_gives(use: Any) -> None:
    cache, _, late, (plain,) = late_batch()
    assert late.shape == plain.shape
    assert late.dtype == plain.dtype
    assert late.stride() == plain.stride()
    assert isinstance(late, Tensor)
    assert torch.equal(use(late), use(plain))
    assert type(late) is Tensor
    cache.close()


def test_a_closed_cache_leaves_a_plain_loader() -> None:
    run = same(Pictures, epochs=6, close_after=3)
    assert run.loads[4:] == [ROWS] * 2


def test_a_batch_from_before_the_closing_loads_itself() -> None:
    cache, _, late, (plain,) = late_batch()
    cache.close()
    assert torch.equal(late + 1, plain + 1)


def test_a_collate_function_of_ones_own_has_everything_loaded() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]) * 2, torch.tensor([y for _, y in items])

    run = same(Pictures, arguments=lambda dataset: {"collate_fn": collate})
    assert run.loads == [ROWS] * 5
    assert "collate_fn" in run.messages


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        items = Pictures()
        return (items[number] for number in range(len(items)))


def test_an_iterable_data_set_is_passed_through() -> None:
    run = same(Stream, arguments=lambda dataset: {})
    assert "IterableDataset" in run.messages
    assert run.served


def test_a_later_run_finds_items_and_does_not_load_them(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(folder), directory=place, arguments=fours)
    again = same(lambda: Files(folder), directory=place, arguments=fours)
    # Three batches are computed and compared.
    assert again.loads[0] < ROWS
    assert min(again.loads[1:]) <= 2


def test_a_later_run_loads_what_was_changed_in_between(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(folder), directory=place)
    path = folder / "03.jpg"
    before = path.stat()
    path.write_bytes((folder / "04.jpg").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    same(lambda: Files(folder), directory=place)


PROGRAM = """
import sys
import torch
from pathlib import Path
from tests.cache import test_loader
test_loader.lazy_loading._CHEAP = 0.0
dataset, directory = test_loader.Files(Path(sys.argv[1])), Path(sys.argv[2])
run = test_loader.Run(True, dataset, 3, directory=directory, arguments=test_loader.fours)
print(run.loads, run.losses)
"""


def test_another_process_finds_items_and_does_not_load_them(
    folder: Path, tmp_path: Path, programs: Programs
) -> None:
    told, program = [], tmp_path / "program.py"
    program.write_text(PROGRAM)
    for _ in range(2):
        done = programs.run(program, str(folder), str(tmp_path / "cache"))
        assert done.code == 0, done.stderr[-2000:]
        told.append(done.stdout.split("] ["))
    assert told[0][1] == told[1][1]
    assert told[0][0].startswith(f"[{ROWS}, ")
    first, second, third = map(int, told[1][0].strip("[").split(","))
    assert first < ROWS
    assert second + third <= 4


def test_a_damaged_file_of_items_is_not_used(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    same(lambda: Files(folder), directory=place)
    (kept,) = (place / "items").glob("*.npz")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert same(lambda: Files(folder), directory=place).loads[0] == ROWS


def test_a_data_set_that_is_made_anew_is_known(folder: Path) -> None:
    model = Net()
    with ActivationCache(model) as cache:
        loads = []
        for _ in range(5):
            dataset = Files(folder)
            for x, _ in cache.loader(dataset, BATCH, shuffle=True):
                model(x)
            loads.append(dataset.loads)
    assert loads[0] == ROWS
    assert min(loads) <= 2


class Pairs(Pictures):
    """Two pictures in every item."""

    def __getitem__(self, index: int) -> Any:
        other = len(self) - 1 - index
        return self.picture(index), self.picture(other), self.targets[index]


class Matching(Net):
    """Two trained results of two frozen ones, each of a picture."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.body(x)) * self.head(self.body(other))


def match(cached: bool) -> tuple[Tensor, list[int]]:
    torch.manual_seed(0)
    model, dataset = Matching(), Pairs()
    cache = ActivationCache(model) if cached else None
    loader = DataLoader(dataset, BATCH, shuffle=True)
    if cache is not None:
        torch.manual_seed(0)
        model.load_state_dict(Matching().state_dict())
        loader = cache.loader(dataset, BATCH, shuffle=True)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    loads = []
    for _ in range(6):
        before = dataset.loads
        for x, other, y in loader:
            loss = F.cross_entropy(model(x, other), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loads.append(dataset.loads - before)
    return model.head.weight.detach().clone(), loads


def test_two_pictures_of_an_item_are_each_known_by_themselves() -> None:
    (plain, _), (weight, loads) = match(cached=False), match(cached=True)
    assert torch.equal(plain, weight)
    assert loads[0] == 2 * ROWS
    assert min(loads) <= 4
