"""The benchmark for GPUs, tried out on the CPU: everything but the device is as it is there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmark_device import Kernel, idle_share, longest, unpacked

from cachefreeze.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def benchmark(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_packs_images_and_measures_every_mode_on_them(images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "images.npz"
    done = benchmark("cpu", "--data", images, "--pack", packed)
    assert done.returncode == 0, done.stderr
    assert "150 training and 33 validation images, 3x32x32, 3 classes" in done.stdout
    options = ("--networks", "wrn10_1", "--batches", 32, "--t0", 0.5, "--epochs", 4)
    options += ("--precision", "fp32", "--plain-steps", 2, "--workers", 0)
    done = benchmark("cpu", "--data", packed, *options, "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    for mode in ("no freezing", "freezing only", "device", "host", "disk"):
        assert re.search(rf"^\| {mode} +\| 1 ", done.stdout, re.MULTILINE), done.stdout
    accuracies = set(re.findall(r"^\| (?:fr|de|ho|di).*?([\d.]+%)", done.stdout, re.MULTILINE))
    assert len(accuracies) == 1, "freezing only and all tiers come to the same"
    assert "Efficiency from device" in done.stdout
    assert "3 epochs: the same." in done.stdout
    assert (tmp_path / "all.json").stat().st_size > 1000


def test_what_there_is_no_time_for_is_left_out_and_said() -> None:
    done = benchmark("cpu", "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no time left") == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so() -> None:
    done = benchmark("cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no CUDA device here")


def test_files_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no images")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "code.npz", train_pixels=np.array([print], dtype=object))
    for name in ("text", "other.npz", "code.npz"):
        with pytest.raises(UserError, match="holds no packed images"):
            unpacked(tmp_path / name)


def test_a_gpu_is_idle_where_no_kernel_runs() -> None:
    # 0-4, 2-6 (overlapping), 8-10: 8 of 10 microseconds.
    kernels = [Kernel("a", 2, 6), Kernel("b", 0, 4), Kernel("a", 8, 10)]
    assert idle_share(kernels) == pytest.approx(0.2)
    assert longest(kernels, 1)[2].startswith("| a")
    assert longest(kernels, 1)[2].endswith("60% |")
