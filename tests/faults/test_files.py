"""Image folders as they come from the field: litter of other programs, and broken files."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachefreeze.data import sets
from cachefreeze.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of three images, in two splits."""
    for number, split in enumerate(("train", "val")):
        for kind in ("cat", "dog"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for image in range(3):
                pixels = np.full((9, 9, 3), 20 * image + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return tmp_path


def load(root: Path) -> sets.DataSet:
    return sets.load_folder(
        root, size=8, val_fraction=None, workers=0, bar=lambda passes, total: passes
    )


@pytest.mark.parametrize(
    "litter",
    ["cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", "__MACOSX/cat/0.png",
     ".ipynb_checkpoints/0.png", "cat/Thumbs.db"],
)  # fmt: skip
def test_litter_of_other_programs_is_passed_over(
    photos: Path, litter: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = photos / "train" / litter
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        data = load(photos)
    assert len(data.train) == 6
    assert data.classes == ("cat", "dog")
    if litter.startswith("cat/.") and litter.endswith("png"):
        assert "passed over" in caplog.text
        assert litter in caplog.text


def test_all_broken_images_are_named_at_once(photos: Path) -> None:
    broken = [photos / "train/cat/0.png", photos / "train/dog/2.png", photos / "val/dog/1.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="3 images cannot be decoded") as error:
        load(photos)
    assert all(str(path) in str(error.value) for path in broken)


@pytest.mark.parametrize("mode", ["I;16", "F", "P", "LA", "1"])
def test_other_kinds_of_images_are_read_as_torchvision_reads_them(photos: Path, mode: str) -> None:
    from torchvision.datasets.folder import default_loader

    values = np.linspace(0, 255, 64).reshape(8, 8)
    name = "0.tiff" if mode == "F" else "0.png"
    path = photos / "train" / "cat" / name
    if mode in ("I;16", "F"):
        Image.fromarray((values * 257).astype(np.uint16 if mode != "F" else np.float32)).save(path)
    else:
        Image.fromarray(values.astype(np.uint8)).convert(mode).save(path)
    data = load(photos)
    row = sorted((photos / "train" / "cat").iterdir()).index(path)
    read = next(iter(data.train.decode([np.array([row])])))[0].numpy()
    assert np.array_equal(read, np.asarray(default_loader(path)))
