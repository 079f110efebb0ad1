"""Items that were edited, or that draw random numbers, are loaded anew."""

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
)

from cachefreeze import ActivationCache
from tests.cache.loading import ARGUMENTS, ROWS, Edit, Files, Net, Pictures, Run, same, save_picture

# How fast an item loads decides nothing here.
pytestmark = pytest.mark.usefixtures("no_item_is_cheap")


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
def test_files_and_their_names_are_followed(pictures: Path, tmp_path: Path, edit: Edit) -> None:
    copies = iter(("plain", "cached"))

    def make() -> Any:
        place = tmp_path / next(copies)
        place.mkdir()
        for path in pictures.glob("*.jpg"):
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
