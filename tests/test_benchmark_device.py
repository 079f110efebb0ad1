"""The benchmark for GPUs, tried out on the CPU: everything but the device is as it is there."""

import argparse
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_device
from benchmark_device import (
    Bench,
    Kernel,
    Setting,
    efficiencies,
    file_system,
    idle_share,
    kernels_of,
    longest,
    rates_table,
    settings_of,
    unpacked,
)

from cachefreeze.errors import UserError
from cachefreeze.rows import Indices
from cachefreeze.stored_rows import StoredRows

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "benchmark.py"


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
    assert "From the plain loop to device" in done.stdout
    seconds = dict(re.findall(r"^\| (device|limit) +\| 1 +\| ([\d.]+) ", done.stdout, re.MULTILINE))
    assert float(seconds["limit"]) < float(seconds["device"])
    assert re.search(r"^\| 0 +\| [\d.]+ +\| ", done.stdout, re.MULTILINE), "steps a second"
    accuracies = set(re.findall(r"^\| (?:fr|de|ho|di).*?([\d.]+%)", done.stdout, re.MULTILINE))
    assert len(accuracies) == 1, "freezing only and all tiers come to the same"
    first = done.stdout.partition("## wrn10_1")[0]
    assert "3 epochs: the same." in first, "before what may take all of the time"
    assert len(re.findall(r"^(?:device|host|disk): .*, [1-9]\d* rows from", first, re.M)) == 3
    assert (tmp_path / "all.json").stat().st_size > 1000


def test_what_there_is_no_time_for_is_left_out_and_said() -> None:
    done = benchmark("cpu", "--minutes", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no time left") == 9


@dataclass
class Faulty:
    """A run of the benchmark whose rows from the disk are wrong, with hardly any device memory, and
    time for batches of 32 only; TF32 is off and algorithms are tried, as for a run on a GPU."""

    code: int
    output: str
    # TF32 in convolutions, and trying of algorithms, in the plain loop's steps.
    plain: set[tuple[bool, bool]]
    afterwards: tuple[bool, bool]


@pytest.fixture(scope="module")
def faulty(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    packed, seen, out = tmp_path_factory.mktemp("packed") / "images.npz", set(), io.StringIO()
    cudnn = torch.backends.cudnn
    build, batches = benchmark_device.build, StoredRows.batches

    def watched(*args: object, **sizes: int) -> nn.Module:
        model = build(*args, **sizes)  # type: ignore[arg-type]
        model.register_forward_hook(lambda *_: seen.add((cudnn.allow_tf32, cudnn.benchmark)))
        return model

    def wrong(rows: StoredRows, order: Sequence[Indices]) -> Iterator[Tensor]:
        return (x + 1 for x in batches(rows, order))

    words = "--device cpu --networks wrn10_1 --batches 64,32 --t0 0.5 --epochs 1 --precision fp32"
    words += " --plain-steps 1 --workers 0 --modes device"
    no_room = ["--cache-policy", "eager", "--cache-tier", "device", "--device-cache-gb", "1e-6"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(benchmark_device, "build", watched)
        patch.setattr(StoredRows, "batches", wrong)
        patch.setitem(benchmark_device.MODES, "device", no_room)
        patch.setattr(Bench, "epoch_seconds", lambda _, words: 0.0 if "32" in words else 1e6)
        with cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            pack = ["--device", "cpu", "--data", str(images), "--pack", str(packed)]
            assert benchmark_device.main(pack) == 0
            code = benchmark_device.main([*words.split(), "--data", str(packed)])
            afterwards = cudnn.allow_tf32, cudnn.benchmark
    return Faulty(code, out.getvalue(), seen, afterwards)


def test_weights_that_differ_are_a_failure_and_the_rest_is_measured(faulty: Faulty) -> None:
    assert "3 epochs: DIFFERENT." in faulty.output
    assert faulty.code == 1
    assert re.search(r"^\| device +\| 1 ", faulty.output, re.MULTILINE)


def test_the_table_says_where_rows_really_were(faulty: Faulty) -> None:
    assert re.search(r"^\| device .*\| host +\|", faulty.output, re.MULTILINE), faulty.output


def test_a_setting_that_takes_too_long_keeps_no_other_from_being_run(faulty: Faulty) -> None:
    _, large, small = faulty.output.split("## wrn10_1")
    assert "(device, repeat 1: not run, no time left)" in large
    assert "no time left" not in small


def test_the_plain_loop_runs_with_torch_as_it_comes(faulty: Faulty) -> None:
    assert faulty.plain == {(True, False)}
    assert faulty.afterwards == (False, True)


def test_efficiency_is_the_share_of_what_the_device_run_without_its_filling_saves() -> None:
    def run(seconds: float, filling: float = 0.0, measuring: float = 0.0) -> list[dict[str, Any]]:
        spent = {"wall": seconds, "materialize": filling, "profile": measuring}
        return [{f"{part}_seconds": each for part, each in spent.items()} | {"plan": None}]

    runs = {"freezing only": run(10.0), "device": run(7.0, 0.75, 0.25), "disk": run(9.0, 2.0)}
    device, disk = efficiencies(runs)
    assert device.startswith("Efficiency from device: 0.75 ")
    assert disk.startswith("Efficiency from disk: 0.25 ")


def test_steps_a_second_stand_by_frontier_and_mode() -> None:
    def run(*rates: tuple[int, int, float]) -> list[dict[str, Any]]:
        return [{"rates": [{"frozen": f, "boundary": b, "steps": s} for f, b, s in rates]}]

    runs = {"no freezing": run((0, 0, 2.0)), "device": run((0, 0, 2.0), (1, 0, 3.0), (1, 1, 4.04))}
    assert rates_table({**runs, "disk": []}) == [
        ["frozen", "no freezing", "device"],
        ["0", "2.0", "2.0"],
        ["1", "", "3.0, 4.0 @1"],
    ]


def test_every_word_is_tried_before_two_are_exchanged() -> None:
    args = argparse.Namespace(t0="0.5,0.8", networks="small,large", batches="512,128")
    order = settings_of(args)
    assert len(order) == len(set(order)) == 8
    assert order[0] == Setting("small", 512, 0.5)
    assert set(order[1:4]) == {
        Setting("large", 512, 0.5),
        Setting("small", 128, 0.5),
        Setting("small", 512, 0.8),
    }
    assert order[-1] == Setting("large", 128, 0.8)


def test_cublas_is_told_before_its_first_use_that_it_has_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # (which the tests have set)
    runpy.run_path(str(SCRIPTS / "benchmark_device.py"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="not Linux")
def test_it_knows_a_file_system_by_the_nearest_mount_above() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) != "proc"


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


def test_regions_with_a_name_are_not_taken_for_kernels() -> None:
    def event(name: str, device: str, start: int, end: int, **more: bool) -> FunctionEvent:
        kind = getattr(torch._C._autograd.DeviceType, device)
        return FunctionEvent(0, name, 0, start, end, device_type=kind, **more)

    events = [
        event("a kernel", "CUDA", 0, 3),
        event("Optimizer.step#SGD.step", "CUDA", 0, 90, is_user_annotation=True),
        event("a kernel", "CUDA", 8, 10),
        event("aten::add", "CPU", 0, 90),
    ]
    assert kernels_of(events) == [Kernel("a kernel", 0, 3), Kernel("a kernel", 8, 10)]


def test_a_gpu_is_idle_where_no_kernel_runs() -> None:
    # 0-4, 2-6 (overlapping), 8-10: 8 of 10 microseconds.
    kernels = [Kernel("a", 2, 6), Kernel("b", 0, 4), Kernel("a", 8, 10)]
    assert idle_share(kernels) == pytest.approx(0.2)
    assert longest(kernels, 1)[2].startswith("| a")
    assert longest(kernels, 1)[2].endswith("60% |")
