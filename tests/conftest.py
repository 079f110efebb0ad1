"""Small real images, and the program run on them in this process."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from cachefreeze.cache import selection
from cachefreeze.plan import costs, forecast, overhead
from cachefreeze.train import main
from cachefreeze.training import checkpoint
from tests.support.programs import Programs, warm

if TYPE_CHECKING:
    from tests.support.interrupter import Interrupter

# For runs with --deterministic on a GPU: cuBLAS reads it once, when any test first uses it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CLASSES = ("blobs", "checks", "stripes")


def write_images(folder: Path, per_class: int, seed: int, size: int = 32) -> None:
    """`per_class` noisy JPEGs of each of three patterns that a small network can tell apart."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    patterns = (((x - size / 2) ** 2 + (y - size / 2) ** 2) < 80, (x // 4 + y // 4) % 2, y // 4 % 2)
    for name, pattern in zip(CLASSES, patterns, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            colour = random.integers(60, 200, 3)
            pixels = pattern[..., None] * colour + random.normal(40, 20, (size, size, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number:03}.jpg", quality=90)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 training and 33 validation images: five steps of 32 an epoch, the last filled up."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 50, seed=1)
    write_images(folder / "val", 11, seed=2)
    return folder


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Runs programs in processes of their own, without the seconds that importing PyTorch takes."""
    with warm() as server:
        yield server


@dataclass
class Run:
    """A finished run, as its files tell it."""

    folder: Path
    args: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Run":
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return cls(
            folder,
            json.loads((folder / "args.json").read_text()),
            [json.loads(line) for line in lines],
            json.loads((folder / "summary.json").read_text()),
        )


Train = Callable[..., Run]


@pytest.fixture
def train(images: Path, tmp_path: Path) -> Train:
    """Runs the program on the small images; options given later win."""
    count = 0

    def run(*options: object) -> Run:
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        argv = ["-b", 32, "-j", 0, "--precision", "fp32", "--cache-dir", tmp_path / "cache"]
        if "--dataset" not in options:
            argv += ["--dataset", "imagefolder", "--data-dir", images, "--image-size", 32]
        argv += ["--no-report", "--output-dir", folder, *options]
        assert main([str(part) for part in argv]) == 0
        return Run.load(folder)

    return run


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A quota: no file may grow beyond `size` bytes, which the system answers with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heeded() -> None:
    # A shell switches it off for what it runs in the background, and so would the program then.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[None]:
    """Whom permissions apply to, unlike root."""
    if os.geteuid():
        yield
        return
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == 0 and folder != Path("/tmp"):
            folder.chmod(0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the program, which must give up with exit code 2; returns its one sentence."""

    def run(*options: object) -> str:
        capsys.readouterr()
        assert main([str(part) for part in options]) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, f"more than one line: {captured.err}"
        assert lines[0].startswith("error: ")
        assert "Traceback" not in captured.out + captured.err
        return lines[0]

    return run


@pytest.fixture
def interrupt() -> "Iterator[Interrupter]":
    from tests.support.interrupter import Interrupter  # which imports this

    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Interrupter(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def _short_runs() -> Iterator[None]:
    """Lets runs of a second save and keep rows as runs of an hour do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "TIME_SHARE", float("inf"))
        for what in ("COMPARED", "TRACED"):
            patch.setattr(forecast, what, 0)
        for what in ("READ_RATE", "WRITE_RATE"):
            patch.setattr(costs, what, float("inf"))
        yield


@pytest.fixture(autouse=True)
def any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets frozen work be left out whatever share of the time it was measured to be."""
    monkeypatch.setattr(selection, "LEAST_SHARE", 0.0)


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets caches of small models take whatever time following takes."""
    monkeypatch.setattr(overhead, "_FREE_SECONDS", float("inf"))
