"""Checkpoints are whole or not there, say if they were damaged, and run nothing."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cachefreeze import UserError
from cachefreeze.training import checkpoint
from cachefreeze.training.checkpoint import (
    is_due,
    load_checkpoint,
    load_last_checkpoint,
    save_checkpoint,
)
from cachefreeze.training.randomness import random_state, set_random_state

CPU = torch.device("cpu")


def state(number: int) -> dict:
    values = torch.arange(2000, dtype=torch.float32) + number
    return {"step": number, "model": {"weight": values, "none": None}, "names": ["a", "b"]}


def no_warning(sentence: str) -> None:
    raise AssertionError(sentence)


def test_it_loads_with_weights_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {**state(3), "random": random_state(CPU)})
    plain = torch.load(tmp_path / "last.pt", weights_only=True)
    assert plain["step"] == 3
    assert torch.equal(plain["model"]["weight"], state(3)["model"]["weight"])


def test_the_one_before_is_kept_and_the_best_is_the_best(tmp_path: Path) -> None:
    for number in range(1, 5):
        save_checkpoint(tmp_path, state(number), state(number) if number == 2 else None)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 4, "previous.pt": 3, "best.pt": 2}


def test_a_file_system_without_hard_links_does_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    test_the_one_before_is_kept_and_the_best_is_the_best(tmp_path)


@pytest.mark.parametrize("operation", ["fsync", "link", "replace"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_whatever_fails_while_saving_leaves_the_last_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, count: int
) -> None:
    save_checkpoint(tmp_path, state(1), state(1))
    save_checkpoint(tmp_path, state(2))
    module = Path if operation == "replace" else os
    real, calls = getattr(module, operation), 0

    def failing(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, operation, failing)
    try:
        save_checkpoint(tmp_path, state(3), state(3))
    except KeyboardInterrupt:
        monkeypatch.undo()
        last = load_last_checkpoint(tmp_path, no_warning)
        assert last is not None
        assert last["step"] in (2, 3)
        best = load_checkpoint(tmp_path / "best.pt")["step"]
        # It may be ahead: whoever goes on from 2 makes it once more. It may not be behind.
        assert best == 3 if last["step"] == 3 else best in (1, 3)
        assert not list(tmp_path.glob("*.partial"))
    else:
        assert calls < count


def test_any_bit_that_flips_is_found_or_makes_no_difference(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    path = tmp_path / "last.pt"
    whole, dice = path.read_bytes(), random.Random(0)
    found = 0
    for _ in range(300):
        content = bytearray(whole)
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            found += 1
        else:
            assert torch.equal(loaded["model"]["weight"], state(1)["model"]["weight"])
            assert (loaded["step"], loaded["names"]) == (1, ["a", "b"])
    assert found > 150, "most of the file is weights"


def test_a_damaged_one_is_passed_over_for_the_one_before_and_that_is_said(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-500])
    told: list[str] = []
    last = load_last_checkpoint(tmp_path, told.append)
    assert last is not None
    assert last["step"] == 1
    assert len(told) == 1
    assert "last.pt" in told[0]
    assert "going on from previous.pt" in told[0]
    # Nor does it take the place of the one before when the run goes on, and is damaged again.
    save_checkpoint(tmp_path, state(3))
    (tmp_path / "last.pt").write_bytes(b"")
    last = load_last_checkpoint(tmp_path, told.append)
    assert last is not None
    assert last["step"] == 1
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="nothing to go on from"):
        load_last_checkpoint(tmp_path, no_warning)


class Burglar:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("burgled",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"sha256": "", "model": Burglar()}))


def pickled_by_torch(path: Path) -> None:
    torch.save({"sha256": "", "model": Burglar()}, path)


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


def without_checksum(path: Path) -> None:
    torch.save({"model": {}}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02.")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def an_endless_list(path: Path) -> None:
    endless: list[object] = []
    endless.append(endless)
    torch.save({"sha256": "", "model": endless}, path)


def a_tensor_of_terabytes(path: Path) -> None:
    torch.save({"sha256": "", "model": torch.zeros(1).expand(2**45)}, path)


def a_sparse_tensor(path: Path) -> None:
    torch.save({"sha256": "", "model": torch.eye(3).to_sparse()}, path)


def a_folder(path: Path) -> None:
    path.mkdir()


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10_000))


@pytest.mark.parametrize(
    "forge",
    [
        pickled,
        pickled_by_torch,
        a_list,
        without_checksum,
        empty,
        another_zip,
        a_folder,
        noise,
        a_pipe,
        an_endless_list,
        a_tensor_of_terabytes,
        a_sparse_tensor,
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence_and_nothing_in_it_runs(
    forge: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forge(tmp_path / "last.pt")  # type: ignore[operator]
    with pytest.raises(UserError, match=r"last\.pt") as caught:
        load_checkpoint(tmp_path / "last.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "burgled").exists()


def test_all_random_state_goes_on_where_it_was() -> None:
    def draw() -> list[float]:
        return [
            torch.rand(1).item(),
            random.random(),
            np.random.rand(),
            random.gauss(),
            torch.randn(1).item(),
            np.random.randn(),
        ]

    draw()
    saved = random_state(CPU)
    drawn = [draw() for _ in range(3)]
    set_random_state(saved, CPU)
    assert [draw() for _ in range(3)] == drawn


@pytest.fixture(autouse=True)
def a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "TIME_SHARE", 0.01)


@pytest.mark.parametrize(
    ("epoch", "cost", "epochs", "saved"),
    [
        (2.5, 0.01, 12, 12),  # a demonstration: each costs less than a hundredth of an epoch
        (2.5, 0.1, 40, 10),  # a hundredth of 100 s is spent
        (2.5, 100.0, 200, 1),  # by the clock alone: five minutes are over once
        (240.0, 60.0, 10, 10),  # two epochs would be more than five minutes
        (3600.0, 600.0, 3, 3),  # never more than an epoch
        (149.0, 60.0, 10, 5),
    ],
)
def test_checkpoints_take_little_time_and_no_kill_costs_much(
    epoch: float, cost: float, epochs: int, saved: int
) -> None:
    now = spent = last = longest = 0.0
    count = 0
    for _ in range(epochs):
        now += epoch
        longest = max(longest, now - last)
        if is_due(since=now - last, epoch=epoch, cost=cost, spent=spent, wall=now):
            now += cost
            count, last, spent = count + 1, now, spent + cost
    assert count == saved
    assert longest <= max(300, epoch)
