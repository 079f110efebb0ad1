"""`torchrun -m cachefreeze.train`: several processes train one run together."""

import shutil
import signal
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefreeze import UserError
from cachefreeze.cache.memory import free_memory
from cachefreeze.data import InputRows, epoch_order, full_batches, load
from cachefreeze.models import wrn
from cachefreeze.training.checkpoint import load_checkpoint
from cachefreeze.training.interrupts import Interrupts
from cachefreeze.training.launch import ALONE, Launch, launch_of
from cachefreeze.training.ranks import PACKAGE, Ranks
from cachefreeze.training.terminal import track
from cachefreeze.training.validation import results_of_batches
from tests.conftest import Run
from tests.distributed.parts import train as train_parts
from tests.support.programs import Done, Programs
from tests.training.test_parity import assert_same_run

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
Train = Callable[..., Done]


@pytest.fixture(scope="module")
def options(images: Path) -> list[str]:
    """A run of 40 steps, 5 an epoch. The first units freeze at the steps 10, 17, 25 and 32."""
    words = ["--dataset", "imagefolder", "--data-dir", images, "--image-size", 32, "-j", 0]
    words += ["--arch", "wrn10_1", "--dropout", 0.2, "--epochs", 8, "-b", 32, "--lr", 0.05]
    words += ["--t0", 0.25, "--schedule", "linear", "--precision", "fp32", "--no-report"]
    return [*map(str, words), "--device", "cpu"]


@pytest.fixture(scope="module")
def train(programs: Programs, options: list[str]) -> Train:
    """Runs the trainer in two processes, which work in a folder."""

    def run(folder: Path, *more: object, victim: str = "") -> Done:
        words = ["2", victim, *options, *map(str, more)]
        return programs.run("tests.distributed.trained", *words, cwd=folder, timeout=150)

    return run


@pytest.fixture(scope="module")
def plain(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in two processes without the cache."""
    folder = tmp_path_factory.mktemp("plain")
    done = train(folder, "--no-cache", "--output-dir", "run")
    assert done.code == 0, done.stderr[-3000:]
    return Run.load(folder / "run")


def test_two_processes_with_the_cache_end_with_the_weights_of_two_without(
    train: Train, plain: Run, tmp_path: Path
) -> None:
    done = train(tmp_path)
    assert done.code == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()  # and no other process made one
    cached = Run.load(folder)
    assert_same_run(cached, plain)
    cache = cached.summary["cache"]
    # One process alone has computed half of the rows.
    assert cache["rows_served"] > 100, done.stdout
    assert done.stdout.count("epoch 8/8") == done.stdout.count("accuracy ") == 1
    sizes = [one["bytes"] for one in cached.summary["reduced"]]
    assert len(sizes) == 5
    assert all(more > less for more, less in pairwise(sizes))
    assert sizes[0] == 4 * cached.summary["about"]["parameters"]
    assert done.stdout.count("of gradients are reduced in each step") == 5


def test_the_validation_is_that_of_one_process_with_the_same_weights(
    plain: Run, images: Path
) -> None:
    data = load("imagefolder", images, image_size=32, val_fraction=None, workers=0, bar=track)
    model = wrn(3, depth=10, width=1)
    model.load_state_dict(load_checkpoint(plain.folder / "last.pt")["model"])
    model.eval()
    inputs = InputRows(data.val, data.mean, data.std, torch.device("cpu"))
    how = (data.val.labels, 32, Ranks(ALONE), Interrupts())
    with torch.no_grad():
        loss, correct = results_of_batches(model, inputs, *how).sum(0).tolist()
    assert len(data.val) == 33  # a batch for each process
    assert plain.metrics[-1]["val_loss"] == pytest.approx(loss / 33, rel=1e-5)
    assert plain.metrics[-1]["val_accuracy"] == correct / 33


def test_a_killed_process_is_started_again_and_the_run_ends_with_the_same_weights(
    programs: Programs, options: list[str], plain: Run, tmp_path: Path
) -> None:
    launch = ("--standalone", "--nproc-per-node=2", "--max-restarts=1", "--module")
    program = ("tests.distributed.trained", f"1 23 {signal.SIGKILL}", *options)
    more = ("--checkpoint-every", "5", "--cache-dir", str(tmp_path / "cache"))
    done = programs.run(
        "torch.distributed.run", *launch, *program, *more, "--output-dir", str(tmp_path / "run")
    )
    assert done.code == 0, done.stderr[-3000:]
    assert "another process of this run has ended" in done.stderr
    assert "Traceback" not in done.stderr
    run = Run.load(tmp_path / "run")
    assert run.summary["resumed_at"] == [20]
    assert_same_run(run, plain)


def test_a_run_that_one_process_was_asked_to_stop_goes_on_in_one_process(
    programs: Programs, train: Train, plain: Run, tmp_path: Path
) -> None:
    victim = f"1 23 {signal.SIGTERM}"
    done = train(tmp_path, "--output-dir", "run", victim=victim)
    assert done.code == 143
    assert done.stderr.count("interrupted at step 24 of 40") == 1, done.stderr
    assert "torchrun --nproc-per-node 2 -m cachefreeze.train --resume run" in done.stderr
    resumed = programs.run("cachefreeze.train", "--resume", "run", cwd=tmp_path)
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert "the run goes on in 1 process instead of 2" in " ".join(resumed.stdout.split())
    run = Run.load(tmp_path / "run")
    assert run.summary["processes"] == [2, 1]
    for line, other in zip(run.metrics[:2], plain.metrics[:2], strict=True):
        assert line["train_loss"] == other["train_loss"]
    assert run.metrics[-1]["val_loss"] == pytest.approx(plain.metrics[-1]["val_loss"], rel=0.5)


def test_a_process_with_other_code_is_refused(train: Train, tmp_path: Path) -> None:
    copy = tmp_path / "rank1" / "cachefreeze"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "freezeout" / "schedule.py").open("a") as file:
        file.write("# another version\n")
    assert sentence(train(tmp_path)) == (
        "error: process 1 has other code than process 0 (cachefreeze/freezeout/schedule.py "
        "differs): start all processes with the same command, the same installation and the same "
        "files"
    )
    assert not (tmp_path / "runs").exists()


def test_a_process_with_other_weights_is_refused(train: Train, plain: Run, tmp_path: Path) -> None:
    state = torch.load(plain.folder / "last.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "weights.pt")
    (tmp_path / "rank1").mkdir()
    name = next(name for name in state if name.endswith("conv1.weight"))
    state[name][0, 0, 0, 0] += 1e-6
    torch.save(state, tmp_path / "rank1" / "weights.pt")
    told = sentence(train(tmp_path, "--weights", "weights.pt"))
    assert told.startswith(f"error: process 1 has other weights than process 0 ({name} differs)")


def sentence(done: Done) -> str:
    """Returns the one line that a program that gives up has said."""
    assert done.code == 2, done.stderr[-3000:]
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


def test_a_batch_with_fewer_rows_than_processes_is_refused() -> None:
    with pytest.raises(UserError, match="a batch of 2 rows cannot be split over 3 processes"):
        part_of(0, 3).check_batch(2, False, print)


def part_of(rank: int, count: int) -> Ranks:
    """Returns one of several processes, without the others."""
    ranks = Ranks(ALONE)
    ranks.launch, ranks.count = Launch(rank=rank, count=count), count
    return ranks


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_parts_of_all_processes_are_the_batches_of_one(count: int) -> None:
    whole = full_batches(epoch_order(47, seed=3, epoch=1), 8)
    parts = [part_of(rank, count).parts(whole) for rank in range(count)]
    for number, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([one[number] for one in parts]), batch)
    assert all(len(part) > 0 for one in parts for part in one)


def test_three_processes_sum_gradients_of_unequal_parts_in_the_same_order_after_a_resume(
    programs: Programs, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = programs.run("tests.distributed.parts", str(tmp_path), port)
    assert done.code == 0, done.stderr[-3000:]
    alone = train_parts(Ranks(ALONE), 1)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name, expected in alone.items():
        torch.testing.assert_close(found[0]["step"][name], expected, rtol=0, atol=1e-6)
        for one in found:
            assert torch.equal(one["step"][name], found[0]["step"][name])
            assert torch.equal(one["resumed"][name], one["whole"][name])


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == pytest.approx(alone / 4, rel=0.2)


def test_a_process_knows_its_place_from_torchrun_alone() -> None:
    assert launch_of({"WORLD_SIZE": "4", "RANK": "1"}) is ALONE  # no address to meet at
    assert launch_of({**ENVIRONMENT, "WORLD_SIZE": "1"}) is ALONE
    assert launch_of(ENVIRONMENT) == Launch(rank=1, count=2, local_rank=1, local_count=1)
