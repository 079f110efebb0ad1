"""Image folders as they come from the field: litter of other programs, and broken files."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cachefreeze.data import images, sets
from cachefreeze.errors import UserError
from cachefreeze.train import main


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


def load(root: Path, **options: Any) -> sets.DataSet:
    return sets.load_folder(
        root, size=8, val_fraction=None, workers=0, bar=lambda passes, total: passes, **options
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


@pytest.fixture
def broken(photos: Path) -> list[Path]:
    """Three images that are cut short."""
    paths = [photos / "train/cat/0.png", photos / "train/dog/2.png", photos / "val/dog/1.png"]
    for path in paths:
        path.write_bytes(path.read_bytes()[:40])
    return paths


def test_all_broken_images_are_named_at_once(photos: Path, broken: list[Path]) -> None:
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


def test_a_rotated_photograph_is_read_as_torchvision_reads_it(photos: Path) -> None:
    from torchvision.datasets.folder import default_loader

    exif = Image.Exif()
    exif[0x0112] = 6  # "to be turned by 90 degrees"
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    path = photos / "train" / "cat" / "0.jpg"
    Image.fromarray(pixels).save(path, exif=exif)
    read = next(iter(load(photos).train.decode([np.array([0])])))[0].numpy()
    assert np.array_equal(read, np.asarray(default_loader(path)))


@pytest.mark.parametrize(("kind", "told"), [(np.uint16, True), (np.float32, True), (None, False)])
def test_images_of_more_than_8_bits_are_told_once(
    photos: Path, kind: Any, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        if kind is not None:
            Image.fromarray(np.zeros((9, 9), kind)).save(photos / split / "cat" / "0.tiff")
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        load(photos, normalization=((0.5,) * 3, (0.5,) * 3))
    assert caplog.text.count("more than 8 bits") == int(told)


@pytest.mark.parametrize("normalization", [None, ((0.5,) * 3, (0.5,) * 3)])
def test_broken_images_are_left_out_on_request_and_named_in_one_warning(
    photos: Path, broken: list[Path], normalization: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cachefreeze"):
        found = load(photos, skip_broken=True, normalization=normalization)
    (record,) = caplog.records
    assert "3 in all" in record.getMessage()
    assert all(str(path) in record.getMessage() for path in broken)
    assert "3 broken images left out" in found.outline.description
    assert (len(found.train), len(found.val)) == (4, 5)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    for path in broken:
        path.unlink()
    plain = load(photos, normalization=normalization)
    assert plain.facts == found.facts
    assert plain.outline.description == found.outline.description.partition(", 3 broken")[0]


def test_a_class_of_which_no_image_is_left_is_an_error(photos: Path) -> None:
    for path in (photos / "train" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no training image of the class 'cat' is left"):
        load(photos, skip_broken=True)


def test_a_file_that_cannot_be_read_is_not_left_out(
    photos: Path, broken: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = images.decode_image

    def refuse(path: Path, size: int) -> Any:
        if path.name == "1.png":
            raise OSError(errno.EMFILE, "Too many open files")
        return decode(path, size)

    monkeypatch.setattr(images, "decode_image", refuse)
    with pytest.raises(UserError, match="6 images cannot be decoded"):
        load(photos, skip_broken=True)


def test_a_run_that_left_out_broken_images_goes_on_with_the_same_rows(
    photos: Path,
    broken: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fails: Callable[..., str],
) -> None:
    run, whole = tmp_path / "run", broken[0].with_name("1.png").read_bytes()
    argv = ["--dataset", "imagefolder", "--data-dir", str(photos), "--image-size", "8", "-j", "0"]
    argv += ["--arch", "wrn10_1", "--epochs", "1", "-b", "2", "--cache-dir", str(tmp_path / "rows")]
    argv += ["--output-dir", str(run), "--no-report", "--precision", "fp32"]
    assert "--skip-broken" in fails(*argv)
    assert main([*argv, "--skip-broken"]) == 0
    printed = capsys.readouterr()
    assert "left out, 3 in all" in printed.out + printed.err
    assert "3 broken images left out" in printed.out
    (run / "summary.json").unlink()
    assert main(["--resume", str(run)]) == 0
    (run / "summary.json").unlink()
    broken[0].write_bytes(whole)
    assert "the images are not those" in fails("--resume", str(run))


NASTY = "=cmd|'calc'!A1<img src=x onerror=alert(1)>\x1b[2J\u202e\udcff"


def test_names_of_folders_are_text_on_the_terminal_and_in_the_report(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    root = tmp_path / NASTY
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (photos / split / "cat").rename(root / split / NASTY)
        (photos / split / "dog").rename(root / split / "dog")
    run = tmp_path / "run"
    argv = ["--dataset", "imagefolder", "--data-dir", str(root), "--image-size", "8", "-j", "0"]
    argv += ["--arch", "wrn10_1", "--epochs", "1", "-b", "2", "--cache-dir", str(tmp_path / "rows")]
    argv += ["--output-dir", str(run), "--precision", "fp32"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"onerror=alert(1)>\x1b[2J\u202e\udcff" in shown
    page = (run / "report.html").read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    # Its columns are named by modules of the network, and all else in it is numbers.
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    assert all(name.isidentifier() or name.startswith("lr_") for name in header.split(","))
    for line in lines:
        assert [float(cell) for cell in line.split(",")]
    (root / "train" / NASTY / "0.png").write_bytes(b"")
    sentence = fails(*argv[:-3], str(tmp_path / "other"), *argv[-2:])
    assert r"\x1b[2J" in sentence
    assert "\x1b" not in sentence
