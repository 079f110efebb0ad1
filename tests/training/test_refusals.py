"""Folders that cannot be read or written, and full disks, are one sentence."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachefreeze.train import main
from tests.conftest import Train, file_size_limit, write_images
from tests.training.harness import SHORT, Fails


def folder_options(folder: Path, tmp_path: Path) -> list[object]:
    options = ["--dataset", "imagefolder", "--data-dir", folder, "--image-size", 32, "-j", 0]
    return [*options, "--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out", *SHORT]


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def one_class(folder: Path) -> None:
    for split in ("train", "val"):
        for name in ("checks", "stripes"):
            shutil.rmtree(folder / split / name)


def empty_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "checks")
    (folder / "train" / "checks").mkdir()


def other_classes(folder: Path) -> None:
    (folder / "val" / "checks").rename(folder / "val" / "cheques")


def dangling(folder: Path) -> None:
    (folder / "train" / "checks" / "gone.jpg").symlink_to("nowhere")


def truncated(folder: Path) -> None:
    path = folder / "train" / "checks" / "001.jpg"
    path.write_bytes(path.read_bytes()[:200])


def no_image_at_all(folder: Path) -> None:
    (folder / "train" / "checks" / "001.jpg").write_text("hello")


@pytest.mark.parametrize(
    ("hurt", "named"),
    [
        (empty, "no class folders"),
        (one_class, "only the class 'blobs'"),
        (empty_class, "checks has no images"),
        (other_classes, "different classes (checks, cheques)"),
        (dangling, "gone.jpg cannot be read (No such file or directory)"),
        (truncated, "001.jpg cannot be decoded"),
        (no_image_at_all, "001.jpg cannot be decoded"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_described(
    hurt: Callable[[Path], None], named: str, fails: Fails, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write_images(folder / "train", 3, seed=1)
    write_images(folder / "val", 2, seed=2)
    hurt(folder)
    assert named in fails(*folder_options(folder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_output_folder_that_is_a_file_is_refused(
    fails: Fails, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    options = folder_options(images, tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "output folder" in fails(*options, "--output-dir", path)
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--output-dir", "--cache-dir", "--data-dir"])
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_without_permission_is_one_sentence(
    fails: Fails, tmp_path: Path, ordinary_user: None, option: str, mode: int
) -> None:
    write_images(tmp_path / "data" / "train", 2, seed=1)
    write_images(tmp_path / "data" / "val", 2, seed=2)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(mode)
    options = folder_options(tmp_path / "data", tmp_path)
    sentence = fails(*options, option, tmp_path / "locked" / "inside")
    assert "locked" in sentence
    (tmp_path / "locked").chmod(0o777)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "locked"]


def test_a_cache_folder_that_holds_other_files_is_refused(
    fails: Fails, images: Path, tmp_path: Path
) -> None:
    sentence = fails(*folder_options(images, tmp_path), "--cache-dir", images)
    assert "holds other files" in sentence
    assert not (images / "CACHEDIR.TAG").exists()


def test_after_a_refusal_the_mended_command_runs(
    images: Path, tmp_path: Path, fails: Fails
) -> None:
    options = [*folder_options(images, tmp_path), "--epochs", 1]
    fails(*options, "--cache-dir", "/proc/nothing")
    assert main([str(option) for option in options]) == 0


def test_a_cache_folder_that_is_a_file_is_refused(
    fails: Fails, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    sentence = fails(*folder_options(images, tmp_path), "--cache-dir", tmp_path / "file")
    assert "cache folder" in sentence
    assert "choose another with --cache-dir" in sentence
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_is_never_written_over_another(train: Train, fails: Fails, images: Path) -> None:
    run = train(*SHORT)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    options = folder_options(images, run.folder.parent)
    assert "holds a run already" in fails(*options, "--output-dir", run.folder)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_under_the_output_folder_is_one_sentence(
    fails: Fails, images: Path, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    options = folder_options(images, tmp_path)
    sentence = fails(*options, "--output-dir", small_disk / "out")
    assert "No space left on device" in sentence
    left = {path.name for path in (small_disk / "out").iterdir()}
    metrics = {"metrics.jsonl", "metrics.csv"}
    assert left <= {"args.json", *metrics}, "no part of a checkpoint"


def test_a_checkpoint_too_large_for_the_disk_is_one_sentence(
    fails: Fails, images: Path, tmp_path: Path
) -> None:
    """The same by a quota, for where no file system can be mounted."""
    with file_size_limit(100_000):
        sentence = fails(*folder_options(images, tmp_path), "--no-cache")
    assert "File too large" in sentence
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["args.json", "metrics.csv", "metrics.jsonl"], "no part of a checkpoint"


def test_a_full_disk_under_the_cache_folder_costs_only_the_cache(
    train: Train, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*SHORT, "--cache-dir", small_disk / "cache", "--cache-max-gb", 10)
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "no further rows are written to" in told
    assert "(No space left on device)" in told
    plain = train(*SHORT, "--no-cache")
    assert run.summary["weights_sha256"] == plain.summary["weights_sha256"]


def test_by_default_the_cache_takes_half_of_the_disk_and_no_more(
    train: Train, small_disk: Path
) -> None:
    train(*SHORT, "--cache-dir", small_disk / "cache")
    assert shutil.disk_usage(small_disk).free >= 400_000


def test_cifar_that_is_missing_and_cannot_be_downloaded_is_one_sentence(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A proxy on a closed port of this machine: no network, and a quick answer.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    options = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    sentence = fails("--dataset", "cifar10", *options)
    assert "cifar-10-python.tar.gz" in sentence
    assert "--dataset digits" in sentence
    assert list(tmp_path.iterdir()) == []
