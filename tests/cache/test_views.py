"""Views of a row come again, are drawn from seed, row and view alone, and are served."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from cachefreeze import ActivationCache, UserError
from cachefreeze.cache import lazy_loading
from tests.cache.loading import Net

ROWS, BATCH, SIDE = 12, 4, 24
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def no_item_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_loading, "_CHEAP", 0.0)


class Pictures(Dataset[Any]):
    """Pictures with their numbers as labels, counted as they are loaded."""

    def __init__(self, change: Callable[[Any], Any] = lambda picture: picture) -> None:
        self.change = change
        self.loads = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        picture = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        return self.change(picture), index


def with_torchvision(picture: Tensor) -> Tensor:
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomCrop(SIDE, padding=4), v2.RandomHorizontalFlip()])
    return crop(picture)


def with_python_and_numpy(picture: Tensor) -> Tensor:
    return picture * random.random() + float(np.random.rand())


def with_albumentations() -> Callable[[Tensor], Tensor]:
    albumentations = pytest.importorskip("albumentations")
    return albumentations.Compose(
        [albumentations.RandomCrop(3, 16), albumentations.RandomBrightnessContrast(p=1.0)]
    )


def shown(loader: Any, epochs: int) -> dict[tuple[int, int], Tensor]:
    """Returns the view of each row in each epoch."""
    return {
        (epoch, row): picture
        for epoch in range(epochs)
        for pictures, rows in loader
        for picture, row in zip(torch.as_tensor(pictures), rows.tolist(), strict=True)
    }


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "torchvision": lambda: with_torchvision,
    "python and numpy": lambda: with_python_and_numpy,
    "albumentations": with_albumentations,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_view_is_drawn_from_seed_row_and_view_alone(transform: Callable[[], Any]) -> None:
    change, cache = transform(), ActivationCache(Net())
    dataset = Pictures(np.asarray) if transform is with_albumentations else Pictures()

    def run(views: int = 3, **options: Any) -> dict[tuple[int, int], Tensor]:
        loader = cache.loader(dataset, views=views, transform=change, **options)
        return shown(loader, 4)

    first = run(batch_size=BATCH)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    for other in (
        run(batch_size=5, shuffle=True),
        run(batch_size=BATCH, shuffle=True, num_workers=2),
    ):
        assert all(torch.equal(first[key], other[key]) for key in first)
    for row in range(ROWS):
        assert torch.equal(first[0, row], first[3, row])  # of three views, the first comes again
        assert not torch.equal(first[0, row], first[1, row])
    more = run(views=4, batch_size=BATCH)
    assert all(torch.equal(first[key], more[key]) for key in first if key[0] < 3)
    seeded = run(batch_size=BATCH, seed=1)
    assert not all(torch.equal(first[key], seeded[key]) for key in first)
    cache.close()


def test_random_work_of_the_data_set_itself_makes_views_too() -> None:
    cache = ActivationCache(Net())
    views = shown(cache.loader(Pictures(with_torchvision), BATCH, views=2), 3)
    assert all(torch.equal(views[0, row], views[2, row]) for row in range(ROWS))
    assert not all(torch.equal(views[0, row], views[1, row]) for row in range(ROWS))
    cache.close()


def test_the_random_state_of_the_program_is_that_of_a_plain_loader() -> None:
    def after(views: int | None) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        cache = ActivationCache(Net())
        transform = None if views is None else with_python_and_numpy
        for _ in cache.loader(Pictures(), BATCH, shuffle=True, views=views, transform=transform):
            pass
        cache.close()
        return torch.rand(1), random.random(), np.random.rand()

    assert after(3) == after(None)


def test_each_row_is_mirrored_in_one_half_of_the_epochs() -> None:
    cache, epochs = ActivationCache(Net()), 6
    seen = shown(cache.loader(Pictures(), BATCH, shuffle=True, views="flips"), epochs)
    plain = shown(cache.loader(Pictures(), BATCH), 1)
    mirrored = torch.zeros(epochs, ROWS)
    for (epoch, row), view in seen.items():
        picture = plain[0, row]
        mirrored[epoch, row] = float(torch.equal(view, picture.flip(-1)))
        assert mirrored[epoch, row] or torch.equal(view, picture)
    assert (mirrored.mean(0) == 0.5).all()
    assert ((mirrored.mean(1) > 0) & (mirrored.mean(1) < 1)).all(), "an epoch shows both"
    cache.close()


@pytest.mark.parametrize("kind", ["PIL", "numpy"])
def test_pictures_of_other_kinds_are_mirrored_before_the_transform(kind: str) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    items = [pixels if kind == "numpy" else Image.fromarray(pixels)]
    cache = ActivationCache(Net())
    loader = cache.loader(
        items, 1, views="flips", transform=lambda one: torch.tensor(np.array(one))
    )
    found = sorted(next(iter(loader))[0].tolist() for _ in range(2))
    assert found == sorted([pixels.tolist(), pixels[:, ::-1].tolist()])
    cache.close()


def trained(
    cached: bool, epochs: int, views: int | str = 2, directory: Path | None = None
) -> tuple[list[float], list[int], list[int]]:
    """Trains a head; returns losses, and for each epoch rows served and items loaded."""
    torch.manual_seed(0)
    model, dataset = Net(), Pictures()
    optimizer = torch.optim.SGD([*model.head.parameters()], lr=0.1, momentum=0.9)
    cache = ActivationCache(model, directory=directory, probation=2)
    transform = with_torchvision if isinstance(views, int) else None
    loader = cache.loader(
        dataset, BATCH, shuffle=True, views=views, transform=transform,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    losses, served, loads = [], [], []
    for _ in range(epochs):
        before = cache.stats.rows_served, dataset.loads
        for x, rows in loader:
            loss = F.cross_entropy(model(x) if cached else model.head(model.body(x + 0)), rows % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        served.append(cache.stats.rows_served - before[0])
        loads.append(dataset.loads - before[1])
    cache.close()
    return losses, served, loads


@pytest.mark.parametrize("views", [2, "flips"])
def test_epochs_after_the_last_new_view_are_served_and_losses_are_those_of_a_plain_loop(
    views: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, served, loads = trained(True, 6, views)
    assert served[:2] == [0, 0]
    assert served[4:] == [ROWS, ROWS]
    assert max(loads[4:]) < ROWS  # but for a sample that is compared, items are not loaded
    monkeypatch.setattr(ActivationCache, "_may_follow", lambda cache: False)  # no cache at all
    plain, never, _ = trained(True, 6, views)
    assert not any(never)
    assert losses == plain


def test_a_later_run_finds_the_views_that_an_earlier_one_kept(tmp_path: Path) -> None:
    first, _, _ = trained(True, 3, directory=tmp_path)
    again, served, _ = trained(True, 3, directory=tmp_path)
    assert again == first
    assert served[1:] == [ROWS, ROWS]  # of the first epoch, some batches are compared
    # Of three views, two were kept.
    _, served, _ = trained(True, 3, 3, directory=tmp_path)
    assert served[1] == ROWS
    assert served[2] == 0


def test_a_resumed_run_goes_on_with_the_view_of_its_epoch() -> None:
    cache = ActivationCache(Net())
    loader = cache.loader(Pictures(), BATCH, views=3, transform=with_torchvision)
    whole = shown(loader, 3)
    loader.set_epoch(5)
    assert all(torch.equal(view, whole[2, row]) for (_, row), view in shown(loader, 1).items())
    cache.close()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        (Pictures(), {"views": 0}, "1 or more, or 'flips', and was 0"),
        (Pictures(), {"views": "twirls"}, "and was 'twirls'"),
        (Pictures(), {"views": 2, "batch_size": None}, "give a batch_size"),
        (Pictures(), {"transform": with_torchvision}, "the number of views of each item"),
        (Stream(), {"views": 2}, "items have numbers"),
    ],
)
def test_what_makes_no_views_is_told(dataset: Any, options: dict[str, Any], says: str) -> None:
    cache = ActivationCache(Net())
    with pytest.raises(UserError, match=says):
        cache.loader(dataset, **options)
    cache.close()


def test_what_cannot_be_mirrored_is_told() -> None:
    cache = ActivationCache(Net())
    with pytest.raises(UserError, match="mirrors tensors, arrays and PIL images"):
        list(cache.loader([{"pixels": 1}], views="flips"))
    cache.close()
