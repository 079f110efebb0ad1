"""Splits, orders and pixels: the same for everyone who asks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from cachefreeze import UserError
from cachefreeze.data import (
    FolderImages,
    Images,
    Indices,
    InputRows,
    epoch_order,
    full_batches,
    images,
    load,
)
from cachefreeze.data.inputs import augment, random_views
from cachefreeze.data.sets import statistics, stratified_split
from tests.conftest import write_images


def load_images(folder: Path, *, size: int = 32, val_fraction: float | None = None, workers=0):
    return load(
        "imagefolder",
        folder,
        image_size=size,
        val_fraction=val_fraction,
        workers=workers,
        bar=lambda batches, total: batches,
    )


def digits():
    return load(
        "digits", Path(), image_size=32, val_fraction=None, workers=0, bar=lambda b, total: b
    )


def test_the_order_of_rows_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = epoch_order(100, seed=3, epoch=4)
    torch.manual_seed(2)
    np.random.seed(2)
    assert np.array_equal(first, epoch_order(100, seed=3, epoch=4))
    assert not np.array_equal(first, epoch_order(100, seed=3, epoch=5))
    assert not np.array_equal(first, epoch_order(100, seed=4, epoch=4))
    assert sorted(first) == list(range(100))


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        (10, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]),
        (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (3, [[0, 1, 2]]),
        (0, []),
    ],
)
def test_every_batch_is_full(rows: int, batches: list[list[int]]) -> None:
    assert [batch.tolist() for batch in full_batches(np.arange(rows), 4)] == batches


def test_digits_are_split_stratified_and_always_alike() -> None:
    data, again = digits(), digits()
    assert len(data.train) + len(data.val) == 1797
    assert data.train.identity == again.train.identity
    shares = torch.bincount(data.val.labels) / (
        torch.bincount(data.val.labels) + torch.bincount(data.train.labels)
    )
    assert shares.min() > 0.18
    assert shares.max() < 0.22


def test_a_stratified_split_has_no_row_twice_and_every_class_on_both_sides() -> None:
    labels = np.repeat([0, 1, 2], [50, 3, 2])
    train, val = stratified_split(labels, 0.1, "abc")
    assert sorted([*train, *val]) == list(range(55))
    assert np.bincount(labels[val]).tolist() == [5, 1, 1]
    with pytest.raises(UserError, match="'b' has a single image"):
        stratified_split(np.array([0, 0, 1]), 0.5, "ab")


def test_statistics_are_those_of_the_pixels(images: Path) -> None:
    data = load_images(images)
    pixels = torch.cat(list(data.train.decode([np.arange(150)]))).numpy() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-12)


def test_network_input_has_mean_zero_and_deviation_one(images: Path) -> None:
    data = load_images(images)
    rows = InputRows(data.train, data.mean, data.std, torch.device("cpu"))
    x = next(rows.batches([np.arange(150)]))
    assert x.shape == (150, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert x.std((0, 2, 3), correction=0).sub(1).abs().max() < 1e-5


def test_workers_change_neither_rows_nor_random_state(images: Path) -> None:
    here, there = load_images(images, workers=0), load_images(images, workers=1)
    order = full_batches(epoch_order(150, 0, 0), 32)
    torch.manual_seed(5)
    expected = list(here.train.decode(order))
    state = torch.get_rng_state()
    found = list(there.train.decode(order))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in found] == [32] * 5
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_images_are_resized_on_the_shorter_side_and_cut_from_the_centre(tmp_path: Path) -> None:
    for name in "ab":
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            wide = Image.new("RGB", (300, 100), (255, 0, 0))
            wide.paste((0, 255, 0), (100, 0, 200, 100))
            wide.save(tmp_path / split / name / "wide.png")
    pixels = next(iter(load_images(tmp_path, size=50).train.decode([np.array([0])])))
    assert pixels.shape == (1, 50, 50, 3)
    assert (pixels[0, :, 2:-2, 1] > 250).all()


def test_a_folder_without_a_split_is_split_on_request(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 10, seed=3)
    data = load_images(tmp_path / "flat", val_fraction=0.2)
    assert (len(data.train), len(data.val)) == (24, 6)
    with pytest.raises(UserError, match="set --val-fraction"):
        load_images(tmp_path / "flat")
    with pytest.raises(UserError, match="leave out --val-fraction"):
        load_images(images, val_fraction=0.2)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for name, mode in (("a", "L"), ("b", "RGBA")):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new(mode, (8, 8)).save(tmp_path / split / name / "x.png")
    assert load_images(tmp_path, size=8).image_shape == (3, 8, 8)


@pytest.mark.parametrize("change", ["touch", "edit", "rename", "label", "size"])
def test_the_identity_of_a_folder_changes_with_its_files(tmp_path: Path, change: str) -> None:
    write_images(tmp_path, 2, seed=4)
    paths = sorted(tmp_path.rglob("*.jpg"))
    labels = [0, 0, 1, 1, 2, 2]
    before = FolderImages(tmp_path, paths, labels, 32, 0).identity
    assert FolderImages(tmp_path, paths, labels, 32, 4).identity == before
    size = 32
    if change == "touch":
        stat = paths[0].stat()
        import os

        os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "edit":
        paths[0].write_bytes(paths[1].read_bytes() + b"\0")
    elif change == "rename":
        paths[0] = paths[0].rename(paths[0].with_name("other.jpg"))
    elif change == "label":
        labels[0] = 1
    else:
        size = 33
    assert FolderImages(tmp_path, paths, labels, size, 0).identity != before


def test_an_augmented_row_depends_on_seed_epoch_and_row_alone(images: Path) -> None:
    data = load_images(images)

    def views(rows: list[int], seed: int = 1, epoch: int = 2) -> torch.Tensor:
        inputs = InputRows(data.train, data.mean, data.std, torch.device("cpu"), seed)
        inputs.epoch = epoch
        return next(inputs.batches([np.array(rows)]))

    rows = [4, 99, 1, 17, 0, 2]
    whole = views(rows)
    assert torch.equal(views([17, 99]), whole[[3, 1]])
    assert not torch.equal(views(rows, epoch=3), whole)
    assert not torch.equal(views(rows, seed=2), whole)


def test_a_view_depends_on_the_row_and_not_on_how_many_there_are() -> None:
    assert (random_views(500, 3, 7)[:20] == random_views(20, 3, 7)).all()
    many = random_views(20_000, 3, 7)
    for shifts in (many[:, 0], many[:, 1]):
        counts = np.bincount(shifts, minlength=9)
        assert len(counts) == 9
        assert abs(counts / len(many) - 1 / 9).max() < 0.01
    assert abs(many[:, 2].mean() - 0.5) < 0.02
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.03


@pytest.mark.parametrize(("views", "again"), [(None, False), (3, True), ("flips", False)])
def test_views_of_an_epoch_come_again_after_as_many_epochs(
    images: Path, views: Any, again: bool
) -> None:
    data = load_images(images)
    inputs = InputRows(data.train, data.mean, data.std, torch.device("cpu"), 1, views=views)
    seen = []
    for inputs.epoch in range(6):
        seen.append(next(inputs.batches([np.arange(40)])))
    assert torch.equal(seen[0], seen[3]) == again
    assert not torch.equal(seen[0], seen[1])
    if views == "flips":
        plain = InputRows(data.train, data.mean, data.std, torch.device("cpu"))
        x = next(plain.batches([np.arange(40)]))
        mirrored = torch.tensor(
            [[torch.equal(one.flip(-1), row) for one, row in zip(x, epoch, strict=True)]
             for epoch in seen]
        ).double()  # fmt: skip
        assert (mirrored.mean(0) == 0.5).all(), "each row as often as its mirror image"
        assert 0.2 < mirrored[0].mean() < 0.8, "both in one epoch"


@pytest.mark.parametrize("augment_seed", [None, 3])
def test_pixels_that_stay_in_memory_are_decoded_once_and_give_the_same_rows(
    images: Path, augment_seed: int | None
) -> None:
    data = load_images(images)
    counted = CountedImages(data.train)
    here, there = (
        InputRows(each, data.mean, data.std, torch.device("cpu"), augment_seed, kept_on=kept_on)
        for each, kept_on in ((data.train, None), (counted, torch.device("cpu")))
    )
    for epoch in range(3):
        here.epoch = there.epoch = epoch
        order = full_batches(epoch_order(150, 0, epoch), 32)
        if epoch == 0:
            order = order[:3]  # a run that goes on in the middle of its first epoch
        for one, other in zip(here.batches(order), there.batches(order), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
    assert counted.decoded == 150
    assert list(there.batches([])) == []


class CountedImages:
    """Images that count how many of them were decoded."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.decoded = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)

    def decode(self, order: Sequence[Indices]) -> Iterator[Tensor]:
        for pixels in self.images.decode(order):
            self.decoded += len(pixels)
            yield pixels


def test_an_augmented_image_is_a_shifted_perhaps_mirrored_one_on_black() -> None:
    pixels = torch.randint(1, 256, (50, 12, 10, 3), dtype=torch.uint8)
    flipped, shifts = 0, set()
    for image, view in zip(
        pixels, augment(pixels, torch.from_numpy(random_views(50, 0, 0))), strict=True
    ):
        padded = torch.zeros(20, 18, 3, dtype=torch.uint8)
        padded[4:16, 4:14] = image
        found = [
            (dy, dx, mirrored)
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            if torch.equal(padded[dy : dy + 12, dx : dx + 10].flip(1 if mirrored else ()), view)
        ]
        assert len(found) == 1
        flipped += found[0][2]
        shifts.add(found[0][:2])
    assert 10 < flipped < 40
    assert len(shifts) > 20


def test_a_damaged_image_is_named_whoever_decodes_it(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3, seed=5)
    write_images(tmp_path / "val", 2, seed=6)
    damaged = tmp_path / "val" / "checks" / "001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"checks/001\.jpg cannot be decoded \(.*\): replace"):
            load_images(tmp_path, workers=workers)


def test_statistics_of_a_flat_channel_do_not_divide_by_zero(tmp_path: Path) -> None:
    class Flat:
        labels = torch.zeros(2, dtype=torch.int64)
        identity = "flat"

        def __len__(self) -> int:
            return 2

        def decode(self, order):
            for rows in order:
                yield torch.full((len(rows), 2, 2, 3), 7, dtype=torch.uint8)

    assert statistics(Flat())[1] == (1.0, 1.0, 1.0)


def test_files_that_torchvision_takes_for_images_are_taken() -> None:
    assert images.IMAGE_SUFFIXES == torchvision.datasets.folder.IMG_EXTENSIONS
